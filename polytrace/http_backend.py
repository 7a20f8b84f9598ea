"""A model that a service runs, over HTTP. Knows the gateway's routes, and nothing of traces or torch.

A request is sent once, or again under the same idempotency key when nobody answers, and then waited for: first inside
the call that sends it, then by long polls; who hears tokens follows its events instead. Whoever stops waiting (Ctrl-C,
a time-out, an error of who hears) cancels it.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx

from polytrace.backend import Result
from polytrace.certificate import Certificate, Token
from polytrace.codec import from_json
from polytrace.description import ModelDescription, SiteInfo
from polytrace.errors import NotFoundError, ServiceError, UserError, WireError
from polytrace.graph import Inputs, Request
from polytrace.http_calls import body, call, check, get_json, make_client, persistently, pieces, timeout, told_url
from polytrace.http_events import follow
from polytrace.http_jobs import WAIT_S, HttpJob, HttpJobs, result_of
from polytrace.http_keeper import HttpKeeper
from polytrace.http_sites import HttpSites
from polytrace.kinds import value_kind
from polytrace.program import __version__
from polytrace.progress import Hear, HearTokens, Tell, hear_no_tokens, hear_nothing, tell_nobody
from polytrace.tensors import RawTensor
from polytrace.versions import PROGRAM_HEADER, check_versions

_FIRST_WAIT_S = 10.0  # of the call that sends the request: what takes longer is asked how far it is


class HttpBackend:
    """One model of a service. Threads may share it."""

    def __init__(self, url: str, name: str | None, *, key: str | None, timeout_s: float) -> None:
        self._url = told_url(url)
        self._timeout_s = timeout_s
        self._client = make_client(url, key)
        weakref.finalize(self, self._client.close)  # notebooks rarely close what they opened
        try:
            self.name = name if name is not None else self._only_name()
            self._base = f"/v1/models/{quote(self.name, safe='')}"
            self._description = self._described()
            self.keeper = HttpKeeper(self._client, self._url)
            self._jobs = HttpJobs(self._client, self._url)
            self._sites = HttpSites(lambda asked: self.ask("POST", "sites", json=asked).json())
        except BaseException:
            self._client.close()
            raise

    def describe(self) -> ModelDescription:
        return self._description

    def tokenizer_json(self) -> bytes | None:
        try:
            return self.ask("GET", "tokenizer").content
        except NotFoundError:
            return None

    def validate(self, request: Request) -> Certificate:
        response = self.keeper.with_contents(request, partial(self._call, "POST", f"{self._base}/validate"))
        return from_json(Certificate, response.json())

    def run(
        self,
        request: Request,
        tell: Tell = tell_nobody,
        hear: Hear = hear_nothing,
        hear_tokens: HearTokens = hear_no_tokens,
    ) -> Result:
        """Raises what the service says of the request, or ServiceError when it does not answer in time."""
        deadline = time.monotonic() + self._timeout_s
        is_heard = hear is not hear_nothing or hear_tokens is not hear_no_tokens  # who listens does so from the start
        wait_s = min(0.0 if is_heard else _FIRST_WAIT_S, self._timeout_s)
        key = _new_key()
        try:
            answer = self.keeper.with_contents(request, partial(self._submit, key, wait_s, "interactive"))
        except (KeyboardInterrupt, SystemExit):
            self._take_back(key)
            raise
        if isinstance(answer, HttpJob):
            if hear_tokens is not hear_no_tokens:
                self._await(answer, partial(self._listen, answer, deadline, hear, hear_tokens))
            else:
                self._await(answer, partial(self._poll, answer, deadline, tell, hear))
            return answer.result()
        return result_of(answer)

    def submit(self, request: Request, *, is_interactive: bool = False) -> HttpJob:
        """Sends the request and waits for nothing but that it is accepted (`polytrace.jobs`)."""
        queue = "interactive" if is_interactive else "batch"
        answer = self.keeper.with_contents(request, partial(self._submit, _new_key(), 0.0, queue))
        assert isinstance(answer, HttpJob)
        return answer

    def sites_of(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> tuple[SiteInfo, ...]:
        """As `polytrace.whole_model.CallBackend`."""
        return self._sites.of(inputs, constants)

    def weight_behind(self, _tensor: Any) -> None:
        """The model's weights are on the service."""

    def processor(self) -> None:
        """The service's files do not come here."""

    def close(self) -> None:
        self._client.close()

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A call of a route below the model's own. Raises the service's error, or ServiceError when nobody answers."""
        return call(self._client, self._url, method, f"{self._base}/{path}", **more)

    def _submit(self, key: str, wait_s: float, queue: str, parts: Sequence[bytes | memoryview]) -> memoryview | HttpJob:
        """The result file, or the job when it takes longer. Sent again, under the same key, when nobody answers."""
        headers = {
            "Content-Type": "application/vnd.safetensors",
            "Content-Length": str(sum(len(part) for part in parts)),
            "Idempotency-Key": key,
            "Prefer": f"wait={wait_s:.0f}",
            "X-Polytrace-Class": queue,
        }

        def send() -> memoryview | HttpJob:
            with self._client.stream(
                "POST", f"{self._base}/requests", content=pieces(parts), headers=headers, timeout=timeout(wait_s)
            ) as response:
                check(response)
                if response.status_code == 202 or not wait_s:  # one sent again may be done already
                    return self._jobs.running(response.headers["X-Request-Id"])
                return body(response)

        return persistently(self._url, send)

    def _take_back(self, key: str) -> None:
        """Nobody waits any more for what was sent under this key, whether it was accepted or not."""
        with contextlib.suppress(httpx.HTTPError):
            self._client.delete(f"{self._base}/requests", headers={"Idempotency-Key": key}, timeout=5.0)

    def _await(self, job: HttpJob, wait: Callable[[], None]) -> None:
        """Waits for an accepted request; cancels it when the user or the deadline ends the waiting."""
        try:
            wait()
        except BaseException as error:
            if not isinstance(error, UserError):  # else it has ended by itself
                job.cancel()
            raise

    def _listen(self, job: HttpJob, deadline: float, hear: Hear, hear_tokens: HearTokens) -> None:
        """Until the request has ended; its tokens and logs are heard as they come."""
        for event in follow(self._client, self._url, job.location, deadline):
            if event.kind == "token":
                hear_tokens([from_json(Token, event.data)])
            elif event.kind == "value" and "data" in event.data:
                hear({event.data["name"]: _logged(event.data)})

    def _poll(self, job: HttpJob, deadline: float, tell: Tell, hear: Hear) -> None:
        """Until the request has ended; the service may be away for a moment."""
        seen = 0  # passes that are known to be done
        while (left_s := deadline - time.monotonic()) > 0:
            status = job.ask(wait_s=min(WAIT_S, left_s), passes_done=seen)
            if status.get("passes"):
                seen = status["passes_done"]
                tell(seen, status["passes"])
                hear({log["name"]: _logged(log) for log in status.get("logs", ())})
            if status["state"] in ("done", "failed", "cancelled"):
                return
        raise ServiceError(f"the request did not finish within {self._timeout_s:.0f} s, so it was cancelled")

    def _only_name(self) -> str:
        names = [entry["name"] for entry in self._json("/v1/models")["models"]]
        if len(names) != 1:
            raise NotFoundError(f"{self._url} has the models {', '.join(names) or '(none)'}: name one of them")
        return str(names[0])

    def _described(self) -> ModelDescription:
        answer = call(self._client, self._url, "GET", self._base)
        check_versions(self._url, answer.headers)
        try:
            return from_json(ModelDescription, answer.json())
        except ValueError as error:
            raise ServiceError(f"{self._url}{self._base} does not answer as a polytrace service does") from error
        except WireError as error:
            theirs = answer.headers.get(PROGRAM_HEADER, "of an unknown version")
            told = (
                f"{self._url} is polytrace {theirs}, this client is {__version__}, and they describe models otherwise"
            )
            raise WireError(f"{told}: {error}") from error

    def _json(self, path: str) -> Any:
        return get_json(self._client, self._url, path)

    def _call(self, method: str, path: str, parts: Sequence[bytes | memoryview]) -> httpx.Response:
        headers = {"Content-Length": str(sum(len(part) for part in parts))}
        return call(self._client, self._url, method, path, content=pieces(parts), headers=headers)


def list_models(url: str, *, key: str | None) -> list[dict[str, Any]]:
    """What the service says of each of its models."""
    with make_client(url, key) as client:
        return [dict(entry) for entry in get_json(client, url, "/v1/models")["models"]]


def _new_key() -> str:
    """Of one submit, however often it is sent."""
    return secrets.token_hex(16)


def _logged(plain: dict[str, Any]) -> Any:
    """A log as a status tells it."""
    data = memoryview(base64.b64decode(plain["data"]))
    return value_kind().decode(RawTensor(dtype=plain["dtype"], shape=tuple(plain["shape"]), data=data))
