"""What `polytrace top` shows: two looks at `/metrics`, and what went on between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

MOST_TENANTS = 10

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Sample:
    """The figures at one time."""

    values: Mapping[tuple[str, Labels], float]
    at: float  # monotonic, seconds

    @classmethod
    def of(cls, text: str, at: float) -> Sample:
        """What a service told."""
        from prometheus_client.parser import text_string_to_metric_families

        found = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return cls(found, at)

    def sum(self, name: str, **labels: str) -> float:
        """All samples of a name with these labels together."""
        wanted = labels.items()
        return sum(value for (own, has), value in self.values.items() if own == name and wanted <= dict(has).items())

    def labels(self, name: str, label: str) -> list[str]:
        """The values that a label has."""
        return sorted({dict(has)[label] for own, has in self.values if own == name})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A deployment: what stands now, and rates a second."""

    model: str
    state: str
    ready: int  # replicas
    queued: int
    running: int
    oldest_s: float
    ended: float
    failed: float
    passes: float
    users_per_pass: float | None  # None: no pass ended meanwhile
    token_layers: float
    saved: float | None  # of what the requests would have taken alone


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRow:
    """A tenant: rates a second."""

    tenant: str
    requests: float
    token_layers: float
    moved_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """All of it."""

    seconds: float
    models: Sequence[ModelRow]
    tenants: Sequence[TenantRow]  # those that used most, of those that used any

    @classmethod
    def between(cls, before: Sample, after: Sample) -> Top:
        """What went on between two looks."""
        seconds = max(1e-6, after.at - before.at)

        def more(name: str, **labels: str) -> float:
            return max(0.0, after.sum(name, **labels) - before.sum(name, **labels))

        def model_row(model: str) -> ModelRow:
            states = after.labels("polytrace_deployment_state", "state")
            users = more("polytrace_pass_users_count", model=model)
            alone = more("polytrace_token_layers_alone_total", model=model)
            is_in = (one for one in states if after.sum("polytrace_deployment_state", model=model, state=one))
            return ModelRow(
                model=model,
                state=next(is_in, "unknown"),
                ready=int(after.sum("polytrace_replicas", model=model, state="ready")),
                queued=int(after.sum("polytrace_requests", model=model, state="queued")),
                running=int(after.sum("polytrace_requests", model=model, state="running")),
                oldest_s=after.sum("polytrace_queue_oldest_seconds", model=model),
                ended=more("polytrace_requests_ended_total", model=model) / seconds,
                failed=more("polytrace_requests_ended_total", model=model, state="failed") / seconds,
                passes=more("polytrace_passes_total", model=model) / seconds,
                users_per_pass=more("polytrace_pass_users_sum", model=model) / users if users else None,
                token_layers=more("polytrace_token_layers_total", model=model) / seconds,
                saved=more("polytrace_token_layers_saved_total", model=model) / alone if alone else None,
            )

        tenants = [
            TenantRow(
                tenant=tenant,
                requests=more("polytrace_tenant_requests_total", tenant=tenant) / seconds,
                token_layers=more("polytrace_tenant_token_layers_total", tenant=tenant) / seconds,
                moved_bytes=more("polytrace_tenant_moved_bytes_total", tenant=tenant) / seconds,
            )
            for tenant in after.labels("polytrace_tenant_requests_total", "tenant")
        ]
        used = sorted((one for one in tenants if one.requests), key=lambda one: -one.token_layers)
        models = [model_row(model) for model in after.labels("polytrace_deployment_state", "model")]
        return cls(seconds=seconds, models=models, tenants=used[:MOST_TENANTS])

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def rendered(top: Top) -> Group:
    """For a terminal."""
    from rich.console import Group
    from rich.table import Table

    models = Table(
        "model", "state", "ready", "queued", "running", "oldest", "ended/s", "failed/s", "passes/s", "users/pass",
        "token-layers/s", "saved",
    )  # fmt: skip
    for one in top.models:
        users = "" if one.users_per_pass is None else f"{one.users_per_pass:.1f}"
        saved = "" if one.saved is None else f"{one.saved:.0%}"
        models.add_row(
            one.model, one.state, str(one.ready), str(one.queued), str(one.running), f"{one.oldest_s:.0f} s",
            f"{one.ended:.1f}", f"{one.failed:.1f}", f"{one.passes:.1f}", users, f"{one.token_layers:.0f}", saved,
        )  # fmt: skip
    tenants = Table("tenant", "requests/s", "token-layers/s", "MB moved/s")
    for each in top.tenants:
        moved = f"{each.moved_bytes / 1e6:.2f}"
        tenants.add_row(each.tenant, f"{each.requests:.1f}", f"{each.token_layers:.0f}", moved)
    return Group(models, tenants) if top.tenants else Group(models)
