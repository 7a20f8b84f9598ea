"""What tenants send: requests recorded once through the client, as the bytes that a service gets, with right answers.

Each was run alone in this process first and by hand on plain Hugging Face, so every answer of a service under load is
held against a known one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from bench.experiments import logit_lens, patching
from bench.jobs import Recorder
from bench.plain import TOLERANCE, Plain, difference
from bench.workloads import KINDS, choice
from engine.local import LocalBackend
from polytrace.certificate import Receipt
from polytrace.model import Model
from polytrace.wire import decode_result, encode_request

Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, ready to be sent."""

    experiment: str
    body: bytes
    right: Values
    ids: tuple[tuple[int, ...], ...]  # of a generation
    token_layers: int  # that it costs alone


def asks(folder: str, names: Sequence[str], *, variants: int = 32) -> dict[str, list[Ask]]:
    """By experiment, so many different requests of each. Raises ValueError for an unknown one, or a wrong answer."""
    if unknown := sorted(set(names) - EXPERIMENTS.keys()):
        raise ValueError(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    backend = LocalBackend(folder, threads=1)
    try:
        plain, recorder = Plain(folder), Recorder(backend)
        model: Any = Model(recorder)
        return {name: [_ask(name, model, recorder, plain, turn) for turn in range(variants)] for name in names}
    finally:
        backend.close()


def is_right(ask: Ask, answer: bytes | memoryview) -> bool:
    """Whether a result file has the values of the request run alone, to promise 1's tolerance for other rank counts."""
    raws, receipt = decode_result(answer)
    if raws.keys() != ask.right.keys() or _ids(receipt) != ask.ids:
        return False
    for name, raw in raws.items():
        value = torch.frombuffer(bytearray(raw.data), dtype=getattr(torch, raw.dtype)).view(raw.shape)
        if difference(value, ask.right[name]) > TOLERANCE:
            return False
    return True


def drawn(mix: Mapping[str, float], known: Mapping[str, Sequence[Ask]], rng: Random) -> Ask:
    """One of the mix, by weight."""
    name = rng.choices(list(mix), weights=list(mix.values()))[0]
    return rng.choice(known[name])


def _ask(name: str, model: Any, recorder: Recorder, plain: Plain, turn: int) -> Ask:
    EXPERIMENTS[name](model, plain, turn)
    request, result = recorder.seen[-1]
    body = b"".join(bytes(part) for part in encode_request(request))
    values = {key: torch.as_tensor(value) for key, value in result.values.items()}
    return Ask(
        experiment=name, body=body, right=values, ids=_ids(result.receipt), token_layers=result.receipt.token_layers
    )


def _ids(receipt: Receipt) -> tuple[tuple[int, ...], ...]:
    return tuple([generated.ids for generated in receipt.generated])


def _small(model: Any, plain: Plain, turn: int) -> None:
    kind, at = KINDS[turn % len(KINDS)], choice(turn, plain)
    _check(kind.name, kind.ask(model, at), kind.check(plain, at))


def _lens(model: Any, plain: Plain, turn: int) -> None:
    _check("lens", logit_lens.ask(model, turn).values, logit_lens.check(plain, turn))


def _sweep(model: Any, plain: Plain, turn: int) -> None:
    _check("sweep", patching.ask(model, turn).values, patching.check(plain, turn))


def _generation(model: Any, plain: Plain, turn: int) -> None:
    prompt = choice(turn, plain).prompt
    with model.generate(prompt, max_new_tokens=8, do_sample=False, eos=None) as tracer:
        pass
    theirs: Any = plain.model
    prompt_ids = torch.tensor([plain.ids(prompt)])
    whole = theirs.generate(prompt_ids, max_new_tokens=8, do_sample=False, eos_token_id=[])
    _check("generation", {"ids": torch.tensor(tracer.result.ids)}, {"ids": whole[0, prompt_ids.shape[1] :]})


def _check(name: str, ours: Values, theirs: Values) -> None:
    off = max(difference(ours[key], theirs[key]) for key in theirs)
    if off > TOLERANCE:
        raise ValueError(f"{name} is off from plain Hugging Face by {off:.1e}, more than {TOLERANCE:.0e}")


EXPERIMENTS = {"small": _small, "lens": _lens, "sweep": _sweep, "generation": _generation}
