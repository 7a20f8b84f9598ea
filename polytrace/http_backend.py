"""A model that a service runs, over HTTP. Knows the gateway's routes, and nothing of traces or torch.

A request is sent once and then waited for: first inside the call that sends it, then by long polls. Whoever stops
waiting (Ctrl-C, a time-out) cancels it.
"""

from __future__ import annotations

import base64
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from polytrace.backend import Result
from polytrace.certificate import Certificate
from polytrace.codec import from_json
from polytrace.description import ModelDescription
from polytrace.errors import NotFoundError, PolytraceError, ServiceError, WireError, from_fields
from polytrace.graph import Request
from polytrace.kinds import value_kind
from polytrace.progress import Hear, Tell, hear_nothing, tell_nobody
from polytrace.tensors import RawTensor
from polytrace.wire import decode_result

WAIT_S = 50.0  # of one call; the service may wait shorter
_FIRST_WAIT_S = 10.0  # of the call that sends the request: what takes longer is asked how far it is
_SLACK_S = 30.0  # an answer may be this much later than it was asked for
_PATIENCE_S = 30.0  # an accepted request outlives a service that is away this long
_PART_BYTES = 4 << 20


class HttpBackend:
    """One model of a service. Threads may share it."""

    def __init__(self, url: str, name: str | None, *, key: str | None, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._client = make_client(url, key)
        weakref.finalize(self, self._client.close)  # notebooks rarely close what they opened
        try:
            self.name = name if name is not None else self._only_name()
            self._base = f"/v1/models/{quote(self.name, safe='')}"
            self._description = self._described()
            from polytrace.http_keeper import HttpKeeper  # which speaks to the service with what is below

            self.keeper = HttpKeeper(self._client, url)
        except BaseException:
            self._client.close()
            raise

    def describe(self) -> ModelDescription:
        return self._description

    def tokenizer_json(self) -> bytes | None:
        try:
            return self._get(f"{self._base}/tokenizer").content
        except NotFoundError:
            return None

    def validate(self, request: Request) -> Certificate:
        response = self.keeper.with_contents(request, partial(self._call, "POST", f"{self._base}/validate"))
        return from_json(Certificate, response.json())

    def run(self, request: Request, tell: Tell = tell_nobody, hear: Hear = hear_nothing) -> Result:
        """Raises what the service says of the request, or ServiceError when it does not answer in time."""
        deadline = time.monotonic() + self._timeout_s
        first_wait_s = _FIRST_WAIT_S if hear is hear_nothing else 0.0  # who logs wants to see how far it is at once
        submit = partial(self._submit, wait_s=min(first_wait_s, self._timeout_s))
        answer = self.keeper.with_contents(request, submit)
        waited = self._await(answer, deadline, tell, hear) if isinstance(answer, str) else answer
        raws, receipt = decode_result(waited)
        decode = value_kind().decode
        return Result(values={name: decode(raw) for name, raw in raws.items()}, receipt=receipt)

    def close(self) -> None:
        self._client.close()

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A call of a route below the model's own. Raises the service's error, or ServiceError when nobody answers."""
        try:
            response = self._client.request(method, f"{self._base}/{path}", **more)
        except httpx.TransportError as error:
            raise _unreachable(self._url, error) from error
        _check(response)
        return response

    def _submit(self, parts: Sequence[bytes | memoryview], *, wait_s: float) -> memoryview | str:
        """The result file, or the place to ask for it when it takes longer."""
        headers = {
            "Content-Type": "application/vnd.safetensors",
            "Content-Length": str(sum(len(part) for part in parts)),
            "Prefer": f"wait={wait_s:.0f}",
        }
        call = self._client.stream(
            "POST", f"{self._base}/requests", content=_pieces(parts), headers=headers, timeout=_timeout(wait_s)
        )
        try:
            with call as response:
                _check(response)
                if response.status_code == 202:
                    return str(response.headers["Location"])
                return _body(response)
        except httpx.TransportError as error:
            raise _unreachable(self._url, error) from error

    def _await(self, location: str, deadline: float, tell: Tell, hear: Hear) -> memoryview:
        """Waits for an accepted request; cancels it when the user or the deadline ends the waiting."""
        try:
            return self._poll(location, deadline, tell, hear)
        except (KeyboardInterrupt, ServiceError):
            self._cancel(location)
            raise

    def _poll(self, location: str, deadline: float, tell: Tell, hear: Hear) -> memoryview:
        """The result of an accepted request; the service may be away for a moment."""
        last_heard = time.monotonic()
        seen = 0  # passes that are known to be done
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ServiceError(f"the request did not finish within {self._timeout_s:.0f} s, so it was cancelled")
            wait_s = min(WAIT_S, left_s)
            try:
                asked = f"{location}?wait={wait_s:.1f}&passes_done={seen}"
                status = self._get(asked, timeout=_timeout(wait_s)).json()
                last_heard = time.monotonic()
                if status.get("passes"):
                    seen = status["passes_done"]
                    tell(seen, status["passes"])
                    hear({log["name"]: _logged(log) for log in status.get("logs", ())})
                if status["state"] in ("done", "failed", "cancelled"):
                    with self._client.stream("GET", f"{location}/result", timeout=_timeout(0)) as response:
                        _check(response)
                        return _body(response)
            except httpx.TransportError as error:
                if time.monotonic() - last_heard > _PATIENCE_S:
                    raise _unreachable(self._url, error) from error
                time.sleep(0.5)

    def _cancel(self, location: str) -> None:
        try:
            self._client.delete(location, timeout=5.0)
        except httpx.HTTPError:
            return  # nobody to tell

    def _only_name(self) -> str:
        names = [entry["name"] for entry in self._json("/v1/models")["models"]]
        if len(names) != 1:
            raise NotFoundError(f"{self._url} has the models {', '.join(names) or '(none)'}: name one of them")
        return str(names[0])

    def _described(self) -> ModelDescription:
        try:
            return from_json(ModelDescription, self._json(self._base))
        except WireError as error:
            raise WireError(f"{self._url} and this client are of different versions of polytrace: {error}") from error

    def _json(self, path: str) -> Any:
        return get_json(self._client, self._url, path)

    def _get(self, path: str, **more: Any) -> httpx.Response:
        response = self._client.get(path, **more)
        _check(response)
        return response

    def _call(self, method: str, path: str, parts: Sequence[bytes | memoryview]) -> httpx.Response:
        headers = {"Content-Length": str(sum(len(part) for part in parts))}
        try:
            response = self._client.request(method, path, content=_pieces(parts), headers=headers)
        except httpx.TransportError as error:
            raise _unreachable(self._url, error) from error
        _check(response)
        return response


def list_models(url: str, *, key: str | None) -> list[dict[str, Any]]:
    """What the service says of each of its models."""
    with make_client(url, key) as client:
        return [dict(entry) for entry in get_json(client, url, "/v1/models")["models"]]


def make_client(url: str, key: str | None) -> httpx.Client:
    """A client of one service. A proxy of the environment is not asked for this machine's own services."""
    host = urlsplit(url).hostname or ""
    is_here = host == "localhost" or host == "::1" or host.startswith("127.")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, headers=headers, timeout=_timeout(0), trust_env=not is_here)


