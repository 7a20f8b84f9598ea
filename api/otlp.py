"""OpenTelemetry traces of requests, sent to a collector over OTLP/HTTP when an operator names one.

A request is one trace, whose id is the request's own: whoever has the one finds the other.

    POST /v1/models/{name}/requests    the call that it came with (gateway); other calls about it are beside `request`
      request                          from its acceptance to its end (controller)
        queue                          until the controller took it
        run
          planning                     from the stored graph to a program
          pass                         each pass that it was in, the first MAX_PASSES of them
          result                       until its result was kept

A pass that requests share is a trace of its own, `shared pass`, linked to `run` of every member, and each member's
`pass` is linked to it. The two processes need not hear of each other: ids of spans follow from the request's id.

A span costs about 0.1 ms, so they are made on a thread of their own, behind whoever tells, and most of them when a
request has ended, from the times that the store keeps anyway. A collector that is away holds nobody up: spans wait in
memory, a bounded number of them, and are dropped beyond it. Needs the extra `telemetry`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from api.settings import from_environment
from polytrace.errors import UserError
from scheduling.plan import RequestId

if TYPE_CHECKING:
    from api.telling import Ended
    from cluster.requests import PassFigures

MAX_PASSES = 16  # that one request's trace shows; sweeps and generations have thousands
_NS = 1_000_000_000
_SEND_S = 1.0  # between two sendings
_TIMEOUT_S = 5.0  # of one
_MAX_WAITING = 16_384  # spans
_MAX_KNOWN = 100_000  # requests that run
_MAX_TOLD = 4096  # of which no spans are made yet
_MAX_LINKS = 2048  # of one pass
_CALL, _REQUEST, _RUN = "call", "request", "run"  # spans that others lie below

_log = logging.getLogger(__name__)

Attributes = dict[str, str | int | float]


class Traces:
    """Makes and sends spans on threads of its own; what tells of something returns at once. Times are seconds."""

    def __init__(self, url: str, role: str) -> None:
        """`url`: of the collector, to which `/v1/traces` is added. Raises UserError when it is none, or without the
        extra.
        """
        check_url(url)
        self._ids = _Ids()
        self._provider = _provider(f"{url.rstrip('/')}/v1/traces", role, self._ids)
        self._tracer = self._provider.get_tracer("polytrace")
        self._passes: Counter[RequestId] = Counter()  # told, of requests that run
        self._told: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_TOLD)
        self._maker = threading.Thread(target=self._make_forever, name="spans", daemon=True)
        self._maker.start()

    def tell_call(
        self, request: RequestId, name: str, began: float, ended: float, about: Attributes, *, is_first: bool
    ) -> None:
        """A call about a request; `is_first`: the one by which it was accepted."""
        from opentelemetry.trace import SpanKind

        own, below = (_CALL, None) if is_first else (None, _CALL)
        attributes: Attributes = {"polytrace.request": request} | about
        make = partial(self._span, request, name, began, ended, own=own, below=below, kind=SpanKind.SERVER)
        self._later(partial(make, attributes=attributes))

    def tell_planning(self, request: RequestId, seconds: float) -> None:
        """A request has become a program, just now."""
        ended = time.time()
        self._later(partial(self._span, request, "planning", ended - seconds, ended, below=_RUN))

    def tell_pass(self, model: str, told: PassFigures) -> None:
        """A pass ran, and ended just now."""
        self._later(partial(self._pass, model, told, time.time()))

    def tell(self, ended: Ended, now: float, kept_from: float | None = None) -> None:
        """A request has ended; `kept_from`: when its result began to be written down."""
        self._later(partial(self._end, ended, now, kept_from))

    def close(self) -> None:
        """Sends what waits."""
        self._told.put(None)
        self._maker.join(_TIMEOUT_S)
        self._provider.shutdown()

    # --- the thread that makes them

    def _later(self, make: Callable[[], None]) -> None:
        with contextlib.suppress(queue.Full):  # then its spans are dropped
            self._told.put_nowait(make)

    def _make_forever(self) -> None:
        while (make := self._told.get()) is not None:
            try:
                make()
            except Exception:  # noqa: BLE001  the edge of the thread: one span less
                _log.exception("a span could not be made")

    def _pass(self, model: str, told: PassFigures, ended: float) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import Link

        about: Attributes = {
            "polytrace.model": model,
            "polytrace.pass.users": told.users,
            "polytrace.pass.rows": told.rows,
        }
        links = [Link(_context(request, _RUN)) for request in told.requests[:_MAX_LINKS]]
        self._ids.trace = self._ids.span = None  # of its own
        began = ended - told.seconds
        shared = self._tracer.start_span(
            "shared pass", Context(), attributes=about, links=links, start_time=int(began * _NS)
        )
        shared.end(int(ended * _NS))
        whole = [Link(shared.get_span_context())]
        if len(self._passes) > _MAX_KNOWN:  # of those whose ends were dropped
            self._passes.clear()
        for request in told.requests:
            self._passes[request] += 1
            if self._passes[request] <= MAX_PASSES:
                self._span(request, "pass", began, ended, below=_RUN, attributes=about, links=whole)

    def _end(self, ended: Ended, now: float, kept_from: float | None) -> None:
        from opentelemetry.trace import Status, StatusCode

        end, error = ended.end, ended.end.error
        over = max(now, ended.created)
        begun = over if ended.started is None else min(over, max(ended.created, ended.started))
        about: Attributes = {
            "polytrace.request": end.request,
            "polytrace.tenant": ended.tenant,
            "polytrace.user": ended.user,
            "polytrace.model": ended.model,
            "polytrace.passes": self._passes.pop(end.request, 0),
            "polytrace.token_layers": end.token_layers,
            "polytrace.moved_bytes": end.moved_bytes,
        }
        status = None
        if error is not None:
            about["polytrace.error"] = error.code
            status = Status(StatusCode.ERROR, error.code)
        self._span(
            end.request, "request", ended.created, over, own=_REQUEST, below=_CALL, attributes=about, status=status
        )
        self._span(end.request, "queue", ended.created, begun, below=_REQUEST)
        if ended.started is not None:
            self._span(end.request, "run", begun, over, own=_RUN, below=_REQUEST)
        if kept_from is not None:
            self._span(end.request, "result", min(kept_from, over), over, below=_RUN)

    def _span(
        self,
        request: RequestId,
        name: str,
        began: float,
        ended: float,
        *,
        own: str | None = None,
        below: str | None,
        attributes: Mapping[str, str | int | float] | None = None,
        links: Sequence[Any] = (),
        status: Any = None,
        kind: Any = None,
    ) -> None:
        """`own`: what others know it by; `below`: what it lies below, None for the trace's root."""
        from opentelemetry.context import Context
        from opentelemetry.trace import NonRecordingSpan, SpanKind, set_span_in_context

        self._ids.trace = int(request, 16)
        self._ids.span = None if own is None else _span_id(request, own)
        where = Context()
        if below is not None:
            where = set_span_in_context(NonRecordingSpan(_context(request, below)), where)
        span = self._tracer.start_span(
            name,
            where,
            kind=kind or SpanKind.INTERNAL,
            attributes=attributes,
            links=links,
            start_time=int(began * _NS),
        )
        if status is not None:
            span.set_status(status)
        span.end(int(ended * _NS))


