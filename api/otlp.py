"""OpenTelemetry traces of requests, sent to a collector over OTLP/HTTP when an operator names one.

A request is one trace: the span `request`, and below it `queue` and `run`. They are made when it has ended, from the
times that the store keeps anyway, so a request on its way costs nothing, and a collector that is away holds nobody up:
spans wait in memory, a bounded number of them, and are dropped beyond it. The trace's id is the request's own: whoever
has the one finds the other. Needs the extra `telemetry`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from api.settings import from_environment
from polytrace.errors import UserError

if TYPE_CHECKING:
    from api.telling import Ended

_NS = 1_000_000_000
_SEND_S = 1.0  # between two sendings
_TIMEOUT_S = 5.0  # of one


class Traces:
    """Sends spans from a thread of its own; `tell` may be called from any thread."""

    def __init__(self, url: str, role: str) -> None:
        """`url`: of the collector, to which `/v1/traces` is added. Raises UserError when it is none, or without the
        extra.
        """
        check_url(url)
        self._ids = threading.local()
        self._provider = _provider(f"{url.rstrip('/')}/v1/traces", role, self._ids)

    def tell(self, ended: Ended, now: float) -> None:
        """A request has ended. Returns at once."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        end, error = ended.end, ended.end.error
        accepted, over = int(ended.created * _NS), int(max(now, ended.created) * _NS)
        begun = over if ended.started is None else min(over, max(accepted, int(ended.started * _NS)))
        tracer = self._provider.get_tracer("polytrace")
        self._ids.trace = int(end.request, 16)
        about: dict[str, str | int] = {
            "polytrace.request": end.request,
            "polytrace.tenant": ended.tenant,
            "polytrace.user": ended.user,
            "polytrace.model": ended.model,
            "polytrace.token_layers": end.token_layers,
            "polytrace.moved_bytes": end.moved_bytes,
        }
        whole = tracer.start_span("request", Context(), kind=SpanKind.SERVER, attributes=about, start_time=accepted)
        inside = set_span_in_context(whole, Context())
        tracer.start_span("queue", inside, start_time=accepted).end(begun)
        tracer.start_span("run", inside, start_time=begun).end(over)
        if error is not None:
            whole.set_attribute("polytrace.error", error.code)
            whole.set_status(Status(StatusCode.ERROR, error.code))
        whole.end(over)

    def close(self) -> None:
        """Sends what waits."""
        self._provider.shutdown()


def traces(role: str) -> Traces | None:
    """As the environment of this process says; None when it names no collector."""
    url: str | None = from_environment("OTEL_EXPORTER_OTLP_ENDPOINT", str, None)
    return None if url is None else Traces(url, role)


def check_url(url: str) -> None:
    """Raises UserError when nobody could send there."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url!r} is no address of a collector: http://HOST:4318")


def _provider(url: str, role: str, ids: Any) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    except ModuleNotFoundError as error:
        raise UserError(f"traces need {error.name}: pip install 'polytrace[telemetry]'") from error

    class RequestIds(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return int(ids.trace)

    resource = Resource.create({"service.name": "polytrace", "polytrace.role": role})
    provider = TracerProvider(resource=resource, id_generator=RequestIds(), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=url, timeout=_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_S * 1000))
    return provider
