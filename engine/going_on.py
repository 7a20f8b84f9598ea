"""Does a sequence go on from its model's own cache as if all of it ran again? Tried at load, where each runs alone.

Two sequences run whole, and then in steps from their caches, side by side; the logits must be the same but for
rounding. A model that fails this, or has no cache, runs all tokens of a sequence at every step (`engine.again`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.encoders import has_encoder, of_decoder
from engine.gate import Trial, root_segment
from engine.leaves import port_leaves
from engine.padded import PaddedRunner
from polytrace.errors import ServiceError
from polytrace.graph import Port
from scheduling.plan import NOWHERE, PAGE, Grow, RequestId, Segment, TrunkId

# V = entries of the vocabulary, N = steps

_REQUEST = RequestId("gate")
_PROMPTS = (5, 11)  # tokens
_STEPS = 3
_FAR = 1e-3  # of the largest logit


def check_caches(trial: Trial) -> tuple[str, ...]:
    """Collective. Sets how sequences go on from now on; what a person should know of that."""
    runner = trial.runner
    assert isinstance(runner, PaddedRunner), "packed rows have the engine's own caches"
    runner.runs_again, runner.why_alone = False, None
    why = _why_not(trial)
    if why is None:
        return ()
    if trial.links.stages > 1 or has_encoder(runner.model):
        runner.why_alone = f"{trial.probe.class_name} cannot generate here: {why}; use stages=1"
        return (runner.why_alone,)
    runner.runs_again = True
    return (f"a sequence that generates runs all of its tokens again at every step: {why}",)


def _why_not(trial: Trial) -> str | None:
    generator = torch.Generator().manual_seed(2)
    vocabulary = trial.probe.vocab_size
    tokens = [torch.randint(0, vocabulary, (length + _STEPS,), generator=generator).tolist() for length in _PROMPTS]
    expected = _whole(trial, tokens)
    try:
        found = _in_steps(trial, tokens)
    except (ServiceError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"its cache does not serve ({str(error).splitlines()[0]})"
    finally:
        trial.store.forget(_REQUEST)
    if not expected:
        return None  # the logits are on another stage
    far = 0.0
    for theirs, ours in zip(expected, found, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        far = max(far, float((ours.float() - theirs.float()).abs().max()) / scale)
    limit = max(_FAR, 8 * torch.finfo(expected[0].dtype).eps)
    return None if far <= limit else f"its own cache gives other logits, by {far:.2g} of the largest"


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
