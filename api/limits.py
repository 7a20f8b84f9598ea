"""What a tenant, and a deployment, may ask for: how much one request may take, and how much all of them together.

`TenantLimits` is JSON in `tenants.limits` and `deployments.limits`, and what POLYTRACE_LIMITS says holds for every
tenant that has none of its own. A request is held against its tenant's limits and its deployment's. Knows nothing of
how a request was priced (`Demand` are numbers) nor of what is used now (`api.quotas`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from polytrace.certificate import Certificate, LimitLine
from polytrace.codec import from_json, to_json
from polytrace.errors import UserError, WireError

# What one request takes, and is refused for by itself.
OF_ONE_REQUEST = ("request_bytes", "result_bytes", "token_layers", "passes", "tape_bytes")
# What all requests of a tenant take together.
OF_ALL = ("requests_in_flight", "tokens_a_day", "bytes_stored", "requests_a_minute", "starts_a_day")
ALL = (*OF_ONE_REQUEST, *OF_ALL)
# A deployment's own are for all tenants together; days and disks are counted by tenant.
OF_DEPLOYMENTS = (*OF_ONE_REQUEST, "requests_in_flight", "requests_a_minute")


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """None: the service's default, or no limit where that has none either."""

    requests_in_flight: int | None = None  # waiting or running, on all deployments
    tokens_a_day: int | None = None  # of sequences, UTC days
    bytes_stored: int | None = None  # results, contents and kept values together
    requests_a_minute: int | None = None  # so many at once, and as many more each minute
    starts_a_day: int | None = None  # of deployments that were not loaded (`api.starting`), UTC days
    request_bytes: int | None = None  # one request as a file
    result_bytes: int | None = None  # all saves of one request, those that stay on the service too
    token_layers: int | None = None  # of one request
    passes: int | None = None  # of one request, steps of generations too
    tape_bytes: int | None = None  # of one request, for gradients, on a shard

    def over(self, defaults: TenantLimits) -> TenantLimits:
        """These, and the defaults where they say nothing."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(defaults, **{name: limit for name, limit in own.items() if limit is not None})


UNLIMITED = TenantLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one request takes, as certified."""

    tokens: int = 0
    token_layers: int = 0
    passes: int = 0
    result_bytes: int = 0
    kept_bytes: int = 0
    moved_bytes: int = 0
    tape_bytes: int = 0
    shard_bytes: int = 0
    request_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """What it leaves on the service when it has ended."""
        return self.result_bytes + self.kept_bytes


NO_DEMAND = Demand()


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """All that a request is held against: its tenant's limits with the defaults, and its deployment's."""

    tenant: str
    model: str
    tenants: TenantLimits = UNLIMITED
    deployments: TenantLimits = UNLIMITED

    def lines(self, demand: Demand) -> Iterator[LimitLine]:
        """What one request takes by itself, against every limit of one request that there is."""
        for whose, limits in self.by_owner():
            for what in OF_ONE_REQUEST:
                limit = getattr(limits, what)
                if limit is not None:
                    yield LimitLine(what=what, needed=needed(demand, what), limit=limit, whose=whose)

    def by_owner(self) -> tuple[tuple[str, TenantLimits], tuple[str, TenantLimits]]:
        """Whose limits they are, in words, and the limits."""
        return (f"tenant {self.tenant}", self.tenants), (f"deployment {self.model}", self.deployments)

    def least(self, what: str, hard: int) -> tuple[int, str]:
        """The smallest limit of something, and whose it is; `hard` is what the deployment takes from anybody."""
        found = [(hard, "this deployment")]
        found += [(limit, whose) for whose, own in self.by_owner() if (limit := getattr(own, what)) is not None]
        return min(found, key=lambda entry: entry[0])


def needed(demand: Demand, what: str) -> int:
    """What a request takes of something that is limited."""
    if what == "result_bytes":
        return demand.stored_bytes
    return int(getattr(demand, what))


def demand_of(certificate: Certificate) -> Demand:
    return Demand(**{each.name: getattr(certificate, each.name) for each in fields(Demand)})


def limits_from_text(text: str | None, what: str) -> TenantLimits:
    """Limits as JSON. Raises UserError with what they are of when they are none."""
    try:
        return checked_limits(from_json(TenantLimits, json.loads(text or "{}")), what)
    except (ValueError, WireError) as error:
        raise UserError(f"{what} are {(text or '')[:200]!r}, which are no limits: {error}") from None


def checked_limits(limits: TenantLimits, what: str, known: tuple[str, ...] = ALL) -> TenantLimits:
    """The same. Raises UserError for a limit that is below 0, or that there is none of."""
    for each in fields(limits):
        limit = getattr(limits, each.name)
        if limit is not None and not 0 <= limit < 1 << 62:
            raise UserError(f"{what}: {each.name} is {limit}; it is 0 or more")
        if limit is not None and each.name not in known:
            raise UserError(f"{what}: {each.name} is a tenant's; a deployment has {', '.join(OF_DEPLOYMENTS)}")
    return limits


def text_of(limits: TenantLimits) -> str:
    """As JSON, without those that say nothing."""
    return json.dumps({name: limit for name, limit in to_json(limits).items() if limit is not None})
