"""`/metrics` for Prometheus, and what is measured of every call on its way through the gateway."""

from __future__ import annotations

import logging
import re
import time
from http import HTTPStatus

from anyio import to_thread
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import figures
from api.callers import figures_reader_of
from api.log_lines import begin_call
from api.metrics import Metrics
from api.otlp import Attributes
from api.refusals import Refusals
from api.store import Store
from polytrace.errors import ServiceError
from scheduling.plan import RequestId

_log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"))
_REQUEST_ID = re.compile(r"[0-9a-f]{32}")
_TOLD = ("tenant", "user", "check_seconds")
_NOT_BEGUN = 499  # the caller left before there was an answer


class MetricRoutes:
    """For operators and monitors; without keys, for whoever reaches the service."""

    def __init__(self, store: Store) -> None:
        self._metrics = Metrics(store)

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/metrics", self.metrics, response_class=Response)

    async def metrics(self, request: Request) -> Response:
        """The service's figures in Prometheus' text format. For operators and monitors."""
        figures_reader_of(request)
        return Response(await to_thread.run_sync(self._metrics.text), media_type=CONTENT_TYPE)


class MeasuredCalls:
    """Measures calls by route, never by path: paths have names that callers choose."""

    def __init__(self, app: ASGIApp, store: Store, refusals: Refusals) -> None:
        self._app = app
        self._tally = store.tally
        self._traces = store.traces
        self._refusals = refusals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, about = time.perf_counter(), _NOT_BEGUN, begin_call()

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        failure: str | None = None
        try:
            await self._app(scope, receive, sent)
        except Exception:
            failure = ServiceError.code  # what nobody foresaw is answered further out
            status = HTTPStatus.INTERNAL_SERVER_ERROR if status == _NOT_BEGUN else status
            raise
        finally:
            route = str(getattr(scope.get("route"), "path", "none"))
            method = scope["method"] if scope["method"] in _METHODS else "other"
            seconds, code = time.perf_counter() - began, scope.get("state", {}).get("error_code") or failure
            self._tally.observe(figures.HTTP, route, method, str(status), value=seconds)
            if status == HTTPStatus.FORBIDDEN and (caller := scope.get("state", {}).get("caller")) is not None:
                self._refusals.note(caller, f"{method} {scope['path'][:150]}")
            if self._traces is not None:
                self._trace(scope, method, route, status, seconds, about)
            is_probe = route in ("/healthz", "/readyz")  # asked all the time: no news
            if code is not None and not is_probe:
                self._tally.count(figures.HTTP_ERRORS, code)
            level = logging.DEBUG if is_probe else logging.INFO
            if _log.isEnabledFor(level):
                named = scope.get("path_params", {})
                about.setdefault("request", named.get("request_id"))
                about.setdefault("model", named.get("name") if route.startswith("/v1/models/") else None)
                done = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6), "code": code}
                _log.log(level, "%s %s %d", method, route, status, extra=done | about)

    def _trace(
        self, scope: Scope, method: str, route: str, status: int, seconds: float, about: dict[str, str | None]
    ) -> None:
        """Tells of a call that was about a request, if there is one."""
        assert self._traces is not None
        accepted = about.get("accepted")
        request = accepted or scope.get("path_params", {}).get("request_id", "")
        if not _REQUEST_ID.fullmatch(request) or (accepted is None and status >= 400):  # perhaps nobody's
            return
        told: Attributes = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        told |= {f"polytrace.{name}": value for name, value in about.items() if name in _TOLD and value is not None}
        ended = time.time()
        self._traces.tell_call(
            RequestId(request), f"{method} {route}", ended - seconds, ended, told, is_first=accepted is not None
        )
