"""Errors as OpenAI's clients read them, for the routes that speak their language, and bodies under a hard limit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.problems import headers_of, retry_headers, status_of
from api.uploads import Pace
from api.wishes import FieldError, WishError, wish_error
from polytrace.errors import (
    CapacityError,
    ContextError,
    KeyRefusedError,
    NotFoundError,
    PolytraceError,
    QuotaError,
    TooLargeError,
    UserError,
)

MAX_BODY_BYTES = 8 << 20  # of one call; larger constants of a graph are uploaded before it

# How the errors are declared in the OpenAPI document.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is at fault; `error` says how.", "content": {"application/json": {}}},
    "5XX": {
        "description": "The service is at fault, or full; `error` says which.",
        "content": {"application/json": {}},
    },
}
MODEL = "model"  # the field


def error_body(error: PolytraceError, param: str | None = None) -> dict[str, Any]:
    """The error as OpenAI writes them; `param` is the field that it is about, where that is known."""
    is_users = isinstance(error, UserError)
    param = error.param if isinstance(error, WishError) else param
    kind = "invalid_request_error" if is_users else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": param, "code": _code(error, param)}}


def _code(error: PolytraceError, param: str | None) -> str:
    """OpenAI's word where it has one, else ours."""
    if isinstance(error, ContextError):
        return "context_length_exceeded"
    if isinstance(error, KeyRefusedError):
        return "invalid_api_key"
    if isinstance(error, QuotaError):
        return "rate_limit_exceeded"
    if isinstance(error, NotFoundError) and param == MODEL:
        return "model_not_found"
    return error.code


def error_answer(error: PolytraceError, param: str | None = None) -> JSONResponse:
    """The error as an answer. OpenAI's client sends again what gets 409 or 5XX, unless it is told not to."""
    status = HTTPStatus.BAD_REQUEST if isinstance(error, ContextError) else status_of(error)[0]
    headers = headers_of(status) | retry_headers(error)
    if not isinstance(error, CapacityError):
        headers["X-Should-Retry"] = "false"
    return JSONResponse(error_body(error, param), status_code=int(status), headers=headers)


def openai_route(require_key: Callable[[Request], Awaitable[None]], idle_s: float) -> type[APIRoute]:
    """A class of routes whose errors are OpenAI's, and which read a body only when the key is right."""

    class OpenAIRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handler(request: Request) -> Response:
                try:
                    await require_key(request)
                    limited = _LimitedRequest(request.scope, request.receive)
                    limited.idle_s = idle_s
                    await limited.body()  # here: what it raises would be lost in the framework
                    return await handle(limited)
                except FieldError as found:
                    return refused(request, found.error, found.param)
                except PolytraceError as error:
                    return refused(request, error)
                except RequestValidationError as error:
                    return refused(request, wish_error(error.errors()))
                except HTTPException as error:  # the framework could not parse the body
                    return refused(request, WishError(str(error.detail), None))

            def refused(request: Request, error: PolytraceError, param: str | None = None) -> Response:
                request.state.error_code = error.code  # for the metrics
                return error_answer(error, param)

            return handler

    return OpenAIRoute


class _LimitedRequest(Request):
    """A call whose body is read up to a limit, as it comes in time."""

    idle_s: float

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            parts: list[bytes] = []
            pace, stream = Pace(self.idle_s, "body"), aiter(self.stream())
            while (part := await pace.next(anext(stream, None))) is not None:
                if pace.came(len(part)) > MAX_BODY_BYTES:
                    raise TooLargeError(f"the body is longer than {MAX_BODY_BYTES} bytes")
                parts.append(part)
            self._body = b"".join(parts)
        return self._body
