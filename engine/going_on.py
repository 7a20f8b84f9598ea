"""Does a sequence go on from its model's own cache as if all of it ran again? Tried at load, where each runs alone.

Two sequences run whole, and then in steps from their caches, side by side; the logits must be the same but for
rounding. A model that fails this, or has no cache, runs all tokens of a sequence at every step (`engine.again`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.encoders import has_encoder, of_decoder
from engine.gate import Trial, root_segment
from engine.leaves import port_leaves
from engine.padded import PaddedRunner
from engine.relations import largest_gap
from engine.stage import PackedRows, StageRunner, Visit
from polytrace.errors import ServiceError
from polytrace.graph import Port
from scheduling.checks import CANNOT
from scheduling.plan import NOWHERE, PAGE, Grow, RequestId, Segment, TrunkId

# V = entries of the vocabulary, N = steps

_REQUEST = RequestId("gate")
_PROMPTS = (5, 11)  # tokens
_STEPS = 3
_ERRORS = (ServiceError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How sequences go on here."""

    note: str | None  # what a person should know of that
    can_generate: bool
    row_bytes: int  # of a cache, for each position and layer: what it has at any length is counted by the page


def check_caches(trial: Trial) -> Found:
    """Collective. From now on sequences go on as is found."""
    runner = trial.runner
    assert isinstance(runner, PaddedRunner), "packed rows have the engine's own caches"
    runner.runs_again = False
    careful = _Careful(runner, trial.probe.hidden_size)
    why, row_bytes = _tried(replace(trial, runner=careful), careful)
    if why is None:
        return Found(note=None, can_generate=True, row_bytes=row_bytes)
    if has_encoder(runner.model):
        return Found(note=f"{CANNOT}: {why}", can_generate=False, row_bytes=0)
    if trial.links.stages > 1:
        return Found(note=f"{CANNOT}: {why}; use stages=1", can_generate=False, row_bytes=0)
    runner.runs_again = True
    note = f"a sequence that generates runs all of its tokens again at every step: {why}"
    return Found(note=note, can_generate=True, row_bytes=0)


class _Careful(StageRunner):
    """Notes what a trial's forwards raise; later stages get zeros then, so that they do not wait for ever."""

    def __init__(self, runner: PaddedRunner, hidden_size: int) -> None:
        self.model, self.window = runner.model, runner.window
        self.error: str | None = None
        self._runner, self._hidden_size = runner, hidden_size

    def run(
        self, rows: PackedRows, hidden_1TD: Tensor | None, visits: list[Visit], *, stop_after: int | None
    ) -> Tensor | None:
        """As `PaddedRunner.run`."""
        try:
            return self._runner.run(rows, hidden_1TD, visits, stop_after=stop_after)
        except _ERRORS as error:
            self.error = self.error or str(error).split("\n")[0] or type(error).__name__
        num_rows = sum(len(segment.tokens) for segment in rows.streams.plan.segments)
        zeros = torch.zeros(1, num_rows, self._hidden_size, dtype=self.model.dtype, device=rows.streams.device)
        return None if self.window.is_last else zeros


def _tried(trial: Trial, careful: _Careful) -> tuple[str | None, int]:
    """Why a sequence does not go on from the model's own cache, and what a position of that takes."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = trial.probe.vocab_size
    tokens = [torch.randint(0, vocabulary, (length + _STEPS,), generator=generator).tolist() for length in _PROMPTS]
    expected = _whole(trial, tokens)
    try:
        found = _in_steps(trial, tokens)
        if careful.error is not None:
            return f"its cache does not serve ({careful.error})", 0
        row_bytes = _row_bytes(trial)
    finally:
        trial.store.forget(_REQUEST)
    for theirs, ours in zip(expected, found, strict=True):  # none, where the logits are on another stage
        scale = max(1.0, float(theirs.abs().max()))
        far = float((ours.float() - theirs.float()).abs().max()) / scale
        if not far <= largest_gap(theirs.dtype):  # NaN is no small gap
            return f"its own cache gives other logits, by {far:.2g} of the largest", row_bytes
    return None, row_bytes


def _row_bytes(trial: Trial) -> int:
    """Of the two caches: what a position adds, and of what they have at any length a page's part."""
    sizes = [trial.store.own_caches.of(_trunk(place)).num_bytes for place in range(len(_PROMPTS))]
    added = max(0, sizes[1] - sizes[0]) / (_PROMPTS[1] - _PROMPTS[0])
    always = max(0.0, sizes[0] - added * (_PROMPTS[0] + _STEPS))
    window = trial.runner.window
    return math.ceil((added + always / PAGE) / (window.stop - window.first))


