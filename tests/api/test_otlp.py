"""Traces as a collector over OTLP/HTTP gets them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from gateways import wait_until
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from api.otlp import Traces, traces
from api.store import Store
from cluster.requests import DeploymentState, Finished
from polytrace.errors import GraphError, UserError


class Collector:
    """Takes what is sent to /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.paths: set[str] = set()
        spans, paths = self.spans, self.paths

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
                paths.add(self.path)
                for group in ExportTraceServiceRequest.FromString(data).resource_spans:
                    for scope in group.scope_spans:
                        spans.extend(scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


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
    wait_until(lambda: len(collector.spans) == 3)
    store.close()

    assert collector.paths == {"/v1/traces"}
    assert {span.trace_id.hex() for span in collector.spans} == {request}
    spans = {span.name: span for span in collector.spans}
    whole, queue, run = spans["request"], spans["queue"], spans["run"]
    assert whole.parent_span_id == b"" and {queue.parent_span_id, run.parent_span_id} == {whole.span_id}
    assert whole.start_time_unix_nano == queue.start_time_unix_nano == int(status.created * 1e9)
    assert queue.end_time_unix_nano == run.start_time_unix_nano == int(status.started * 1e9)
    assert run.end_time_unix_nano == whole.end_time_unix_nano >= run.start_time_unix_nano
    about = {one.key: one.value.string_value or one.value.int_value for one in whole.attributes}
    assert about["polytrace.model"] == "m" and about["polytrace.token_layers"] == 12
    assert about["polytrace.error"] == GraphError.code and whole.status.code == 2


def test_there_are_traces_where_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert traces("controller") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")
    with pytest.raises(UserError, match="'collector:4318' is no address of a collector"):
        traces("controller")
