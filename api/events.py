"""What generations tell while they run: one file of events a request, appended by the controller, read by the gateway.

    events/<id>    a line an event: its kind, a space, JSON

A step costs an append to a file and no word with SQLite. An event's id is the place behind it in the file, so whoever
knows the last one that he had goes on there, whichever gateway he asks.

Invariants
- An event stands once and in its place, whatever becomes of the request: when it runs again it gives the same tokens,
  and those that stand here already are left out.
- The tokens of a sequence stand in their order without a gap. What could not be written on the way is written at the
  end, before the request's state says that it is done, or the request fails.
- Readers take whole lines only; half a line that a dead writer left is cut off by the next one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api.disk import sync
from polytrace.certificate import Generated, Token
from polytrace.codec import to_json
from polytrace.errors import UserError
from scheduling.plan import RequestId

TOKEN, VALUE = "token", "value"  # kinds
READ_BYTES = 256 << 10  # at a time; a line is far shorter
MAX_DATA_BYTES = 1 << 20  # of values' data, in base64, in one file

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """One event as it is told."""

    id: int
    kind: str
    data: str  # JSON


@dataclass(slots=True)
class _Told:
    """What a request's file has."""

    steps: dict[tuple[int, int], int] = field(default_factory=dict)  # by invoke and sequence: its next step
    names: set[str] = field(default_factory=set)  # of values
    data_bytes: int = 0

    def takes(self, token: Token) -> bool:
        """Whether the token is the next one of its sequence; then it counts as told."""
        key = (token.invoke, token.sequence)
        if token.step != self.steps.get(key, 0):
            return False
        self.steps[key] = token.step + 1
        return True

    def line(self, value: dict[str, Any]) -> dict[str, Any]:
        """The value as it is told, with its data while there is room, else with the range of it."""
        self.names.add(value["name"])
        size = len(value.get("data", ""))
        has_room = "data" in value and self.data_bytes + size <= MAX_DATA_BYTES
        self.data_bytes += size if has_room else 0
        other = "range" if has_room else "data"
        return {key: part for key, part in value.items() if key != other}


class EventLog:
    """The files of one store. Any thread; one process writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: dict[RequestId, _Told] = {}
        self._lock = threading.Lock()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, request: RequestId) -> Path:
        """The file, which is there from the first event on."""
        return self._folder / request

    # --- the writer

    def append(self, request: RequestId, tokens: Iterable[Token], values: Iterable[dict[str, Any]] = ()) -> None:
        """Adds what does not stand there yet; a full disk leaves it to `complete`.

        A value is `name`, `dtype`, `shape` and the `range` of its bytes in the result, and `data` in base64.
        """
        try:
            with self._lock:
                self._append(request, tokens, values)
        except OSError:
            _log.exception("events of %s could not be written", request, extra={"request": request})
            self.forget(request)

    def complete(
        self, request: RequestId, generated: Sequence[Generated], values: Iterable[dict[str, Any]] = ()
    ) -> None:
        """All of a generation is there and on the disk when it returns. Raises OSError when that has no room."""
        if not generated:
            return
        try:
            with self._lock:
                self._append(request, tokens_of(generated), values)
            sync(self.path(request))
            sync(self._folder)
        finally:
            self.forget(request)

    def forget(self, request: RequestId) -> None:
        """The memory of a request, which its file can give back."""
        with self._lock:
            self._told.pop(request, None)

    # --- readers

    def read(self, request: RequestId, after: int = 0) -> list[Event]:
        """Events behind the one of this id, in their order: as many as are there, or about READ_BYTES of them.

        Raises UserError when no event has this id, also one that may have it in time: ids are told and not foreseen.
        """
        try:
            fd = os.open(self.path(request), os.O_RDONLY)
        except FileNotFoundError:
            if after > 0:
                raise _unknown(after, "it has none yet") from None
            return []
        try:
            first = max(0, after - 1)
            lines = os.pread(fd, READ_BYTES, first)
            end = os.fstat(fd).st_size
        finally:
            os.close(fd)
        if after > 0:
            if not lines:
                raise _unknown(after, f"the last one so far ends at {end}")
            if lines[:1] != b"\n":
                raise _unknown(after, "it lies inside of one")
            lines = lines[1:]
        events, place = [], after
        for line in lines.split(b"\n")[:-1]:  # what follows the last newline is still being written
            place += len(line) + 1
            kind, _, data = line.decode().partition(" ")
            events.append(Event(place, kind, data))
        return events

    def sweep(self, kept: Iterable[str]) -> int:
        """Removes files of requests that are not among these; how many."""
        names = set(kept)
        stale = [path for path in self._folder.iterdir() if path.name not in names]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)

    # --- inside

    def _append(self, request: RequestId, tokens: Iterable[Token], values: Iterable[dict[str, Any]]) -> None:
        told = self._told.get(request)
        if told is None:
            told = self._told[request] = self._recovered(request)
        lines = [_line(TOKEN, _plain(token)) for token in tokens if told.takes(token)]
        for value in values:
            if value["name"] not in told.names:
                lines.append(_line(VALUE, told.line(value)))
        if not lines:
            return
        fd = os.open(self.path(request), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            content = b"".join(lines)
            if os.write(fd, content) != len(content):
                raise OSError("short write")
        finally:
            os.close(fd)

    def _recovered(self, request: RequestId) -> _Told:
        """What the file of a request has that somebody else, or nobody, has written; without half a line at its end."""
        told = _Told()
        try:
            content = self.path(request).read_bytes()
        except FileNotFoundError:
            return told
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path(request), whole)
        for line in content[:whole].splitlines():
            kind, _, data = line.decode().partition(" ")
            plain = json.loads(data)
            if kind == TOKEN:
                told.steps[plain["invoke"], plain["sequence"]] = plain["step"] + 1
            else:
                told.line(plain)
        return told


def tokens_of(generated: Sequence[Generated]) -> list[Token]:
    """The tokens of sequences step by step, as they came."""
    tokens = []
    for one in generated:
        last = len(one.ids) - 1
        for step, token in enumerate(one.ids):
            tokens.append(
                Token(
                    invoke=one.invoke,
                    sequence=one.sequence,
                    step=step,
                    id=token,
                    logprob=one.logprobs[step] if one.logprobs else None,
                    likeliest=one.likeliest[step] if one.likeliest else (),
                    finish=one.finish if step == last else None,
                )
            )
    return sorted(tokens, key=lambda token: (token.step, token.invoke, token.sequence))


def _unknown(event: int, why: str) -> UserError:
    told = f"no event of this request has the id {event}: {why}"
    return UserError(f"{told}; without Last-Event-ID they come from the first one")


def _plain(token: Token) -> dict[str, Any]:
    """Without what is not said."""
    return {key: value for key, value in to_json(token).items() if value is not None and value != []}


def _line(kind: str, plain: dict[str, Any]) -> bytes:
    return f"{kind} {json.dumps(plain, separators=(',', ':'))}\n".encode()
