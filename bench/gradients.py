"""What gradients cost: attribution patching's backward over prompts, merged and one by one, beside plain autograd.

    python -m bench.run gradients

Every prompt's user asks for the gradient of its answer's logit with regard to what all heads of all layers found, as
attribution patching does. Ours run one by one and merged into one pass; plain Hugging Face runs one by one and, since
all prompts are equally long here, as one batched call with hooks. The same traces without gradients tell what the way
back costs. What a request keeps is measured beside its certificate.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polytrace
from bench.cones.models import folder_of
from bench.plain import TOLERANCE, Plain, difference
from bench.race import interval, race
from engine.heap import trim
from polytrace.graph import (
    Request,
    Save,
)

_AT_ONCE = "merged"


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientsConfig:
    """One run of the benchmark."""

    model: str = "8x512"
    prompts: int = 32
    tokens: int = 64
    rounds: int = 3
    threads: int = 2
    seed: int = 0


def config_for(folder: Path, *, quick: bool) -> GradientsConfig:
    """`folder` is not used: the model is one of random weights, of a size that attribution is done on a laptop."""
    config = GradientsConfig()
    return replace(config, model="48x32", prompts=4, tokens=16, rounds=1) if quick else config


def run(config: GradientsConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    torch.set_num_threads(config.threads)
    folder = folder_of(config.model)
    model = polytrace.load(str(folder), threads=config.threads)
    backend: Any = model.backend
    draw = random.Random(config.seed)
    vocabulary = model.description.vocab_size
    prompts = [draw.choices(range(vocabulary), k=config.tokens) for _ in range(config.prompts)]
    answers = draw.choices(range(vocabulary), k=config.prompts)
    plain = Plain(str(folder))
    plain.model.requires_grad_(False)
    users = list(zip(prompts, answers, strict=True))
    found: dict[str, list[Tensor]] = {}

    def ours(name: str, requests: Sequence[Request], *, at_once: bool) -> Callable[[], None]:
        parts = [list(requests)] if at_once else [[request] for request in requests]

        def once() -> None:
            outcomes = [one for part in parts for one in backend.run_together([backend.work_out(r) for r in part])]
            found[name] = []
            for request, outcome in zip(requests, outcomes, strict=True):
                if outcome.error is not None:
                    raise outcome.error
                saves = [node.name for node in request.graph.nodes if isinstance(node, Save)]
                found[name].append(torch.stack([outcome.values[one] for one in saves]))

        return once

    graded = [_record(model, prompt, answer, is_graded=True) for prompt, answer in users]
    looks = [_record(model, prompt, answer, is_graded=False) for prompt, answer in users]
    whole = [_record(model, prompts, answers, is_graded=True)]

    def by_hand(name: str, parts: Sequence[tuple[list[list[int]], list[int]]]) -> Callable[[], None]:
        def once() -> None:
            found[name] = [_by_hand(plain.model, own, wanted) for own, wanted in parts]

        return once

    seconds = race(
        {
            "one by one": ours("one by one", graded, at_once=False),
            _AT_ONCE: ours(_AT_ONCE, graded, at_once=True),
            "one request": ours("one request", whole, at_once=True),
            "merged, no gradients": ours("merged, no gradients", looks, at_once=True),
            "plain one by one": by_hand("plain one by one", [([prompt], [answer]) for prompt, answer in users]),
            "plain batched": by_hand("plain batched", [(prompts, answers)]),
        },
        rounds=config.rounds,
        seed=config.seed,
    )
    expected = torch.cat(found["plain one by one"], 1)
    off = {
        name: difference(torch.cat(found[name], 1), expected)
        for name in ("one by one", _AT_ONCE, "one request", "plain batched")
    }
    is_same = all(map(torch.equal, found["one by one"], found[_AT_ONCE]))
    kept = _kept(backend, whole[0])
    return {
        "seconds": {name: statistics.median(own) for name, own in seconds.items()},
        "merged_to_one_by_one": _ratio(seconds, "one by one", _AT_ONCE),
        "merged_to_plain_one_by_one": _ratio(seconds, "plain one by one", _AT_ONCE),
        "merged_to_plain_batched": _ratio(seconds, "plain batched", _AT_ONCE),
        "one_request_to_plain_batched": _ratio(seconds, "plain batched", "one request"),
        "one_by_one_to_plain_one_by_one": _ratio(seconds, "plain one by one", "one by one"),
        "gradient_to_forward": _ratio(seconds, _AT_ONCE, "merged, no gradients"),
        "merged_has_the_bits_of_one_by_one": is_same,
        "largest_gradient": expected.abs().max().item(),
        "difference_to_plain": off,
        "allowed_difference": TOLERANCE,
        "certificate_tape_mib": kept[0] / 2**20,
        "peak_of_the_process_mib": kept[1] / 2**20,
    }


def is_right(figures: dict[str, Any]) -> bool:
    """Whether all gradients are those of plain autograd, and merging changed no bit."""
    is_close = max(figures["difference_to_plain"].values()) <= figures["allowed_difference"]
    return bool(is_close and figures["merged_has_the_bits_of_one_by_one"] and figures["largest_gradient"] > 0)


def tell(figures: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{name:24}{seconds:8.3f} s" for name, seconds in figures["seconds"].items()]
    for name in (
        "merged_to_one_by_one",
        "merged_to_plain_one_by_one",
        "merged_to_plain_batched",
        "one_request_to_plain_batched",
        "one_by_one_to_plain_one_by_one",
        "gradient_to_forward",
    ):
        ratio = figures[name]
        lines.append(f"{name.replace('_', ' '):34}{ratio['median']:6.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
    lines.append(
        f"kept for the way back: {figures['certificate_tape_mib']:.0f} MiB by the certificate; the process grew by "
        f"{figures['peak_of_the_process_mib']:.0f} MiB at its peak"
    )
    return "\n".join(lines)


def _record(model: Any, prompts: Any, answers: Any, *, is_graded: bool) -> Request:
    many = isinstance(answers, list)
    with model.trace(prompts if many else [prompts], run=False) as tracer:
        heads = [layer.self_attn.o_proj.input for layer in model.model.layers]
        logits = model.lm_head.output[:, -1]
        right = logits[list(range(len(answers))), answers] if many else logits[:, answers]
        if is_graded:
            with right.sum().backward():
                for one in heads:
                    one.grad.save()
        else:
            for one in heads:
                one.save()  # the last layer is run for that
    request: Request = tracer.built_request()
    return request


def _by_hand(model: Any, prompts: list[list[int]], answers: list[int]) -> Tensor:
    """`[layers, prompts, tokens, features]`: the gradients, by hooks and one call."""
    seen: list[Tensor] = []

    def keep(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(args[0] if args[0].requires_grad else args[0].detach().requires_grad_())
        return (seen[-1],)

    handles = [layer.self_attn.o_proj.register_forward_pre_hook(keep) for layer in model.model.layers]
    try:
        logits = model(input_ids=torch.tensor(prompts), use_cache=False, logits_to_keep=1).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(torch.autograd.grad(logits[range(len(answers)), answers].sum(), seen))


def _kept(backend: Any, request: Request) -> tuple[int, int]:
    """Bytes by the certificate, and by how much the process grew while the request ran."""
    certificate = backend.validate(request)
    program = backend.work_out(request)
    gc.collect()
    trim()  # else what others have left is used again, and nothing seems to be taken
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    backend.run_together([program])
    return certificate.tape_bytes, max(0, _memory("VmHWM") - before)


def _memory(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def _ratio(seconds: dict[str, list[float]], longer: str, shorter: str) -> dict[str, float]:
    """How many times faster the second is, from pairs of one round."""
    pairs = [a / b for a, b in zip(seconds[longer], seconds[shorter], strict=True)]
    low, high = interval(pairs)
    return {"median": statistics.median(pairs), "low": low, "high": high}
