"""What a request is told of those who shared its pass: of other tenants nothing, unless the deployment shares across.

A pass's entry would else say how many requests others run, with how many rows at which layers: how long their prompts
are, and where they read. What remains is time, which all in a pass share.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from polytrace.certificate import PassEntry
from scheduling.plan import NO_ROWS, Plan, RequestId


def own_entry(
    entry: PassEntry, plan: Plan, requests: Collection[RequestId], caches: Collection[RequestId], num_requests: int
) -> PassEntry:
    """The entry of a pass as one tenant's requests see it: `requests` are its members, `caches` the owners of the
    caches of its generations, `num_requests` how many it has there, those included whose rows only run ahead.
    """
    own = _segments(plan, requests, caches)
    num_layers = len(entry.layer_rows)
    rows, first = [0] * num_layers, 0
    for number in own:
        segment = plan.segments[number]
        spans = [max(0, stop - start) for start, stop in zip(segment.starts, segment.stops, strict=False)]
        first += sum(spans[:1])
        for layer, span in enumerate(spans[:num_layers]):
            rows[layer] += 0 if layer in segment.skips else span
    return replace(
        entry,
        requests=num_requests,
        tokens=first,
        layer_rows=tuple(own if all_ else 0 for own, all_ in zip(rows, entry.layer_rows, strict=True)),
    )


def _segments(plan: Plan, requests: Collection[RequestId], caches: Collection[RequestId]) -> set[int]:
    """Those of its members, of what runs ahead for it, and what these fork from."""
    found: set[int] = set()
    waiting = [
        segment
        for view in plan.views
        if plan.members[view.member].program.request in requests
        for segment in view.segments
    ]
    waiting += [grow.segment for grow in plan.grows if grow.trunk[0] in caches]
    while waiting:
        number = waiting.pop()
        if number == NO_ROWS or number in found:
            continue
        found.add(number)
        parent = plan.segments[number].parent
        if parent is not None:
            waiting.append(parent)
    return found
