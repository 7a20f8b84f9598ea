"""The connections that callers open, and what each may cost: time until its head is there, bytes of it, and how slowly
it takes an answer.

uvicorn's own, with the ends that it lacks. A connection without a request under way is one that waits. When there are
as many connections as may be, the one that has waited longest makes room for the next; when none waits, the next is
told 503. Who is answered before his whole body was read hears it, and nothing more of his is parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import resource
import socket
import struct
import termios
from http import HTTPStatus
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from api.problems import MEDIA_TYPE, RETRY_AFTER_S, body_of
from api.uploads import SLOWEST

MAX_HEAD_BYTES = 64 << 10  # of a request line and headers
LINGER_S, LINGER_BYTES = 2.0, 8 << 20  # of a body that nobody reads, until its sender has heard why
OWN_FILES = 256  # descriptors that connections leave for everything else


class Connections:
    """Those of one server. Belongs to one event loop.

    `head_s`: until a whole request line and headers are there. `read_idle_s`: over so many seconds a caller takes at
    least SLOWEST bytes a second of what he asked for.
    """

    def __init__(self, *, most: int, head_s: float, read_idle_s: float) -> None:
        self.most = most
        self.head_s = head_s
        self.read_idle_s = read_idle_s
        self.waiting: dict[Connection, None] = {}  # who has waited longest is first

    def make(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> Connection:
        """A new one, as uvicorn asks for it."""
        return Connection(self, config, server_state, app_state, _loop)


class Connection(HttpToolsProtocol):
    """One connection: its requests come one after another."""

    def __init__(
        self,
        among: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._among = among
        self._head_timer: asyncio.TimerHandle | None = None
        self._reader_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of a head that is not whole yet
        self._num_heads = 0
        self._has_begun = False  # with a head
        self._refusal: tuple[HTTPStatus, str] | None = None
        self._lingered: int | None = None  # bytes that came after the last answer; None: it is not over

    # --- what the transport tells

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._among.most:
            longest = next(iter(self._among.waiting), None)
            if longest is None:
                told = f"{self._among.most} connections are open, the most there may be; try again later"
                self._write(HTTPStatus.SERVICE_UNAVAILABLE, told)
                self.transport.close()
                return
            longest.transport.abort()
            self._among.waiting.pop(longest)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._among.waiting.pop(self, None)
        self._end_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingered is not None:
            self._lingered += len(data)
            if self._lingered > LINGER_BYTES:
                self.transport.close()
            return
        was_waiting, heads = self._is_waiting(), self._num_heads
        super().data_received(data)
        if was_waiting and self._num_heads == heads and not self.transport.is_closing():
            self._await_head()  # something has come, if only a newline
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end_with(*_TOO_LONG)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reader_timer is None:
            self._watch_reader(self._unread_bytes())

    def resume_writing(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None
        super().resume_writing()

    # --- what the parser tells

    def on_message_begin(self) -> None:
        self._has_begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._has_begun = False
        self._num_heads += 1
        self._head_bytes = 0
        self._among.waiting.pop(self, None)
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _TOO_LONG
            raise ValueError(_TOO_LONG[1])  # ends the parsing; the parser's caller answers
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # what is wrong came behind a request that is being answered
        else:
            self._end_with(*(self._refusal or (HTTPStatus.BAD_REQUEST, "what came is not HTTP/1.1")))

    # --- what the application does

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def answered(scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                if message["type"] == "http.response.start" and cycle.more_body:
                    cycle.keep_alive = False  # so it is told
                    await send(message)
                    cycle.keep_alive = True  # and done by `on_response_complete`
                    return
                await send(message)
                if cycle.disconnected and message.get("more_body"):
                    raise _LeftError

            with contextlib.suppress(_LeftError):
                await app(scope, receive, sent)

        super()._start_asgi_task(cycle, answered)

    def on_response_complete(self) -> None:
        is_last = self.cycle.response_complete  # else one that came behind this answer's is parsed already
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if is_last and self.cycle.more_body:
            self._linger()
        elif is_last and self._has_begun:
            self._await_head()
        elif is_last:
            self._among.waiting[self] = None

    # --- inside

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._among.waiting.setdefault(self, None)
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._among.head_s, self.transport.abort)

    def _watch_reader(self, unread: int) -> None:
        """Looks again whether enough of an answer was taken, for as long as no more of it can be written."""

        def look() -> None:
            left = self._unread_bytes()
            if unread - left < SLOWEST * self._among.read_idle_s:
                _forget_unsent(self._fileno())
                self.transport.abort()
            else:
                self._watch_reader(left)

        self._reader_timer = self.loop.call_later(self._among.read_idle_s, look)

    def _unread_bytes(self) -> int:
        """What was written and has not come to the other side, the system's own buffer included."""
        return self.transport.get_write_buffer_size() + _unsent(self._fileno())

    def _fileno(self) -> int:
        return int(self.transport.get_extra_info("socket").fileno())

    def _end_with(self, status: HTTPStatus, told: str) -> None:
        """An answer to what is no request, and the end."""
        self._write(status, told)
        self._linger()

    def _write(self, status: HTTPStatus, told: str) -> None:
        body = json.dumps(body_of(status, told)).encode()
        again = f"retry-after: {RETRY_AFTER_S}\r\n" if status is HTTPStatus.SERVICE_UNAVAILABLE else ""
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n{again}"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)

    def _linger(self) -> None:
        """Ends the connection, a moment later: who is still sending would else not hear what was answered."""
        self._among.waiting.pop(self, None)
        self._end_timers()
        self._lingered = 0
        self.transport.write_eof()
        self._head_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _end_timers(self) -> None:
        self._unset_keepalive_if_required()
        for timer in (self._head_timer, self._reader_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._reader_timer = None


class _LeftError(Exception):
    """The caller has left: nothing more is read for him."""


_TOO_LONG = (
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"a request line and its headers have at most {MAX_HEAD_BYTES} bytes",
)


def _unsent(fd: int) -> int:
    """Bytes in the system's buffer of a socket that the other side has not acknowledged."""
    (count,) = struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, b"\0\0\0\0"))
    return int(count)


def _forget_unsent(fd: int) -> None:
    """A socket that is closed does not keep what was written until the other side has it, as it else would."""
    with socket.socket(fileno=os.dup(fd)) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def most_connections(wanted: int) -> int:
    """So many connections as this process may have descriptors for, at most `wanted`; raises its own limit for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = max(soft, wanted + OWN_FILES)
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(hard, need)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(16, min(wanted, soft - OWN_FILES))
