"""What a caller is told of a request: its result, its problem, or how it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.responses import JSONResponse, Response

from api import problems
from api.claiming import Outlook
from api.result_response import StoredResultResponse
from api.results import ObjectResults
from api.sending import StoredFile
from api.served import Deployments
from api.status import RequestState, RequestStatus
from api.store import Store

MEDIA_TYPE = "application/vnd.safetensors"
SMALL_BYTES = 256 << 10


class Answers:
    """Has no state of its own."""

    def __init__(self, store: Store, deployments: Deployments) -> None:
        self._store = store
        self._deployments = deployments

    async def answer(self, status: RequestStatus, *, is_whole: bool = True) -> Response:
        """The result of a finished request, the problem of a failed one, else 202 with the status.

        `is_whole`: nobody can have asked for a part of the result, so a small one needs no machinery for that.
        """
        headers: dict[str, str] = {"X-Request-Id": status.id}
        if status.state.is_final:
            self._store.received.note_durable(status.id)
        if status.state is RequestState.DONE and isinstance(self._store.results, ObjectResults):
            stored = await to_thread.run_sync(self._store.results.stored, status.id)
            return StoredResultResponse(stored, MEDIA_TYPE, headers)
        if status.state is RequestState.DONE and is_whole and status.result is not None:
            return Response(status.result, media_type=MEDIA_TYPE, headers=headers)
        if status.state is RequestState.DONE:
            path = self._store.result_path(status.id)
            if is_whole and (content := await to_thread.run_sync(_read_small, path)) is not None:
                return Response(content, media_type=MEDIA_TYPE, headers=headers)
            return StoredFile(path, media_type=MEDIA_TYPE, headers=headers)
        if status.error is not None:
            return problems.problem(status.error, headers)
        headers["Location"] = f"/v1/requests/{status.id}"
        await to_thread.run_sync(self._store.received.secure, status.id)
        return JSONResponse(await self.stands(status), status_code=202, headers=headers)

    async def stands(self, status: RequestStatus) -> dict[str, Any]:
        """The status, with the place of one that waits."""
        if status.state is not RequestState.QUEUED:
            return plain(status)
        known = plain(status, await to_thread.run_sync(self._store.queue_outlook, status.id))
        return known | {"waits_for": self._deployments.waits_for(status.model)}


def plain(status: RequestStatus, outlook: Outlook | None = None) -> dict[str, Any]:
    """A status as JSON."""
    return {
        "id": status.id,
        "model": status.model,
        "tenant": status.tenant,
        "user": status.user,
        "state": status.state.value,
        "created": status.created,
        "started": status.started,
        "finished": status.finished,
        "passes_done": status.passes_done,
        "passes": status.passes,
        "queue_position": None if outlook is None else outlook.queue_position,
        "expected_start": None if outlook is None else outlook.expected_start,
        "waits_for": None,
        "error": status.error.to_fields() if status.error else None,
        "result": f"/v1/requests/{status.id}/result" if status.state is RequestState.DONE else None,
        "token_layers": status.token_layers,
        "moved_bytes": status.moved_bytes,
        "result_bytes": status.result_bytes,
    }


def _read_small(path: Path) -> bytes | None:
    """A file in one go; None when it is too large for that."""
    with path.open("rb", buffering=0) as file:
        content = file.read(SMALL_BYTES + 1)
    return content if len(content) <= SMALL_BYTES else None
