"""The service in Prometheus' words: what its processes counted (`api.figures`), and how its store stands now.

Counts are the gateway's own and those of the controller's file, added up; they go on over restarts. What stands in the
database is looked up when somebody asks, at most once a LOOK_S. While the database is away only `polytrace_database_up`
says so, and the counts stay.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from api.away import AwayError
from api.figures import COUNTERS, HISTOGRAMS
from api.store import Store
from api.tally import Tally
from cluster.requests import DeploymentState
from polytrace.program import __version__

LOOK_S = 2.0
MAX_TENANTS = 100  # with figures of their own
OTHERS = "other"  # all tenants beyond: no name of a tenant's could be in the way, as it has the label's place alone

_USED = (
    ("requests", "Requests that have ended."),
    ("failed", "Of those, the failed and cancelled ones."),
    ("tokens", "Tokens."),
    ("token_layers", "Token-layers: what is charged first of all."),
    ("moved_bytes", "Bytes that were carried, gathered, returned and kept."),
    ("result_bytes", "Bytes of results."),
    ("run_seconds", "Seconds that requests ran."),
)


class Metrics(Collector):
    """Writes `/metrics`. Any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._lock = threading.Lock()
        self._looked: list[Metric] = []
        self._until = 0.0

    def text(self) -> bytes:
        """All of them, in the text format 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._counted()
        with self._lock:
            if time.monotonic() >= self._until:
                self._looked = list(self._stands())
                self._until = time.monotonic() + LOOK_S
            looked = self._looked
        yield from looked

    # --- inside

    def _counted(self) -> Iterator[Metric]:
        both = Tally(None)
        self._store.tally.save()  # what is told once is never taken back
        both.add(self._store.tally)
        both.add_file(self._store.counts_path("controller"))
        for what in COUNTERS:
            counter = CounterMetricFamily(what.name, what.help, labels=what.labels)
            for labels, value in sorted(both.counts(what).items()):
                counter.add_metric(labels, value)
            yield counter
        for spread in HISTOGRAMS:
            histogram = HistogramMetricFamily(spread.name, spread.help, labels=spread.labels)
            for labels, (total, below) in sorted(both.spreads(spread).items()):
                names = [*(str(bucket) for bucket in spread.buckets), "+Inf"]
                histogram.add_metric(labels, list(zip(names, below, strict=True)), total)
            yield histogram

    def _stands(self) -> Iterator[Metric]:
        yield _gauge("polytrace_build", "The service's version.", {(__version__,): 1}, ("version",))
        free = shutil.disk_usage(self._store.folder).free
        yield _gauge("polytrace_store_free_bytes", "Free bytes where the store's folder is.", {(): free})
        up = 1
        found: list[Metric] = []
        for look in (self._requests, self._deployments, self._tenants):
            try:
                found += look()
            except AwayError:
                up = 0
        yield from found
        yield _gauge("polytrace_database_up", "Whether the database answers.", {(): up})

    def _requests(self) -> list[Metric]:
        rows = self._store.database.rows(
            "SELECT model, state, is_interactive, count(*), min(created) FROM requests "
            "WHERE state IN ('queued', 'running') GROUP BY model, state, is_interactive"
        )
        now = self._store.now()
        number: dict[tuple[str, ...], float] = {}
        oldest: dict[tuple[str, ...], float] = {}
        for model, state, is_interactive, count, created in rows:
            number[model, state, "interactive" if is_interactive else "batch"] = int(count)
            if state == "queued":
                oldest[model,] = max(oldest.get((model,), 0.0), now - created)
        for known in self._store.deployments():  # a queue that is empty is told as 0: a rule can look at it
            for state in ("queued", "running"):
                for kind in ("interactive", "batch"):
                    number.setdefault((known.model, state, kind), 0)
            oldest.setdefault((known.model,), 0.0)
        return [
            _gauge("polytrace_requests", "Requests that wait and run.", number, ("model", "state", "class")),
            _gauge("polytrace_queue_oldest_seconds", "Age of the oldest waiting request.", oldest, ("model",)),
        ]

    def _deployments(self) -> list[Metric]:
        states: dict[tuple[str, ...], float] = {}
        replicas: dict[tuple[str, ...], float] = {}
        for known in self._store.deployments():
            for state in DeploymentState:
                states[known.model, state.value] = float(known.state is state)
                replicas[known.model, state.value] = sum(one.state is state for one in known.replicas)
        labels = ("model", "state")
        return [
            _gauge("polytrace_deployment_state", "1 for the state that a deployment is in.", states, labels),
            _gauge("polytrace_replicas", "Replicas of a deployment in each state.", replicas, labels),
        ]

    def _tenants(self) -> list[Metric]:
        sums = ", ".join(f"sum({name})" for name, _ in _USED)
        # in the order of their first day, so that nobody moves between a name and the others and counts shrink
        rows = self._store.database.rows(f"SELECT tenant, {sums} FROM usage GROUP BY tenant ORDER BY min(day), tenant")
        used: dict[str, list[float]] = {}
        for place, (tenant, *values) in enumerate(rows):
            own = used.setdefault(tenant if place < MAX_TENANTS else OTHERS, [0.0] * len(_USED))
            own[:] = [a + float(b) for a, b in zip(own, values, strict=True)]
        found: list[Metric] = []
        for column, (name, help_) in enumerate(_USED):
            counter = CounterMetricFamily(f"polytrace_tenant_{name}", f"Of each tenant: {help_}", labels=("tenant",))
            for tenant, values in used.items():
                counter.add_metric((tenant,), values[column])
            found.append(counter)
        return found


def _gauge(name: str, help_: str, values: dict[tuple[str, ...], float], labels: tuple[str, ...] = ()) -> Metric:
    gauge = GaugeMetricFamily(name, help_, labels=labels)
    for each, value in sorted(values.items()):
        gauge.add_metric(each, value)
    return gauge
