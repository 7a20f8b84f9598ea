"""The events of a request that a service runs, as they come: server-sent, gone on with after every lost connection.

Knows the route of events and nothing of how a request is sent or its result read (`polytrace.http_backend`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import httpx

from polytrace.errors import ServiceError, WireError
from polytrace.http_calls import check, timeout, unreachable

_PATIENCE_S = 30.0  # a request outlives a service, or a connection, that is away this long
_PAUSE_S = 0.5
END = "end"  # the kind of the last event


class Event(NamedTuple):
    """One event."""

    id: str
    kind: str
    data: Any  # JSON


def follow(client: httpx.Client, url: str, location: str, deadline: float) -> Iterator[Event]:
    """The events of the request at `location`, each once, up to its end.

    Raises the service's error, and ServiceError when `deadline` (of `time.monotonic`) has come or nobody answers. Who
    stops iterating leaves the request to the service, which cancels it when nobody comes back.
    """
    last_id: str | None = None
    last_heard = time.monotonic()
    while True:
        headers = {"Accept": "text/event-stream"} | ({} if last_id is None else {"Last-Event-ID": last_id})
        path = f"{location}/events?cancel_on_disconnect=true"
        try:
            with client.stream("GET", path, headers=headers, timeout=timeout(0)) as response:
                check(response)
                for event in parse(_heard(response.iter_lines(), deadline)):
                    yield event
                    last_id, last_heard = event.id, time.monotonic()
                    if event.kind == END:
                        return
        except httpx.TransportError as error:
            if time.monotonic() - last_heard > _PATIENCE_S:
                raise unreachable(url, error) from None
        if time.monotonic() > deadline:
            raise _late()
        time.sleep(_PAUSE_S)  # the gateway is starting again


def parse(lines: Iterable[str]) -> Iterator[Event]:
    """The events that lines say. One that is cut off is none."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            if name:  # else it is a comment
                fields[name] = value.removeprefix(" ")
            continue
        if "data" in fields:
            try:
                yield Event(fields.get("id", ""), fields.get("event", ""), json.loads(fields["data"]))
            except ValueError as error:
                raise WireError(f"an event of the service is not JSON: {error}") from error
        fields = {}


def _heard(lines: Iterable[str], deadline: float) -> Iterator[str]:
    for line in lines:
        yield line
        if not line and time.monotonic() > deadline:
            raise _late()


def _late() -> ServiceError:
    return ServiceError("the request did not finish in time, so it was cancelled")
