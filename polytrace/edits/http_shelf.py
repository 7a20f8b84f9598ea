"""Edits that a service keeps by name, over HTTP."""

from __future__ import annotations

from typing import Any

from polytrace.codec import from_json
from polytrace.edits.sets import KnownEdit
from polytrace.http_backend import HttpBackend


class HttpShelf:
    """The edits of one model of a service. What was fetched is fetched again only when it is another version."""

    def __init__(self, backend: HttpBackend) -> None:
        self._backend = backend
        self._fetched: dict[tuple[str, int | None], tuple[str, bytes]] = {}  # with their tags

    def put(self, name: str, data: bytes, *, is_shared: bool) -> int:
        answer = self._backend.ask("POST", f"edits/{name}", params={"shared": is_shared}, content=data)
        return int(answer.json()["version"])

    def get(self, name: str, version: int | None) -> tuple[int, bytes]:
        last = self._fetched.get((name, version))
        headers = {} if last is None else {"If-None-Match": last[0]}
        answer = self._backend.ask("GET", f"edits/{name}", params=_version(version), headers=headers)
        if last is None or answer.status_code != 304:
            last = self._fetched[name, version] = (answer.headers["ETag"], answer.content)
        return int(last[0].strip('"').partition("-")[0]), last[1]

    def known(self) -> list[KnownEdit]:
        entries = self._backend.ask("GET", "edits").json()["edits"]
        return [from_json(KnownEdit, entry) for entry in entries]

    def delete(self, name: str, version: int | None) -> None:
        self._backend.ask("DELETE", f"edits/{name}", params=_version(version))


def _version(version: int | None) -> dict[str, Any]:
    return {} if version is None else {"version": version}