class _Ids:
    """What the next span is called; None: whatever."""

    trace: int | None = None
    span: int | None = None


def _span_id(request: RequestId, name: str) -> int:
    """The same in every process; 0 is none."""
    return int.from_bytes(hashlib.blake2b(f"{request} {name}".encode(), digest_size=8).digest(), "big") or 1


def _context(request: RequestId, name: str) -> Any:
    """A span that another process may have made, as its neighbours name it."""
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(request, 16), _span_id(request, name), is_remote=True, trace_flags=TraceFlags(1))


def traces(role: str) -> Traces | None:
    """As the environment of this process says; None when it names no collector."""
    url: str | None = from_environment("OTEL_EXPORTER_OTLP_ENDPOINT", str, None)
    return None if url is None else Traces(url, role)


def check_url(url: str) -> None:
    """Raises UserError when nobody could send there."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url!r} is no address of a collector: http://HOST:4318")


def _provider(url: str, role: str, ids: _Ids) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    except ModuleNotFoundError as error:
        raise UserError(f"traces need {error.name}: pip install 'polytrace[telemetry]'") from error

    class RequestIds(RandomIdGenerator):
        def generate_trace_id(self) -> int:
            return super().generate_trace_id() if ids.trace is None else ids.trace

        def generate_span_id(self) -> int:
            return super().generate_span_id() if ids.span is None else ids.span

    resource = Resource.create({"service.name": "polytrace", "polytrace.role": role})
    limits = SpanLimits(max_links=_MAX_LINKS)
    provider = TracerProvider(resource=resource, id_generator=RequestIds(), span_limits=limits, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=url, timeout=_TIMEOUT_S)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_S * 1000, max_queue_size=_MAX_WAITING)
    )
    return provider
