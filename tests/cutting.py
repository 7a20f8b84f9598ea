"""A TCP proxy that cuts connections where a test says: a network as laptops have it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from api.server import bind

# number of the connection, what its client has sent so far -> bytes of the answer that get through, None: all
Rule = Callable[[int, bytes], int | None]


class CuttingProxy:
    """Listens on a port of its own. Each connection is for one server connection."""

    def __init__(self, port: int, rule: Rule) -> None:
        self._port = port
        self._rule = rule
        self._listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            number = self.connections
            self.connections += 1
            threading.Thread(target=self._serve, args=(client, number), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        server = socket.create_connection(("127.0.0.1", self._port))
        asked = bytearray()
        threading.Thread(target=self._ask, args=(client, server, asked), daemon=True).start()
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                limit = self._rule(number, bytes(asked))
                if limit is not None and passed + len(data) > limit:
                    client.sendall(data[: max(0, limit - passed)])
                    self.cuts += 1
                    break
                client.sendall(data)
                passed += len(data)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    @staticmethod
    def _ask(client: socket.socket, server: socket.socket, asked: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                asked += data
                server.sendall(data)
