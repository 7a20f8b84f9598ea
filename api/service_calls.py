"""A running service, as the commands ask it: over the client's own calls, so that its problems are the client's errors.

Knows no command. What is heavy is imported when something is asked.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from api.console import progress

if TYPE_CHECKING:
    import httpx

Entry = dict[str, Any]  # a deployment, as `GET /v1/models` tells it

LOOK_S = 0.5  # between two looks at what is followed
_GOES_ON = "this goes on in the service, also without this command: `polytrace status` shows it"
_LESS = "a shard reserves less of the CPUs when `polytrace remove {0}` is done and it is deployed with a smaller --cpus"


class Service:
    """A service from outside. Its problems are raised as the errors that they were."""

    def __init__(self, url: str, key: str | None) -> None:
        from polytrace.http_calls import make_client, told_url

        self._url = told_url(url.rstrip("/"))
        self._client = make_client(url.rstrip("/"), key or os.environ.get("POLYTRACE_KEY"))
        weakref.finalize(self, self._client.close)

    def ask(self, method: str, path: str, **more: Any) -> Any:
        """The JSON of an answer; None where it has no body."""
        from polytrace.http_calls import json_of

        answer = self._call(method, path, **more)
        return json_of(answer) if answer.content else None

    def headers(self, path: str) -> dict[str, str]:
        """What a path's answer has beside its body, by lower-case names."""
        return {name.lower(): value for name, value in self._call("GET", path).headers.items()}

    def text(self, path: str, **more: Any) -> str:
        """What a path has as text."""
        return self._call("GET", path, **more).text

    def download(self, path: str, to: Path) -> int:
        """Writes a result into a file, which is whole or not there. Its bytes. ConflictError while there is none."""
        import httpx

        from polytrace.errors import ConflictError, ServiceError
        from polytrace.http_calls import check

        part = to.with_name(f"{to.name}.part")
        try:
            with self._client.stream("GET", path) as answer:
                check(answer)
                if answer.status_code == 202:
                    answer.read()
                    told = answer.json()
                    raise ConflictError(f"{told['id']} is {told['state']}: there is no result yet; ask again later")
                with part.open("wb") as file:
                    for piece in answer.iter_bytes(4 << 20):
                        file.write(piece)
            part.replace(to)
        except httpx.HTTPError as error:
            raise ServiceError(f"the result did not come whole from {self._url}: {error}") from error
        finally:
            part.unlink(missing_ok=True)
        return to.stat().st_size

    def deployments(self) -> list[Entry]:
        return list(self.ask("GET", "/v1/models")["models"])

    def deployment(self, name: str) -> Entry | None:
        """None: there is none of that name."""
        return next((one for one in self.deployments() if one["name"] == name), None)

    def follow(self, name: str, first: str, is_so: Callable[[Entry | None], bool]) -> Entry | None:
        """Shows how a deployment gets on until it is what was asked for, which is returned; None: it is gone.
        ServiceError when it has failed.

        Whoever has to wait for room, or stops following, is told that the service goes on by itself.
        """
        from polytrace.errors import ServiceError

        told = ""
        is_waiting = False
        with progress(first) as report, _telling_who_leaves(report):
            while True:
                entry = self.deployment(name)
                line = "gone" if entry is None else f"{entry['state']}: {entry['progress']}"
                if line != told:
                    told = line
                    report(line)
                if is_so(entry):
                    return entry
                if entry is not None and not is_waiting and _waits_for_room(entry):
                    is_waiting = True
                    less = "" if _waits_for_gpus(entry) else f"; {_LESS.format(name)}"
                    report(f"{_GOES_ON}{less}")
                if entry is None or entry["state"] == "failed":
                    raise ServiceError(f"{name} is {line}")
                time.sleep(LOOK_S)

    def _call(self, method: str, path: str, **more: Any) -> httpx.Response:
        from polytrace.http_calls import call

        return call(self._client, self._url, method, path, **more)


def _waits_for_room(entry: Entry) -> bool:
    return "waiting" in (entry["state"], *(one["state"] for one in entry["replicas"]))


def _waits_for_gpus(entry: Entry) -> bool:
    told = [one["progress"] for one in (entry, *entry["replicas"]) if one["state"] == "waiting"]
    return any("GPU" in one for one in told)


@contextlib.contextmanager
def _telling_who_leaves(report: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        report(_GOES_ON)
        raise
