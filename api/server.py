"""uvicorn around the gateway's application, with the settings that this service needs."""

from __future__ import annotations

import socket
from typing import Any, cast

import uvicorn

from api.connections import Connections, most_connections
from api.gateway import Gateway
from api.settings import GatewaySettings


class GatewayServer(uvicorn.Server):
    """Serves until told to stop; then lets waiting calls answer before it closes their connections."""

    def __init__(self, gateway: Gateway, settings: GatewaySettings) -> None:
        connections = Connections(
            most=most_connections(settings.max_connections),
            head_s=settings.head_s,
            read_idle_s=settings.read_idle_s,
        )
        super().__init__(
            uvicorn.Config(
                gateway.app(),
                http=cast(Any, connections.make),
                ws="none",
                log_config=None,  # its lines are among ours (`api.log_lines`)
                log_level="error",  # what strangers send is no news
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,  # longer than the pauses of a notebook's client pool
                timeout_graceful_shutdown=max(1, round(settings.shutdown_s)),
            )
        )
        self._gateway = gateway

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gateway.release()
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Bound before anything is started, so that a taken port is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener
