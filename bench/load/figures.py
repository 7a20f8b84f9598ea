"""Figures of a load: percentiles, goodput, users a pass, and shares received against shares due."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.load.clients import Sent
from bench.load.mixes import is_right
from bench.load.tenants import Tenant
from polytrace.certificate import Receipt
from polytrace.wire import decode_result

_PERCENTILES = (50, 90, 95, 99)


def figures(sent: Sequence[Sent], tenants: Sequence[Tenant], seconds: float, *, target_s: float) -> dict[str, Any]:
    """All of a run, as plain JSON. `target_s`: an answer that takes longer is no good one."""
    done = [one for one in sent if one.is_done]
    receipts = [decode_result(one.answer)[1] for one in done if one.answer is not None]
    keys = {tenant.name: tenant.key for tenant in tenants}
    wrong = sum(not is_right(one.ask, one.answer) for one in done if one.answer is not None)
    return {
        "seconds": seconds,
        "requests": len(sent),
        "done": len(done),
        "failed": sum(one.problem is not None for one in sent),
        "unanswered": sum(not one.is_done and one.problem is None for one in sent),
        "wrong": wrong,
        "refusals": sum(one.refusals for one in sent),
        "lost_calls": sum(one.losses for one in sent),
        "requests_per_s": len(done) / seconds,
        "goodput_per_s": sum(one.latency_s <= target_s for one in done) / seconds,
        "target_s": target_s,
        "latency_ms": percentiles(one.latency_s for one in done),
        "queue_ms": percentiles(receipt.queue_seconds for receipt in receipts),
        "run_ms": percentiles(receipt.run_seconds for receipt in receipts),
        **passes([(keys[one.tenant], receipt) for one, receipt in zip(done, receipts, strict=True)]),
        "tenants": {
            tenant.name: _tenant(tenant, [one for one in sent if one.tenant == tenant.name], seconds)
            for tenant in tenants
        },
    }


def percentiles(values: Iterable[float]) -> dict[str, float] | None:
    """Milliseconds."""
    array = np.fromiter(values, dtype=float)
    if not array.size:
        return None
    found = {f"p{percentile}": float(np.percentile(array, percentile) * 1e3) for percentile in _PERCENTILES}
    return found | {"max": float(array.max() * 1e3)}


def passes(receipts: Sequence[tuple[str | None, Receipt]]) -> dict[str, Any]:
    """How many passes, and how many requests shared one. Each receipt with its key: it tells of its tenant alone."""
    seen = {(entry.pass_id, key): entry for key, receipt in receipts for entry in receipt.passes}
    token_layers: dict[int, int] = defaultdict(int)
    for (pass_id, _), entry in seen.items():
        token_layers[pass_id] += sum(entry.layer_rows)
    count = len(token_layers)
    return {
        "passes": count,
        "largest_pass": max(token_layers.values(), default=0),  # token-layers
        "requests_per_pass": sum(entry.requests for entry in seen.values()) / count if count else 0.0,
        "token_layers": sum(receipt.token_layers for _, receipt in receipts),
    }


def served(sent: Sequence[Sent], tenants: Sequence[Tenant]) -> dict[str, list[tuple[float, float]]]:
    """By tenant: (when, token-layers charged up to then divided by its weight), at every end of a request."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for tenant in tenants:
        total, line = 0.0, [(0.0, 0.0)]
        own = [one for one in sent if one.tenant == tenant.name and one.is_done]
        for one in sorted(own, key=lambda one: one.ended or 0.0):
            assert one.answer is not None and one.ended is not None
            total += decode_result(one.answer)[1].price / tenant.weight
            line.append((one.ended, total))
        lines[tenant.name] = line
    return lines


def largest_gap(lines: Mapping[str, Sequence[tuple[float, float]]], *, until: float) -> float:
    """Of tenants that always have something waiting: the largest difference of what two of them were served."""
    times = sorted({at for line in lines.values() for at, _ in line if at <= until})
    steps: list[Callable[[float], float]] = [_step(line) for line in lines.values()]
    return max((max(step(at) for step in steps) - min(step(at) for step in steps) for at in times), default=0.0)


def _step(line: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    at = np.array([when for when, _ in line])
    total = [value for _, value in line]
    return lambda when: total[int(np.searchsorted(at, when, side="right")) - 1]


def _tenant(tenant: Tenant, own: Sequence[Sent], seconds: float) -> dict[str, Any]:
    done = [one for one in own if one.is_done]
    return {
        "requests": len(own),
        "done": len(done),
        "requests_per_s": len(done) / seconds,
        "latency_ms": percentiles(one.latency_s for one in done),
        "token_layers": sum(decode_result(one.answer)[1].token_layers for one in done if one.answer is not None),
    }
