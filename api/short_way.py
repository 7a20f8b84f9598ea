"""Submits go straight to their route: what the framework does on the way there takes longer than the route itself.

The route is in the framework's table too, so documents and other methods know it; calls that come this way are asked
for their key, answered and measured as all others.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import answer_to, left
from polytrace.errors import PolytraceError

_SUBMIT = re.compile(r"/v1/models/([^/]+)/requests")


@dataclass(frozen=True, slots=True)
class _Route:
    path: str  # for whoever measures


_ROUTE = _Route("/v1/models/{name}/requests")


class ShortWay:
    """Middleware. Every other call goes on."""

    def __init__(
        self,
        app: ASGIApp,
        submit: Callable[[str, Request], Awaitable[Response]],
        require_key: Callable[[Request], Awaitable[None]],
    ) -> None:
        self._app = app
        self._submit = submit
        self._require_key = require_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or (found := _SUBMIT.fullmatch(scope["path"])) is None:
            await self._app(scope, receive, send)
            return
        scope["route"], scope["path_params"] = _ROUTE, {"name": found[1]}
        request = Request(scope, receive, send)
        try:
            await self._require_key(request)
            response = await self._submit(found[1], request)
        except PolytraceError as error:
            response = answer_to(request, error)
        except ClientDisconnect:
            response = left()
        await response(scope, receive, send)
