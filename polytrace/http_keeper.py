"""Contents, kept values and states of a service, over HTTP.

Owns that a large constant is uploaded once: before a request is sent, the service is asked which of its contents it
lacks, unless it is known to have them, and gets these. A service that has purged one in between says so when the
request comes, and gets it again: nobody notices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from polytrace.codec import from_json
from polytrace.contents import is_named
from polytrace.errors import MissingError, NotFoundError
from polytrace.graph import Request
from polytrace.http_calls import body, call, check, pieces, timeout, unreachable
from polytrace.keepers import KeptEntry
from polytrace.tensors import RawTensor
from polytrace.wire import content_header, decode_content, encode_request

T = TypeVar("T")
_TRIES = 3  # of a request whose contents are purged between their upload and its arrival
_ASKED = 1000  # hashes in one question
_KNOWN = 100_000  # hashes that are remembered
_UPLOAD_S = 600.0  # for the service to hash what it has got


class HttpKeeper:
    """`polytrace.keepers.Keeper` of a service. Threads may share it."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url
        self._there: set[str] = set()  # hashes that the service had when it was last heard of them

    def with_contents(self, request: Request, send: Callable[[Sequence[bytes | memoryview]], T]) -> T:
        """What `send` makes of the request's file, once the service has its contents."""
        named = {name: raw for name, raw in request.constants.items() if is_named(raw)}
        referred = {raw.digest: raw for raw in request.constants.values() if not raw.is_here and raw.digest is not None}
        for last in (False,) * (_TRIES - 1) + (True,):
            self._upload({str(raw.digest): raw for raw in named.values()} | referred)
            try:
                return send(encode_request(request, stored=named))
            except MissingError:
                if last:
                    raise
                self._there -= {raw.digest for raw in named.values()} | referred.keys()
        raise AssertionError("the last try returns or raises")

    # --- polytrace.keepers.Keeper

    def entries(self, *, is_state: bool, request: str | None = None) -> list[KeptEntry]:
        params = {} if request is None else {"left_by": request}
        answer = self._call("GET", f"/v1/{_folder(is_state)}", params=params).json()
        return [from_json(KeptEntry, plain) for plain in answer["entries"]]

    def entry(self, name: str, *, is_state: bool) -> KeptEntry:
        return from_json(KeptEntry, self._call("GET", _path(name, is_state)).json())

    def tensor(self, entry: KeptEntry) -> RawTensor:
        return RawTensor(dtype=entry.dtype, shape=entry.shape, data=memoryview(b""), digest=entry.digest)

    def fetch(self, name: str, digest: str, *, is_state: bool) -> RawTensor:
        path = f"{_path(name, True)}/content" if is_state else f"/v1/constants/{digest}"
        try:
            with self._client.stream("GET", path, timeout=timeout(0)) as response:
                check(response)
                return decode_content(body(response))
        except httpx.TransportError as error:
            raise unreachable(self._url, error) from None

    def delete(self, name: str, *, is_state: bool) -> None:
        self._call("DELETE", _path(name, is_state))

    def begin_state(self, name: str, init: RawTensor) -> KeptEntry:
        assert init.digest is not None
        body = {"hash": init.digest, "dtype": init.dtype, "shape": list(init.shape)}
        self._there.discard(init.digest)
        self._upload({init.digest: init})
        return from_json(KeptEntry, self._call("PUT", _path(name, True), json=body).json())

    # --- inside

    def _upload(self, contents: dict[str, RawTensor]) -> None:
        """Sends what the service lacks. NotFoundError when that is something whose bytes are not here."""
        asked = sorted(contents.keys() - self._there)
        for first in range(0, len(asked), _ASKED):
            some = asked[first : first + _ASKED]
            missing = self._call("POST", "/v1/constants/missing", json={"hashes": some}).json()["missing"]
            for digest in missing:
                raw = contents[digest]
                if not raw.is_here:
                    raise NotFoundError(
                        f"a kept value of {raw.dtype} {list(raw.shape)} that is used here is not on this service: it "
                        "has expired or was deleted, or another service has it"
                    )
                self._put(digest, raw)
            if len(self._there) > _KNOWN:
                self._there.clear()
            self._there.update(some)

    def _put(self, digest: str, raw: RawTensor) -> None:
        header = content_header(raw.dtype, raw.shape)
        self._call(
            "PUT",
            f"/v1/constants/{digest}",
            content=pieces([header, raw.data]),
            headers={"Content-Length": str(len(header) + len(raw.data))},
            timeout=timeout(_UPLOAD_S),
        )

    def _call(self, method: str, path: str, **more: Any) -> httpx.Response:
        return call(self._client, self._url, method, path, **more)


def _folder(is_state: bool) -> str:
    return "states" if is_state else "kept"


def _path(name: str, is_state: bool) -> str:
    return f"/v1/{_folder(is_state)}/{quote(name, safe='')}"
