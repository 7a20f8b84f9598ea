"""Time between the tokens of running requests while a long prompt arrives among them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from bench.generation.ours import Ours, Watch, tokens_of
from bench.merged import again
from scheduling.plan import Program

_LEAST_BEFORE = 8  # tokens of each running request until the long prompt comes


def arrival(ours: Ours, running: Sequence[Program], arriving: Program, *, rounds: int) -> dict[str, Any]:
    """Milliseconds between tokens before it comes and until its first token, and what that takes; medians of rounds."""
    alone = ours.one_by_one([*running, arriving])
    _round(ours, running, arriving)
    found = [_round(ours, running, arriving) for _ in range(rounds)]
    return {
        "running": len(running),
        "prompt": sum(map(len, arriving.invokes[0].sequences)),
        "ms_between_tokens_before": _median(found, "before"),
        "ms_between_tokens_meanwhile": _median(found, "meanwhile"),
        "longest_ms_meanwhile": _median(found, "longest"),
        "ms_to_first_token_of_the_long_one": _median(found, "first"),
        "tokens_are_as_alone": all(one["tokens"] == alone for one in found),
    }


def _median(found: Sequence[dict[str, Any]], name: str) -> float:
    return float(statistics.median(one[name] for one in found))


def _round(ours: Ours, running: Sequence[Program], arriving: Program) -> dict[str, Any]:
    running = [again(program) for program in running]
    arriving = again(arriving)
    watch = Watch(ours.backend)
    for program in running:
        watch.add(program)
    while min(len(watch.came_s[program.request]) for program in running) < _LEAST_BEFORE:
        watch.turn()
    came = time.perf_counter()
    watch.add(arriving)
    while len(watch.outcomes) < len(running) + 1:
        watch.turn()
    first = watch.came_s[arriving.request][0]
    before, meanwhile = [], []
    for program in running:
        for start, stop in pairwise(watch.came_s[program.request]):
            if stop <= came:
                before.append(1e3 * (stop - start))
            elif start < first:
                meanwhile.append(1e3 * (stop - start))
    return {
        "before": statistics.median(before),
        "meanwhile": statistics.median(meanwhile),
        "longest": max(meanwhile),
        "first": 1e3 * (first - came),
        "tokens": [ids for program in (*running, arriving) for ids in tokens_of(watch.outcomes[program.request])],
    }
