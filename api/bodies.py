"""A hard limit for bodies that the framework reads into memory: those of routes that take JSON.

Routes that stream what they get into a file have limits of their own (`api.uploads`). Counted as it arrives, so it
does not matter what a call says of its length. The framework reads a body before it asks for a route's key, so the key
is asked for here too: of whoever has none, nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import problem
from polytrace.errors import PolytraceError

MAX_JSON_BYTES = 8 << 20
_OWN = re.compile(  # routes that have limits of their own
    r"/v1/(models/[^/]+/(requests|validate|edits/[^/]+)|constants/[0-9a-f]+|completions|chat/completions)"
)
_WITH_BODIES = ("POST", "PUT", "PATCH", "DELETE")


class LimitedBodies:
    """Middleware. An HTTPException with status 413 is raised where the body is read."""

    def __init__(self, app: ASGIApp, require_key: Callable[[Request], Awaitable[None]]) -> None:
        self._app = app
        self._require_key = require_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _OWN.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        if scope["method"] in _WITH_BODIES and scope["path"].startswith("/v1/"):
            try:
                await self._require_key(Request(scope))
            except PolytraceError as error:
                await problem(error)(scope, receive, send)
                return
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if num_bytes > MAX_JSON_BYTES:
                raise HTTPException(413, f"the body is longer than {MAX_JSON_BYTES} bytes")
            return message

        await self._app(scope, limited, send)
