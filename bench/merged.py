"""32 users' small requests merged into one pass, against one by one, against a plain forward with no interventions.

    python -m bench.run merged

Contenders, in one process on the same weights, taking turns in a shuffled order:
- `plain`: one batched Hugging Face forward of the same sequences, left-padded, no hooks (and again, as noise floor);
- `merged`: all requests added to the scheduler, then its loop until all have their results;
- `one by one`: the same requests through the same engine, each alone.
Requests are recorded and worked out beforehand, as a service does it at admission; that cost is reported apart.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.jobs import Job, Recorder, make_jobs, sequences
from bench.plain import TOLERANCE, Plain
from bench.race import median_ms, race, ratio
from engine.local import LocalBackend
from polytrace.model import Model
from scheduling.plan import Program, RequestId
from scheduling.scheduler import Outcome

_AIM = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedConfig:
    """One run of the benchmark."""

    folder: str
    num_users: int = 32
    rounds: int = 60
    threads: int = 1
    device: str = "cpu"


def run(config: MergedConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    backend = LocalBackend(config.folder, threads=config.threads, device=config.device)
    try:
        plain = Plain(config.folder, device=config.device)
        torch.set_num_threads(config.threads)
        recorder = Recorder(backend)
        jobs = make_jobs(Model(recorder), recorder, plain, num_users=config.num_users)
        start = time.perf_counter()
        programs = [backend.work_out(job.request) for job in jobs]
        admission_s = time.perf_counter() - start
        forward = plain_forward(plain, sequences(jobs))
        seconds = race(
            {
                "plain": forward,
                "plain again": forward,
                "merged": lambda: run_together(backend, programs),
                "one by one": lambda: run_one_by_one(backend, programs),
            },
            rounds=config.rounds,
        )
        merged = run_together(backend, programs)
        receipts = [outcome.receipt for outcome in merged if outcome.receipt is not None]
        return {
            "merged / plain": asdict(ratio(seconds["merged"], seconds["plain"])),
            "one by one / merged": asdict(ratio(seconds["one by one"], seconds["merged"])),
            "plain again / plain": asdict(ratio(seconds["plain again"], seconds["plain"])),
            "aim": {"merged / plain": _AIM},
            "median_ms": median_ms(seconds),
            "requests": len(jobs),
            "sequences": len(sequences(jobs)),
            "tokens": sum(len(sequence) for sequence in sequences(jobs)),
            "passes": len({entry.pass_id for receipt in receipts for entry in receipt.passes}),
            "admission_ms_per_request": 1e3 * admission_s / len(jobs),
            "correct": {
                "merged_is_alone_bit_for_bit": all(map(same_bits, jobs, (outcome.values for outcome in merged))),
                "largest_difference_to_plain": max(job.off for job in jobs),
                "allowed": TOLERANCE,
            },
        }
    finally:
        backend.close()


def run_together(backend: LocalBackend, programs: Sequence[Program]) -> list[Outcome]:
    """The outcomes of programs that share passes. Raises the first error."""
    outcomes = backend.run_together(list(map(again, programs)))
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return outcomes


def again(program: Program) -> Program:
    """The program as another request: each runs once."""
    request, chain = RequestId(secrets.token_hex(8)), program.chain
    if chain is not None:
        parts = tuple([dataclasses.replace(part, request=request) for part in chain.parts])
        chain = dataclasses.replace(chain, parts=parts)
    return dataclasses.replace(program, request=request, chain=chain)


def run_one_by_one(backend: LocalBackend, programs: Sequence[Program]) -> None:
    """Each program in passes of its own."""
    for program in programs:
        run_together(backend, [program])


def plain_forward(plain: Plain, rows: Sequence[Sequence[int]]) -> Callable[[], torch.Tensor]:
    """One left-padded batch of all rows through the Hugging Face model."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=plain.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=plain.device)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        logits: torch.Tensor = plain.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[:, -1].cpu()  # waits for the device

    return forward


def same_bits(job: Job, values: Mapping[str, Any]) -> bool:
    """Whether a request brought back in company what it brings back alone."""
    alone = job.alone.values
    return alone.keys() == values.keys() and all(
        torch.equal(torch.as_tensor(alone[name]), torch.as_tensor(values[name])) for name in alone
    )


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every value was what it should be."""
    correct = figures["correct"]
    return bool(correct["merged_is_alone_bit_for_bit"]) and correct["largest_difference_to_plain"] <= TOLERANCE


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""

    def shown(name: str) -> str:
        return "{median:.2f}x ({low:.2f} to {high:.2f})".format(**figures[name])

    correct = figures["correct"]
    return "\n".join(
        [
            f"{figures['requests']} requests, {figures['tokens']} tokens, {figures['passes']} passes merged",
            f"  merged against a plain forward: {shown('merged / plain')}; aim {_AIM}x",
            f"  one by one against merged:      {shown('one by one / merged')}",
            f"  noise floor (plain, twice):     {shown('plain again / plain')}",
            "  median ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in figures["median_ms"].items()),
            f"  merged has the bits of alone: {correct['merged_is_alone_bit_for_bit']}; "
            f"off from plain by {correct['largest_difference_to_plain']:.1e}",
        ]
    )


def config_for(folder: Path, *, quick: bool) -> MergedConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MergedConfig(folder=str(folder), rounds=6 if quick else 60, device=device)
