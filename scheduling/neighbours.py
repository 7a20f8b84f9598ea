"""What a request is told of those who shared its pass: of other tenants nothing, unless the deployment shares across.

A pass's entry would else say how many requests others run, with how many rows at which layers: how long their prompts
are, and where they read. What remains is time, which all in a pass share.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from polytrace.certificate import PassEntry
from scheduling.jobs import Job
from scheduling.plan import NO_ROWS, Plan, RequestId
from scheduling.rows import rows_by_layer, skipped_by_layer


def entries_of_tenants(entry: PassEntry, plan: Plan, jobs: Sequence[Job], *, is_of_all: bool) -> dict[str, PassEntry]:
    """What each tenant hears of a pass that these were in; `is_of_all`: all hear of all."""
    by_tenant: dict[str, list[Job]] = {}
    for job in jobs:
        by_tenant.setdefault(job.tenant, []).append(job)
    if len(by_tenant) < 2 or is_of_all:
        return dict.fromkeys(by_tenant, entry)
    found = {}
    for tenant, theirs in by_tenant.items():
        requests = {job.program.request for job in theirs}
        generating = [job.generating for job in theirs if job.generating is not None]
        caches = {cache.trunk[0] for one in generating for cache in one.caches}
        found[tenant] = _own_entry(entry, plan, requests, caches, len(theirs))
    return found


def _own_entry(
    entry: PassEntry, plan: Plan, requests: Collection[RequestId], caches: Collection[RequestId], num_requests: int
) -> PassEntry:
    """The entry of a pass as one tenant's requests see it: `requests` are its members, `caches` the owners of the
    caches of its generations, `num_requests` how many it has there, those included whose rows only run ahead.
    """
    num_layers = len(entry.layer_rows)
    own = [plan.segments[number] for number in _segments(plan, requests, caches)]
    there = rows_by_layer(own, num_layers)
    around = skipped_by_layer(own, num_layers)
    return replace(
        entry,
        requests=num_requests,
        tokens=sum(there[:1]),
        layer_rows=tuple(
            rows - less if all_ else 0 for rows, less, all_ in zip(there, around, entry.layer_rows, strict=True)
        ),
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
