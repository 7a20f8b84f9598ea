"""Whole-model runs with hooks, batched by hand: every sequence goes through every layer, padded on the left.

With a batch of one this is one run each. Sources of patches are read beforehand and not timed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from bench.cones.hooks import Batch, Sources, Values
from bench.cones.workloads import Run, Workload
from bench.plain import Plain


@torch.inference_mode()
def run_batched(plain: Plain, workload: Workload, members: Sequence[int], sources: Sources, *, rows: int) -> Values:
    """What the members give back. `rows`: tokens of a batch, pads included; a single run may have more."""
    values: Values = {}
    runs = workload.runs
    for chosen in batches(runs, members, rows=rows):
        longest = max(len(runs[member].ids) for member in chosen)
        pads = [longest - len(runs[member].ids) for member in chosen]
        ids = torch.tensor([[0] * pad + list(runs[member].ids) for pad, member in zip(pads, chosen, strict=True)])
        mask = None
        if any(pads):
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        batch = Batch(plain, workload, chosen, pads)
        with batch.hooks(sources):
            logits = plain.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        batch.take_logits(logits[:, -1])
        batch.take_lenses()
        values |= batch.values
    return values


def batches(runs: Sequence[Run], members: Sequence[int], *, rows: int) -> Iterator[list[int]]:
    """Members of like length, as many as `rows` padded tokens hold."""
    chosen: list[int] = []
    for member in sorted(members, key=lambda member: len(runs[member].ids)):
        if chosen and (len(chosen) + 1) * len(runs[member].ids) > rows:
            yield chosen
            chosen = []
        chosen.append(member)
    if chosen:
        yield chosen


@torch.inference_mode()
def best_rows(plain: Plain, tokens: int, candidates: Sequence[int]) -> tuple[int, dict[int, float]]:
    """The tokens of a batch with which whole-model runs are fastest, and milliseconds a run of each candidate.

    The smallest that is within 3 % of the fastest: it is kinder to caches that the hooks share.
    """
    took: dict[int, float] = {}
    for rows in candidates:
        ids = torch.zeros(max(1, rows // tokens), tokens, dtype=torch.long)
        if not took:
            plain.model(input_ids=ids, use_cache=False)
        start = time.perf_counter()
        plain.model(input_ids=ids, use_cache=False)
        took[rows] = 1e3 * (time.perf_counter() - start) / len(ids)
    fastest = min(took.values())
    return next(rows for rows, ms in took.items() if ms <= 1.03 * fastest), took
