"""The routes to edits that are kept by name: `/v1/models/{name}/edits`. A worker checks what is to be kept."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.admission import Admission
from api.answers import MEDIA_TYPE
from api.callers import caller_of, owner_of
from api.edits import MAX_BYTES
from api.served import Checker, Deployments
from api.settings import GatewaySettings
from api.store import Store
from api.uploads import receive
from polytrace.codec import to_json
from polytrace.edits.sets import check_name

Version = Annotated[int | None, Query(ge=1, lt=1 << 31)]


class EditRoutes:
    """Has no state of its own."""

    def __init__(
        self,
        store: Store,
        settings: GatewaySettings,
        checker: Checker,
        deployments: Deployments,
        admission: Admission,
    ) -> None:
        self._store = store
        self._kept = store.edits
        self._settings = settings
        self._checker = checker
        self._deployments = deployments
        self._admission = admission

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/models/{name}/edits", self.known)
        router.add_api_route("/models/{name}/edits/{edit}", self.get)
        router.add_api_route("/models/{name}/edits/{edit}", self.put, methods=["POST"], status_code=201)
        router.add_api_route("/models/{name}/edits/{edit}", self.delete, methods=["DELETE"])

    async def known(self, name: str, request: Request) -> dict[str, Any]:
        """The edits that may be used with a model: one's own, and those that others share."""
        self._deployments.get(name, caller_of(request))
        return {"edits": to_json(await to_thread.run_sync(self._kept.known, name, owner_of(request)))}

    async def get(self, name: str, edit: str, request: Request, version: Version = None) -> Response:
        """An edit's bytes, by default of its newest version. The ETag begins with the version's number."""
        self._deployments.get(name, caller_of(request))
        number, body = await to_thread.run_sync(self._kept.get, name, owner_of(request), check_name(edit), version)
        tag = f'"{number}-{blake2b(body, digest_size=8).hexdigest()}"'
        headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=MEDIA_TYPE, headers=headers)

    async def put(self, name: str, edit: str, request: Request, shared: bool = False) -> Response:
        """Keeps another version of an edit."""
        served = self._deployments.get(name, caller_of(request))
        check_name(edit)
        terms = await self._admission.ask(caller_of(request), name)
        upload = self._store.new_id()
        path, room = self._store.request_path(upload), self._admission.uploads.of(terms.tenant, upload)
        try:
            await receive(request, path, max_bytes=MAX_BYTES, idle_s=self._settings.upload_idle_s, room=room)
            verdict = await self._checker.check_edits(name, served.version, path)
            verdict.raise_error()
            version = await to_thread.run_sync(self._put, name, owner_of(request), edit, path, shared)
        finally:
            room.release()
            self._store.received.discard(upload)
        return JSONResponse({"name": edit, "version": version}, status_code=201)

    async def delete(self, name: str, edit: str, request: Request, version: Version = None) -> dict[str, Any]:
        """Drops a version of one's own edit, by default all of them."""
        self._deployments.get(name, caller_of(request))
        await to_thread.run_sync(self._kept.delete, name, owner_of(request), check_name(edit), version)
        return {"name": edit, "version": version}

    def _put(self, name: str, owner: str, edit: str, path: Path, is_shared: bool) -> int:
        return self._kept.put(name, owner, edit, path.read_bytes(), is_shared=is_shared)
