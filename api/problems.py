"""Every error as an HTTP answer: `application/problem+json` (RFC 9457), from one table.

`detail` is the message with its numbers, `code` is what `polytrace.errors.from_fields` reads, `where` the user's own
line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from polytrace.errors import (
    CancelledError,
    CapacityError,
    ConflictError,
    ForbiddenError,
    GraphError,
    KeyRefusedError,
    MissingError,
    NotFoundError,
    PolytraceError,
    QuotaError,
    RunError,
    ServiceError,
    TooLargeError,
    UserError,
    WireError,
)

_CLIENT_GONE = 499
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2
MAX_MISTAKES = 10  # of one call that are told

# exception -> status, title; the first that fits
_TABLE: tuple[tuple[type[PolytraceError], HTTPStatus, str], ...] = (
    (GraphError, HTTPStatus.UNPROCESSABLE_ENTITY, "The program cannot be honoured"),
    (RunError, HTTPStatus.UNPROCESSABLE_ENTITY, "The program failed while it ran"),
    (WireError, HTTPStatus.BAD_REQUEST, "The bytes are not a request"),
    (TooLargeError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too large"),
    (NotFoundError, HTTPStatus.NOT_FOUND, "Not found"),
    (MissingError, HTTPStatus.CONFLICT, "The request names contents that are not here"),
    (KeyRefusedError, HTTPStatus.UNAUTHORIZED, "The key is missing or unknown"),
    (ForbiddenError, HTTPStatus.FORBIDDEN, "That is for operators"),
    (CancelledError, HTTPStatus.CONFLICT, "The request was cancelled"),
    (ConflictError, HTTPStatus.CONFLICT, "The deployment is in the way"),
    (UserError, HTTPStatus.BAD_REQUEST, "The request is wrong"),
    (QuotaError, HTTPStatus.TOO_MANY_REQUESTS, "The tenant's quota is used up"),
    (CapacityError, HTTPStatus.SERVICE_UNAVAILABLE, "The service cannot take the request now"),
    (ServiceError, HTTPStatus.INTERNAL_SERVER_ERROR, "The service failed"),
)

_HEADERS: dict[HTTPStatus, dict[str, str]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": str(RETRY_AFTER_S)},
}

# What the web framework refuses by itself: its statuses as our codes.
_CODES: dict[int, str] = {404: NotFoundError.code, 413: TooLargeError.code, 503: CapacityError.code}


def problem(error: PolytraceError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer for one of our own errors."""
    status, title = status_of(error)
    given = retry_headers(error) | dict(headers or {})
    return _answer(status, title, error.message, error.code, error.where, given)


def retry_headers(error: PolytraceError) -> dict[str, str]:
    """When to ask again, in whole seconds, never too early, where the error knows it."""
    if not isinstance(error, CapacityError) or error.retry_after_s is None:
        return {}
    return {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}


def refused(status: HTTPStatus, told: str) -> JSONResponse:
    """The answer to a call that is refused before anybody looks at it."""
    return _answer(status, status.phrase, told, _code_of(status), None, None)


def body_of(status: HTTPStatus, told: str) -> dict[str, Any]:
    """The body of an answer to what never became a call."""
    return _body(status, status.phrase, told, _code_of(status), None)


def status_of(error: PolytraceError) -> tuple[HTTPStatus, str]:
    """How an error is answered, and its title."""
    return next(
        ((status, title) for kind, status, title in _TABLE if isinstance(error, kind)),
        (HTTPStatus.INTERNAL_SERVER_ERROR, "The service failed"),
    )


def headers_of(status: HTTPStatus) -> dict[str, str]:
    """What an answer of this status has beside its body."""
    return dict(_HEADERS.get(status, {}))


def install(app: FastAPI) -> None:
    """Makes every error of the app a problem: ours, the framework's, and whatever nobody foresaw."""
    app.add_exception_handler(PolytraceError, _on_ours)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(ClientDisconnect, _on_left)
    app.add_exception_handler(Exception, _on_unforeseen)


# How the errors are declared in the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is at fault; the problem says how.", "content": {MEDIA_TYPE: {}}},
    "5XX": {"description": "The service is at fault, or full; the problem says which.", "content": {MEDIA_TYPE: {}}},
}


def answer_to(request: Request, error: PolytraceError) -> JSONResponse:
    """What one of our own errors makes of a call."""
    request.state.error_code = error.code  # for the metrics
    return problem(error)


def left() -> Response:
    """To a caller who has gone: for the log."""
    return Response(status_code=_CLIENT_GONE)


async def _on_left(request: Request, error: Exception) -> Response:
    return left()


async def _on_ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PolytraceError)
    return answer_to(request, error)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    detail = str(error.detail)
    if status is HTTPStatus.NOT_FOUND:
        detail = f"nothing is at {request.url.path}"
    elif status is HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.method} is not possible on {request.url.path}"
    code = _code_of(status)
    request.state.error_code = code
    return _answer(status, status.phrase, detail, code, None, error.headers)


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    request.state.error_code = UserError.code
    found = error.errors()
    told = [f"{'.'.join(map(str, part['loc']))[:100]}: {part['msg'][:200]}" for part in found[:MAX_MISTAKES]]
    if len(found) > MAX_MISTAKES:
        told.append(f"and {len(found) - MAX_MISTAKES} more")
    detail = "; ".join(told).encode(errors="replace").decode()  # names of fields may be no text
    return _answer(HTTPStatus.BAD_REQUEST, "A parameter is wrong", detail, UserError.code, None, None)


async def _on_unforeseen(request: Request, error: Exception) -> JSONResponse:
    # the server's log has the traceback; what the user sees names no internals
    request.state.error_code = ServiceError.code
    return problem(ServiceError("the gateway failed on this call; it is in the service's log"))


def _code_of(status: HTTPStatus) -> str:
    return _CODES.get(status, UserError.code if status < 500 else ServiceError.code)


def _answer(
    status: HTTPStatus, title: str, detail: str, code: str, where: str | None, headers: Mapping[str, str] | None
) -> JSONResponse:
    body = _body(status, title, detail, code, where)
    return JSONResponse(
        body, status_code=int(status), media_type=MEDIA_TYPE, headers={**headers_of(status), **(headers or {})}
    )


def _body(status: HTTPStatus, title: str, detail: str, code: str, where: str | None) -> dict[str, Any]:
    return {
        "type": f"urn:polytrace:problem:{code}",
        "title": title,
        "status": int(status),
        "detail": detail,
        "code": code,
        "where": where,
    }