def _whole(trial: Trial, tokens: Sequence[list[int]]) -> list[Tensor]:
    """`[N, V]` of each sequence's last tokens."""
    model: Any = trial.runner.model
    if has_encoder(model):
        found = []
        for own, length in zip(tokens, _PROMPTS, strict=True):
            prompt, decoded = (torch.tensor([part], device=trial.device) for part in (own[:length], own[length - 1 :]))
            decoded[0, 0] = model.config.decoder_start_token_id
            with torch.no_grad():
                answer = model(input_ids=prompt, use_cache=False, **of_decoder(model, decoded))
            found.append(answer["logits"][0, -_STEPS:])
        return found
    seen = _logits(trial, [root_segment(own, trial.probe.layout.num_layers) for own in tokens], ())
    if seen is None:
        return []
    return [part[-_STEPS:] for part in seen.split([len(own) for own in tokens])]


def _in_steps(trial: Trial, tokens: Sequence[list[int]]) -> list[Tensor]:
    """The same of sequences that go on from their caches."""
    num_layers = trial.probe.layout.num_layers
    prompts = [root_segment(own[:length], num_layers) for own, length in zip(tokens, _PROMPTS, strict=True)]
    grows = [_grow(place, place, 0, length) for place, length in enumerate(_PROMPTS)]
    _logits(trial, prompts, grows)
    steps: list[Tensor] = []
    for step in range(_STEPS):
        segments: list[Segment] = []
        grows = []
        for place, (own, length) in enumerate(zip(tokens, _PROMPTS, strict=True)):
            begin = length + step
            trunk = root_segment([0] * begin, num_layers)
            segments.append(replace(trunk, trunk=_trunk(place), outputs=(NOWHERE,) * num_layers, head=(), tokens=()))
            grows.append(_grow(place, len(segments), begin, begin + 1))
            row = root_segment(own[begin : begin + 1], num_layers)
            starts, stops = (begin,) * (num_layers + 1), (begin + 1,) * num_layers
            parent = len(segments) - 1
            segments.append(replace(row, parent=parent, starts=starts, stops=stops, head=(begin,)))
        seen = _logits(trial, segments, grows)
        if seen is not None:
            steps.append(seen)
    return [torch.stack([step[place] for step in steps]) for place in range(len(tokens))] if steps else []


def _logits(trial: Trial, segments: Sequence[Segment], grows: Sequence[Grow]) -> Tensor | None:
    """`[rows, V]` of a pass, on the stage that has them."""
    seen: dict[str, Tensor] = {}

    def look(value: Any) -> Any:
        leaves: Mapping[Any, Tensor] = port_leaves(value)[1]
        own = next((leaves[selector] for selector in (("logits",), (), (0,)) if selector in leaves), None)
        if own is not None:
            seen["logits"] = own[0].clone()
        return value

    root = [site for site in trial.probe.sites if (site.module, site.port) == ("", Port.OUTPUT)]
    trial.run(list(segments), lambda _site, _streams: look, has_operations=False, sites=root, grows=grows)
    return seen.get("logits")


def _trunk(place: int) -> TrunkId:
    return _REQUEST, -1 - place


def _grow(place: int, segment: int, start: int, stop: int) -> Grow:
    return Grow(trunk=_trunk(place), segment=segment, begin=0, start=start, stop=stop, capacity=PAGE)
