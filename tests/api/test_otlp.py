"""Traces as a collector over OTLP/HTTP gets them. Those of a whole service are in test_serve.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from collectors import Collector, about
from gateways import wait_until

from api.otlp import MAX_PASSES, Traces, traces
from api.store import Store
from cluster.requests import DeploymentState, Finished, PassFigures
from polytrace.errors import GraphError, UserError
from scheduling.plan import RequestId


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_a_request_is_a_trace_with_its_own_id(tmp_path: Path, collector: Collector) -> None:
    store = Store(tmp_path / "s")
    store.traces = Traces(collector.url, "controller")
    store.set_state("m", DeploymentState.READY, "ready")
    request = store.new_id()
    store.request_path(request).write_bytes(b"x")
    store.add(request, "m", b"[]", work=1, max_open=9)
    store.claim("m", 1)
    status = store.status(request)
    assert status is not None and status.started is not None
    store.finish([Finished(request=request, error=GraphError("it reads layer 96"), token_layers=12)])
    wait_until(lambda: len(collector.spans) == 4)
    store.close()

    assert collector.paths == {"/v1/traces"}
    assert {span.trace_id.hex() for span in collector.spans} == {request}
    spans = collector.trace(request)
    whole, queue, run, kept = (spans[name] for name in ("request", "queue", "run", "result"))
    assert {queue.parent_span_id, run.parent_span_id} == {whole.span_id} and kept.parent_span_id == run.span_id
    assert whole.start_time_unix_nano == queue.start_time_unix_nano == int(status.created * 1e9)
    assert queue.end_time_unix_nano == run.start_time_unix_nano == int(status.started * 1e9)
    assert run.end_time_unix_nano == whole.end_time_unix_nano >= run.start_time_unix_nano
    assert about(whole)["polytrace.model"] == "m" and about(whole)["polytrace.token_layers"] == 12
    assert about(whole)["polytrace.error"] == GraphError.code and whole.status.code == 2


def test_a_request_that_is_cancelled_before_it_runs_has_a_trace_without_a_run(
    tmp_path: Path, collector: Collector
) -> None:
    store = Store(tmp_path / "s")
    store.traces = Traces(collector.url, "gateway")
    store.set_state("m", DeploymentState.READY, "ready")
    request = store.new_id()
    store.request_path(request).write_bytes(b"x")
    store.add(request, "m", b"[]", work=1, max_open=9)
    store.cancel(request)
    store.close()
    assert set(collector.trace(request)) == {"request", "queue"}
    assert about(collector.trace(request)["request"])["polytrace.error"] == "cancelled"


def test_a_pass_is_linked_to_all_members_and_a_request_of_many_passes_shows_the_first_ones(
    collector: Collector,
) -> None:
    told = Traces(collector.url, "controller")
    members = tuple(RequestId(f"{number:032x}") for number in range(1, 301))
    told.tell_pass("m", PassFigures(requests=members, rows=600, seconds=0.5, busy_seconds=(0.5,)))
    for _ in range(MAX_PASSES + 9):
        told.tell_pass("m", PassFigures(requests=members[:1], rows=2, seconds=0.1, busy_seconds=(0.1,)))
    told.close()
    shared = [span for span in collector.spans if span.name == "shared pass"]
    first = next(span for span in shared if len(span.links) > 1)
    assert len(shared) == MAX_PASSES + 10 and len({span.trace_id for span in shared}) == len(shared)
    assert [link.trace_id.hex() for link in first.links] == list(members), "beyond the 128 that are usual"
    own = [span for span in collector.spans if span.name == "pass" and span.trace_id.hex() == members[0]]
    assert len(own) == MAX_PASSES
    assert own[0].links[0].span_id == first.span_id
    assert own[0].end_time_unix_nano - own[0].start_time_unix_nano == pytest.approx(0.5e9, rel=0.01)


def test_there_are_traces_where_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert traces("controller") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")
    with pytest.raises(UserError, match="'collector:4318' is no address of a collector"):
        traces("controller")
