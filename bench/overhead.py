"""What one trace costs over a bare forward, in one process: a read-only trace with nobody else on the model.

    python -m bench.run overhead

The trace reads one layer and the logits of the last token, so the whole model runs; the bare forward computes the head
for the last token alone too. Recording, checking, planning, running and handing back are all inside the trace's time.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import polytrace
from bench.plain import TOLERANCE, Plain, difference
from bench.race import interval, median_ms, race, ratio

_FACTOR, _ADDED_MS = 1.15, 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OverheadConfig:
    """One run of the benchmark."""

    folder: str
    tokens: tuple[int, ...] = (32, 128, 512)
    rounds: int = 100
    threads: int = 1
    seed: int = 0


def run(config: OverheadConfig) -> dict[str, Any]:
    """The figures, as plain JSON: a row for each length."""
    model = polytrace.load(config.folder, threads=config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = Plain(config.folder, device=device)
    torch.set_num_threads(config.threads)
    layer = len(model.model.layers) // 2
    rows = []
    for num_tokens in config.tokens:
        ids = random.Random(config.seed).choices(range(plain.model.config.vocab_size), k=num_tokens)
        bare, one, every = bare_forward(plain, ids), read_one_layer(model, ids, layer), read_every_layer(model, ids)
        seconds = race({"bare": bare, "bare again": bare, "one": one, "every": every}, rounds=config.rounds)
        hidden, logits = one()
        beyond_ms = [1e3 * (a - _FACTOR * b) for a, b in zip(seconds["one"], seconds["bare"], strict=True)]
        low, high = interval(beyond_ms)
        name = f"model.layers.{layer}"
        kept = plain.read(ids, outputs=[name])[name]
        rows.append(
            {
                "tokens": num_tokens,
                "trace / bare": asdict(ratio(seconds["one"], seconds["bare"])),
                "trace of every layer / bare": asdict(ratio(seconds["every"], seconds["bare"])),
                "bare again / bare": asdict(ratio(seconds["bare again"], seconds["bare"])),
                "beyond_1.15x_ms": {"median": statistics.median(beyond_ms), "low": low, "high": high},
                "median_ms": median_ms(seconds),
                "largest_difference_to_plain": max(difference(hidden, kept), difference(logits, bare())),
            }
        )
    return {"rows": rows, "aim": {"factor": _FACTOR, "added_ms": _ADDED_MS}, "allowed_difference": TOLERANCE}


def bare_forward(plain: Plain, ids: list[int]) -> Callable[[], torch.Tensor]:
    """The Hugging Face model alone: logits `[1, vocabulary]` of the last token."""
    batch = torch.tensor([ids], device=plain.device)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        logits: torch.Tensor = plain.model(input_ids=batch, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].cpu()  # waits for the device

    return forward


def read_one_layer(model: Any, ids: list[int], layer: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A trace that saves one layer's residual and the last token's logits."""

    def trace() -> tuple[torch.Tensor, torch.Tensor]:
        with model.trace([ids]):
            hidden = model.model.layers[layer].output[0].save()
            logits = model.lm_head.output[:, -1].save()
        return hidden, logits

    return trace


def read_every_layer(model: Any, ids: list[int]) -> Callable[[], list[torch.Tensor]]:
    """A trace that saves every layer's residual and the last token's logits."""

    def trace() -> list[torch.Tensor]:
        saved = []
        with model.trace([ids]):
            for layer in model.model.layers:
                saved.append(layer.output[0].save())
            saved.append(model.lm_head.output[:, -1].save())
        return saved

    return trace


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every value was what it should be."""
    return all(row["largest_difference_to_plain"] <= TOLERANCE for row in figures["rows"])


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = [f"one read-only trace; aim: at most {_FACTOR}x a bare forward + {_ADDED_MS:.0f} ms"]
    for row in figures["rows"]:
        ms = row["median_ms"]
        lines.append(
            f"  {row['tokens']} tokens: bare {ms['bare']:.2f} ms, trace {ms['one']:.2f} ms "
            f"({row['trace / bare']['median']:.2f}x), of every layer {ms['every']:.2f} ms; "
            f"beyond {_FACTOR}x: {row['beyond_1.15x_ms']['median']:+.2f} ms; "
            f"noise {row['bare again / bare']['median']:.3f}x; off {row['largest_difference_to_plain']:.1e}"
        )
    return "\n".join(lines)


def config_for(folder: Path, *, quick: bool) -> OverheadConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    return OverheadConfig(folder=str(folder), rounds=6 if quick else 100)