def get_json(client: httpx.Client, url: str, path: str) -> Any:
    """The JSON at a path. Raises the service's own error, or ServiceError when nobody answers."""
    try:
        response = client.get(path)
        _check(response)
        return response.json()
    except httpx.TransportError as error:
        raise _unreachable(url, error) from error
    except ValueError as error:
        raise ServiceError(f"{url}{path} does not answer as a polytrace service does") from error


def _logged(plain: dict[str, Any]) -> Any:
    """A log as a status tells it."""
    data = memoryview(base64.b64decode(plain["data"]))
    return value_kind().decode(RawTensor(dtype=plain["dtype"], shape=tuple(plain["shape"]), data=data))


def _timeout(wait_s: float) -> httpx.Timeout:
    return httpx.Timeout(_SLACK_S + wait_s, connect=10.0, write=60.0, pool=None)


def _pieces(parts: Sequence[bytes | memoryview]) -> Iterator[bytes]:
    """The parts in pieces that a socket likes."""
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _PART_BYTES):
            yield bytes(view[start : start + _PART_BYTES])


def _body(response: httpx.Response) -> memoryview:
    """The whole body in memory of its own, which the values then share."""
    size = int(response.headers.get("Content-Length", 0))
    body, end = bytearray(size), 0
    for piece in response.iter_raw():
        body[end : end + len(piece)] = piece
        end += len(piece)
    return memoryview(body)[:end]


def _check(response: httpx.Response) -> None:
    """Raises the error that an answer tells of."""
    if response.status_code < 400:
        return
    response.read()
    raise _error(response)


def _error(response: httpx.Response) -> PolytraceError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, Mapping) or not isinstance(problem.get("code"), str):
        return ServiceError(f"{response.request.url} answered {response.status_code} {response.reason_phrase}")
    fields = {"code": problem["code"], "message": str(problem.get("detail") or problem.get("title") or "")}
    where = problem.get("where")
    return from_fields(fields | {"where": where} if isinstance(where, str) else fields)


def _unreachable(url: str, error: Exception) -> ServiceError:
    return ServiceError(f"no answer from {url}: {error or type(error).__name__}; is `polytrace serve` running there?")
