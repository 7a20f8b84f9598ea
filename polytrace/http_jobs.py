"""Requests that a service has accepted: asked how they do, waited for, fetched and cancelled, over HTTP.

A service may be away for a moment, and a connection may break in the middle of a result: both are tried again, and a
result is gone on with where it broke.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from typing import Any

import httpx

from polytrace import environment
from polytrace.backend import Result
from polytrace.errors import NotFoundError, ServiceError, from_fields
from polytrace.http_calls import check, make_client, persistently, timeout
from polytrace.jobs import JobStatus, Watch
from polytrace.kinds import value_kind
from polytrace.wire import decode_result

WAIT_S = 50.0  # of one call; the service may wait shorter


@dataclass(frozen=True, slots=True, weakref_slot=True)
class HttpJobs:
    """The jobs of one service."""

    client: httpx.Client
    url: str

    @classmethod
    def connect(cls, url: str, key: str | None) -> HttpJobs:
        jobs = cls(make_client(url, key or environment.key()), url)
        weakref.finalize(jobs, jobs.client.close)
        return jobs

    def running(self, id: str) -> HttpJob:
        """One of them; nobody is asked whether there is one."""
        if not id.isalnum():
            raise NotFoundError(f"{id[:100]!r} is no job's id")
        return HttpJob(self, id)


class HttpJob:
    """`polytrace.jobs.Running` of a service."""

    def __init__(self, jobs: HttpJobs, id: str) -> None:
        self.id = id
        self._jobs = jobs
        self.location = f"/v1/requests/{id}"

    def status(self) -> JobStatus:
        return status_of(self.ask())

    def wait(self, timeout_s: float | None, watch: Watch | None) -> JobStatus:
        deadline = time.monotonic() + timeout_s if timeout_s is not None else None
        seen, told = 0, None
        while True:
            left = WAIT_S if deadline is None else max(0.0, deadline - time.monotonic())
            status = status_of(self.ask(wait_s=min(WAIT_S, left), passes_done=seen))
            seen = status.passes_done
            if watch is not None and status != told:
                watch(status)
                told = status
            if status.is_over or (deadline is not None and time.monotonic() >= deadline):
                return status

    def ask(self, *, wait_s: float = 0.0, passes_done: int = 0) -> Any:
        """The status as JSON; with `wait_s` once it has ended or got further. A service may be away for a moment."""
        path = f"{self.location}?wait={wait_s:.1f}&passes_done={passes_done}" if wait_s else self.location

        def look() -> Any:
            response = self._jobs.client.get(path, timeout=timeout(wait_s))
            check(response)
            return response.json()

        return persistently(self._jobs.url, look)

    def result(self) -> Result:
        return result_of(self.fetch())

    def fetch(self) -> memoryview:
        """The bytes of the result of a request that has ended, or its error raised. Gone on with where it breaks."""
        content, end = bytearray(), 0
        tag: str | None = None

        def go_on() -> memoryview:
            nonlocal content, end, tag
            while True:
                headers = {} if tag is None or not end else {"Range": f"bytes={end}-", "If-Range": tag}
                with self._jobs.client.stream(
                    "GET", f"{self.location}/result", headers=headers, timeout=timeout(0)
                ) as response:
                    check(response)
                    if response.status_code == 202:
                        raise ServiceError(f"job {self.id} has no result yet: wait for it")
                    if response.status_code != 206:
                        end, tag = 0, response.headers.get("ETag")
                        content = bytearray(int(response.headers.get("Content-Length", 0)))
                    for piece in response.iter_raw():
                        content[end : end + len(piece)] = piece
                        end += len(piece)
                    if end >= len(content):
                        return memoryview(content)[:end]

        return persistently(self._jobs.url, go_on, reached=lambda: end)

    def cancel(self) -> None:
        try:
            self._jobs.client.delete(self.location, timeout=5.0)
        except httpx.HTTPError:
            return  # nobody to tell


def result_of(content: memoryview) -> Result:
    """What a result file says."""
    raws, receipt = decode_result(content)
    decode = value_kind().decode
    return Result(values={name: decode(raw) for name, raw in raws.items()}, receipt=receipt)


def status_of(plain: Any) -> JobStatus:
    """A status as the service tells it."""
    names = ("queue_position", "expected_start", "created", "started", "finished", "waits_for")
    known = {name: plain.get(name) for name in names}
    error = plain.get("error")
    return JobStatus(
        id=plain["id"],
        state=plain["state"],
        passes_done=plain.get("passes_done") or 0,
        passes=plain.get("passes") or 0,
        error=from_fields(error) if error else None,
        **known,
    )
