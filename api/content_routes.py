"""The gateway's routes for contents: constants that are uploaded once, kept values, states.

Owns these routes and their rules; `api.contents` keeps what they take. Every call sees its own owner's things only.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from api.admission import Admission
from api.answers import MEDIA_TYPE
from api.away import AwayError
from api.callers import caller_of, owner_of
from api.contents import Contents
from api.sending import StoredFile
from api.uploads import receive
from polytrace.codec import to_json
from polytrace.contents import is_digest, is_name
from polytrace.errors import TooLargeError, UserError, WireError
from polytrace.keepers import KeptEntry
from polytrace.tensors import DTYPES
from polytrace.wire import MAX_DIMS

PURGE_S = 5.0  # between two looks at what has expired; an expired name is not found before, too
MAX_ASKED = 10_000

_log = logging.getLogger(__name__)


class ContentRoutes:
    """The routes' state."""

    def __init__(self, contents: Contents, admission: Admission, *, upload_idle_s: float) -> None:
        self._contents = contents
        self._admission = admission
        self._upload_idle_s = upload_idle_s

    def add_to(self, router: APIRouter) -> None:
        """Adds the routes."""
        router.add_api_route("/constants/missing", self.missing, methods=["POST"])
        router.add_api_route("/constants/{digest}", self.upload, methods=["PUT"], status_code=201)
        router.add_api_route("/constants/{digest}", self.content)
        for path, is_state in (("kept", False), ("states", True)):
            routes = Names(self._contents, is_state=is_state)
            router.add_api_route(f"/{path}", routes.listed, operation_id=f"list_{path}")
            router.add_api_route(f"/{path}/{{name}}", routes.entry, operation_id=f"describe_{path}")
            router.add_api_route(f"/{path}/{{name}}/content", routes.content, operation_id=f"fetch_{path}")
            router.add_api_route(
                f"/{path}/{{name}}", routes.delete, methods=["DELETE"], status_code=204, operation_id=f"delete_{path}"
            )
        router.add_api_route("/states/{name}", self.begin_state, methods=["PUT"])

    async def purge_forever(self) -> None:
        """Drops what has expired, every few seconds."""
        while True:
            try:
                await to_thread.run_sync(self._contents.purge)
            except AwayError:
                pass  # another time
            except Exception:  # noqa: BLE001  the edge of the task: a disk that fails now may work later
                _log.exception("what has expired could not be dropped")
            await asyncio.sleep(PURGE_S)

    async def missing(self, wish: Hashes, request: Request) -> dict[str, list[str]]:
        """Which of these contents the caller has to upload; the others count as used now."""
        for digest in wish.hashes:
            _check_digest(digest)
        return {"missing": await to_thread.run_sync(self._contents.missing, owner_of(request), wish.hashes)}

    async def upload(self, digest: str, request: Request) -> Response:
        """Takes a content in, a file with one tensor whose hash this is. It stays until its owner's quota is needed."""
        _check_digest(digest)
        owner, part = owner_of(request), f"upload-{secrets.token_hex(8)}"
        announced = request.headers.get("content-length", "")
        if not announced.isdecimal():
            raise WireError("an upload of a content says how long it is: Content-Length")
        size = int(announced)
        if size > self._contents.holdings.quota_bytes:  # before it becomes a number of the database
            raise TooLargeError(
                f"the upload takes {size} bytes; its owner has {self._contents.holdings.quota_bytes} in all"
            )
        await self._admission.check_stored(caller_of(request), size)
        path = await to_thread.run_sync(self._contents.begin_upload, owner, part, size)
        room = self._admission.uploads.of(caller_of(request).tenant, part)
        try:
            await receive(request, path, max_bytes=size, idle_s=self._upload_idle_s, room=room)
            await to_thread.run_sync(self._contents.finish_upload, owner, part, digest)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody hears it
        finally:
            room.release()
            await to_thread.run_sync(self._contents.give_up, part)
        return Response(status_code=201)

    async def content(self, digest: str, request: Request) -> Response:
        """A content of the caller's own."""
        _check_digest(digest)
        return await _file(self._contents, owner_of(request), digest)

    async def begin_state(self, name: str, wish: FirstContent, request: Request) -> dict[str, Any]:
        """The state of this name, made with an uploaded content when there is none yet."""
        if not is_name(name):
            raise UserError(f"{name[:100]!r} cannot be a name: letters, digits, '.', '_' and '-', at most 100")
        _check_digest(wish.hash)
        if wish.dtype not in DTYPES:
            raise UserError(f"{wish.dtype[:100]!r} is no dtype")
        make = partial(self._contents.kept.begin_state, owner_of(request), name)
        return _plain(await to_thread.run_sync(make, wish.dtype, tuple(wish.shape), wish.hash))


class Names:
    """What has a name: kept values, or states."""

    def __init__(self, contents: Contents, *, is_state: bool) -> None:
        self._contents = contents
        self._is_state = is_state

    async def listed(self, request: Request, left_by: str | None = None) -> dict[str, Any]:
        """All of them; with `left_by`, those that a request left as they are."""
        look = partial(self._contents.kept.entries, is_state=self._is_state, request=left_by)
        entries = await to_thread.run_sync(look, owner_of(request))
        return {"entries": [_plain(entry) for entry in entries]}

    async def entry(self, name: str, request: Request) -> dict[str, Any]:
        """What it is, and when it expires."""
        return _plain(await self._entry(name, request))

    async def content(self, name: str, request: Request) -> Response:
        """What it has now, a file with one tensor."""
        entry = await self._entry(name, request)
        return await _file(self._contents, owner_of(request), entry.digest)

    async def delete(self, name: str, request: Request) -> Response:
        """Takes it away."""
        drop = partial(self._contents.kept.delete, is_state=self._is_state)
        await to_thread.run_sync(drop, owner_of(request), name)
        return Response(status_code=204)

    async def _entry(self, name: str, request: Request) -> KeptEntry:
        look = partial(self._contents.kept.entry, is_state=self._is_state)
        return await to_thread.run_sync(look, owner_of(request), name)


class Hashes(BaseModel):
    """Contents by their hashes."""

    model_config = ConfigDict(extra="forbid")

    hashes: Annotated[list[str], Field(max_length=MAX_ASKED)]


class FirstContent(BaseModel):
    """What a state begins with: an uploaded content, and what it is."""

    model_config = ConfigDict(extra="forbid")

    hash: str
    dtype: str
    shape: Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=1 << 48)]], Field(max_length=MAX_DIMS)]


def _check_digest(digest: str) -> None:
    if not is_digest(digest):
        raise UserError(f"{digest[:100]!r} is no hash of a content: 64 hexadecimal digits")


async def _file(contents: Contents, owner: str, digest: str) -> Response:
    path = await to_thread.run_sync(contents.content_path, owner, digest)
    return StoredFile(path, media_type=MEDIA_TYPE)


def _plain(entry: KeptEntry) -> dict[str, Any]:
    return dict(to_json(entry))
