"""Hard limits for bodies that the framework reads into memory, those of routes that take JSON: how long, and how slow.

Routes that stream what they get into a file have limits of their own (`api.uploads`). Counted as it arrives, so it
does not matter what a call says of its length. The framework reads a body before it asks for a route's key, so the key
is asked for here too: of whoever has none, nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem, refused
from api.uploads import Pace
from polytrace.errors import PolytraceError, WireError

MAX_JSON_BYTES = 1 << 20  # parsed while nobody else is answered
MAX_QUESTION_BYTES = 8 << 20  # of a question for sites, which a worker parses
_OWN = re.compile(  # routes that have limits of their own
    r"/v1/(models/[^/]+/(requests|validate|edits/[^/]+)|constants/[0-9a-f]+|completions|chat/completions)"
)
_QUESTION = re.compile(r"/v1/models/[^/]+/sites")
_WITH_BODIES = ("POST", "PUT", "PATCH", "DELETE")


class LimitedBodies:
    """Middleware. An HTTPException with status 413 or 408 is raised where the body is read."""

    def __init__(self, app: ASGIApp, require_key: Callable[[Request], Awaitable[None]], idle_s: float) -> None:
        self._app = app
        self._require_key = require_key
        self._idle_s = idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := _refusal(scope)) is not None:
            await refusal(scope, receive, send)
            return
        if scope["type"] != "http" or _OWN.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        if scope["method"] in _WITH_BODIES and scope["path"].startswith("/v1/"):
            try:
                await self._require_key(Request(scope))
            except PolytraceError as error:
                await problem(error)(scope, receive, send)
                return
        most = MAX_QUESTION_BYTES if _QUESTION.fullmatch(scope["path"]) else MAX_JSON_BYTES
        pace, is_whole = Pace(self._idle_s, "body"), False

        async def limited() -> Message:
            nonlocal is_whole
            if is_whole:
                return await receive()
            try:
                message = await pace.next(receive())
            except WireError as error:
                raise HTTPException(408, error.message) from None
            if message["type"] == "http.request" and pace.came(len(message.get("body", b""))) > most:
                raise HTTPException(413, f"the body is longer than {most} bytes")
            is_whole = not message.get("more_body", False)
            return message

        await self._app(scope, limited, send)


def _refusal(scope: Scope) -> JSONResponse | None:
    """Of what no route takes."""
    if "\0" in scope["path"] or b"%00" in scope["query_string"] or b"\0" in scope["query_string"]:
        return refused(HTTPStatus.BAD_REQUEST, "no name has a NUL in it, and no database takes one")
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            told = "a body comes as it is: Content-Encoding is not taken"  # a few bytes could be any number
            return refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, told)
    return None
