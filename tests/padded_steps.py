"""Generation in the padded layout without a scheduler: passes made by hand, straight to a shard's runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.attention import AttentionPass
from engine.gate import root_segment
from engine.shard import Shard
from engine.stage import PackedRows, Visit
from engine.streams import Streams
from engine.trunks import Trunks
from polytrace.graph import Port
from scheduling.plan import NOWHERE, PROLOGUE, Grow, PassId, Plan, RequestId, Segment, TrunkId

REQUEST = RequestId("by hand")
Look = Callable[[Any], Any]
_ROOT = ("", Port.OUTPUT)


def trunk_of(sequence: int) -> TrunkId:
    return REQUEST, -1 - sequence


def prompt_pass(prompts: Sequence[list[int]], num_layers: int, *, keeps: bool = True) -> Plan:
    """All rows of all prompts; with `keeps` each goes on."""
    grows = [
        Grow(trunk=trunk_of(place), segment=place, begin=0, start=0, stop=len(prompt), capacity=64)
        for place, prompt in enumerate(prompts)
    ]
    return _plan([root_segment(prompt, num_layers) for prompt in prompts], grows if keeps else [], num_layers)


def step_pass(tokens: Mapping[int, int], begins: Mapping[int, int], num_layers: int) -> Plan:
    """One token of each sequence that still runs."""
    segments: list[Segment] = []
    grows = []
    for sequence, token in tokens.items():
        begin = begins[sequence]
        trunk = replace(
            root_segment([0] * begin, num_layers),
            trunk=trunk_of(sequence),
            outputs=(NOWHERE,) * num_layers,
            head=(),
            tokens=(),
        )
        own = replace(
            root_segment([token], num_layers),
            parent=len(segments),
            starts=(begin,) * (num_layers + 1),
            stops=(begin + 1,) * num_layers,
            head=(begin,),
        )
        segments += [trunk, own]
        place = len(segments) - 1
        grows.append(
            Grow(trunk=trunk_of(sequence), segment=place, begin=0, start=begin, stop=begin + 1, capacity=64),
        )
    return _plan(segments, grows, num_layers)


def _plan(segments: list[Segment], grows: list[Grow], num_layers: int) -> Plan:
    return Plan(
        pass_id=PassId(0),
        segments=tuple(segments),
        layer_rows=(sum(len(segment.tokens) for segment in segments),) * num_layers,
        views=(),
        members=(),
        keeps=(),
        grows=tuple(grows),
        until=PROLOGUE,
        num_stages=1,
    )


def run(shard: Shard, plan: Plan, looks: Mapping[tuple[str, Port], Look]) -> None:
    """One pass in which these look at ports, and give what goes on."""
    streams = Streams(plan, 1, shard.device, is_fixed=False)
    trunks = Trunks(streams, shard.store)
    rows = PackedRows(
        streams=streams, attention=AttentionPass(plan.pass_id, shard.store, shard.device, trunks), trunks=trunks
    )
    sites = {(site.module, site.port): site for site in shard.probe.sites if site.visit == 0}
    visits = [
        Visit(
            order=sites[place].order,
            module=place[0],
            port=place[1],
            visitor=look,
            rows=range(streams.layer(0).num_rows) if place[1].is_of_pairs else (),
            layouts=sites[place].layouts,
        )
        for place, look in looks.items()
    ]
    shard.runner.run(rows, None, visits, stop_after=None)


def generate(
    shard: Shard,
    prompts: Sequence[list[int]],
    num_steps: int,
    looks: Mapping[tuple[str, Port], Look],
    forced: Mapping[int, int] | None = None,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, `num_steps` of them; sequences may end earlier (`forced`: after so many).

    `looks` see every pass: first the prompts' rows, then one row a sequence that still runs.
    """
    num_layers = shard.probe.layout.num_layers
    found: list[list[int]] = [[] for _ in prompts]
    plan = prompt_pass(prompts, num_layers)
    for step in range(num_steps):
        logits: list[Tensor] = []
        going = [place for place in range(len(prompts)) if forced is None or len(found[place]) < forced[place]]
        if step > 0:
            begins = {place: len(prompts[place]) + step - 1 for place in going}
            plan = step_pass({place: found[place][-1] for place in going}, begins, num_layers)

        def seen(output: Any, logits: list[Tensor] = logits) -> Any:
            logits.append(output["logits"])
            return looks[_ROOT](output) if _ROOT in looks else output

        run(shard, plan, {**looks, _ROOT: seen})
        is_decoder = logits[0].shape[1] == len(going)  # behind an encoder, or one token each
        ends = torch.tensor([1 if is_decoder else len(prompts[place]) for place in going]).cumsum(0) - 1
        for place, row in zip(going, ends.tolist(), strict=True):
            found[place].append(int(logits[0][0, row].argmax()))
    shard.store.forget(REQUEST)
    return found
