"""What the language costs: recording a node, checking a graph, running a node on a tiny tensor, reading a layer.

    python -m bench.run language

All are costs beside the arithmetic, so the model is tiny and deep. A chain of additions and what torch itself takes
for it give the engine's share of a node; a trace that reads every layer against one that reads the last gives the cost
of a read, here and in nnsight, in one race.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import polytrace
from bench.cones.models import folder_of
from bench.cones.peer import Peer, environment
from bench.environments import NoPeerError
from bench.plain import TOLERANCE, Plain, difference
from bench.race import interval, race
from polytrace.graph import Request

_AIMS = {"record_us": 15.0, "validate_1000_ms": 50.0, "run_us": 15.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """One run of the benchmark."""

    model: str = "48x32"
    nodes: int = 1000
    tokens: int = 16
    rounds: int = 60
    threads: int = 1
    seed: int = 0
    with_peer: bool = True  # where nnsight can be had


def run(config: LanguageConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    torch.set_num_threads(config.threads)
    folder = folder_of(config.model)
    model = polytrace.load(str(folder), threads=config.threads)
    ids = random.Random(config.seed).choices(range(model.description.vocab_size), k=config.tokens)
    plain = Plain(str(folder))
    figures = {"aims": _AIMS, **_nodes(model, ids, config), **_reads(model, ids, folder, config)}
    name = f"model.layers.{len(model.model.layers) - 1}"
    with model.trace([ids]):
        chain = _chain(model, config.nodes).save()
    expected = plain.read(ids, outputs=["model.layers.0"])["model.layers.0"][:, -1]
    for _ in range(config.nodes):
        expected = expected + 0.001
    last = plain.read(ids, outputs=[name])[name]
    ours = read_layers(model, ids, every=True)[-1]
    peer = figures["last_of_nnsight"]
    off = [difference(chain, expected), difference(ours, last)]
    off += [difference(torch.tensor(peer), last[0, -1])] if peer else []
    del figures["last_of_nnsight"]
    return figures | {"largest_difference_to_plain": max(off), "allowed_difference": TOLERANCE}


def _nodes(model: Any, ids: list[int], config: LanguageConfig) -> dict[str, Any]:
    """Recording, checking and running: each of a chain of nodes, less the same without them."""
    nodes = config.nodes
    long, lens = _record(model, ids, nodes), _record_lens(model, ids, nodes)
    backend: Any = model.backend
    x = torch.randn(1, model.description.hidden_size)

    def alone() -> None:
        y = x
        for _ in range(nodes):
            y = y + 0.001

    def running(request: Request) -> Callable[[], None]:
        programs = [backend.work_out(request) for _ in range(config.rounds + 1)]  # a program runs once

        def once() -> None:
            (outcome,) = backend.run_together([programs.pop()])
            assert outcome.error is None, outcome.error

        return once

    seconds = race(
        {
            "record nothing": lambda: _record(model, ids, 0),
            "record": lambda: _record(model, ids, nodes),
            "record lens": lambda: _record_lens(model, ids, nodes),
            "validate": lambda: backend.validate(long),
            "validate lens": lambda: backend.validate(lens),
            "run nothing": running(_record(model, ids, 0)),
            "run": running(long),
            "torch": alone,
        },
        rounds=config.rounds,
        seed=config.seed,
    )
    lens_nodes = len(lens.graph.nodes)
    per_node = 1e6 / nodes
    return {
        "record_us": _told(seconds, "record", "record nothing", scale=per_node),
        "record_lens_us": _told(seconds, "record lens", scale=1e6 / lens_nodes),
        "validate_1000_ms": _told(seconds, "validate", scale=1e6 / len(long.graph.nodes)),
        "validate_1000_lens_ms": _told(seconds, "validate lens", scale=1e6 / lens_nodes),
        "run_us": _told(seconds, "run", "run nothing", "torch", scale=per_node),
        "torch_us": _told(seconds, "torch", scale=per_node),
    }


def _reads(model: Any, ids: list[int], folder: Path, config: LanguageConfig) -> dict[str, Any]:
    """The cost of one more saved read in a trace, here and in nnsight."""
    contenders: dict[str, Callable[[], object]] = {
        "ours every": lambda: read_layers(model, ids, every=True),
        "ours last": lambda: read_layers(model, ids, every=False),
    }
    peer: Peer | None = None
    answers: dict[str, dict[str, Any]] = {}
    try:
        peer = Peer(environment(), folder, "bench.language_peer") if config.with_peer else None
    except NoPeerError as error:
        print(f"without nnsight: {error}", file=sys.stderr)
    if peer is not None:
        for name, every in (("nnsight every", True), ("nnsight last", False)):

            def ask(name: str = name, every: bool = every) -> None:
                assert peer is not None
                answers[name] = peer.ask(ids=ids, every=every, threads=config.threads)

            contenders[name] = ask
    seconds = race(contenders, rounds=config.rounds, seed=config.seed)
    scale = 1e6 / (len(model.model.layers) - 1)
    figures: dict[str, Any] = {"read_us": _told(seconds, "ours every", "ours last", scale=scale)}
    figures["trace_ms"] = _told(seconds, "ours last", scale=1e3)
    figures["last_of_nnsight"] = answers.get("nnsight every", {}).get("last")
    if peer is not None:
        peer.close()
        figures["read_us_nnsight"] = _told(seconds, "nnsight every", "nnsight last", scale=scale)
        figures["trace_ms_nnsight"] = _told(seconds, "nnsight last", scale=1e3)
    return figures


def _told(seconds: Mapping[str, list[float]], what: str, *less: str, scale: float) -> dict[str, float]:
    """The median of what a contender takes beyond others in the same rounds, and its interval."""
    beyond = [
        scale * (own - sum(others)) for own, *others in zip(seconds[what], *(seconds[o] for o in less), strict=True)
    ]
    low, high = interval(beyond)
    return {"median": statistics.median(beyond), "low": low, "high": high}


def _chain(model: Any, nodes: int) -> Any:
    x = model.model.layers[0].output[:, -1]
    for _ in range(nodes):
        x = x + 0.001
    return x


def _record(model: Any, ids: list[int], nodes: int) -> Request:
    with model.trace([ids], run=False) as tracer:
        _chain(model, nodes).save()
    request: Request = tracer.request
    return request


def _record_lens(model: Any, ids: list[int], nodes: int) -> Request:
    """Reads, indices, arithmetic, a reduction and a save for each layer, again and again."""
    with model.trace([ids], run=False) as tracer:
        for layer in range(nodes // 8):
            hidden = model.model.layers[layer % len(model.model.layers)].output[0][:, -1]
            (hidden * 2.0 + 0.5).softmax(-1).max(-1).values.save()
    request: Request = tracer.request
    return request


def read_layers(model: Any, ids: list[int], *, every: bool) -> list[torch.Tensor]:
    """A trace that saves the outputs of every layer, or of the last."""
    saved = []
    with model.trace([ids]):
        for layer in model.model.layers if every else model.model.layers[-1:]:
            saved.append(layer.output.save())
    return saved


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every value was what it should be."""
    return bool(figures["largest_difference_to_plain"] <= TOLERANCE)


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""

    def show(name: str) -> str:
        one = figures[name]
        return f"{one['median']:.2f} ({one['low']:.2f} to {one['high']:.2f})"

    lines = [
        f"  recording a node: {show('record_us')} us in a chain, {show('record_lens_us')} us in a lens; aim 15",
        f"  checking 1,000 nodes: {show('validate_1000_ms')} ms, {show('validate_1000_lens_ms')} ms of a lens; aim 50",
        f"  running a node on a tiny tensor: {show('run_us')} us beside torch's {show('torch_us')}; aim 15",
        f"  one more saved read in a trace: {show('read_us')} us; a trace that reads one layer: {show('trace_ms')} ms",
    ]
    if "read_us_nnsight" in figures:
        lines.append(f"  nnsight: one more read {show('read_us_nnsight')} us; a trace {show('trace_ms_nnsight')} ms")
    lines.append(f"  off {figures['largest_difference_to_plain']:.1e}")
    return "what the language costs, beside arithmetic\n" + "\n".join(lines)


def config_for(folder: Path, *, quick: bool) -> LanguageConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    return LanguageConfig(rounds=6 if quick else 60)
