"""The service's two child processes: `python -m api.children gateway|controller SETTINGS`.

Each ends when its supervisor tells it to (SIGTERM) or is gone (its end of the lifeline, a pipe, closes), so that
nothing outlives a supervisor that was killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from api import log_lines
from api.settings import GatewaySettings, quota_bytes
from cluster.config import ControllerConfig
from polytrace.codec import from_json
from polytrace.collector import settle

GRACE_S = 10.0  # from the wish to end to the end, at most


def main() -> None:
    """The command line of a child. The lifeline and, for the gateway, the listening socket are open descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's business
    role, settings, lifeline = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    log_lines.configure(role)
    if role == "gateway":
        run_gateway(from_json(GatewaySettings, settings), int(sys.argv[4]), lifeline)
    else:
        run_controller(from_json(ControllerConfig, settings), sys.argv[4], lifeline)


def run_gateway(settings: GatewaySettings, listener_fd: int, lifeline: int) -> None:
    """Serves HTTP on a listening socket that the supervisor made."""
    from api.gateway import Gateway
    from api.opening import open_store
    from api.otlp import traces
    from api.server import GatewayServer
    from api.worker import CheckerPool

    store = open_store(Path(settings.store), quota_bytes=settings.quota_bytes)
    store.traces = traces("gateway")
    checker = CheckerPool(store.folder, settings.checkers, max_text_chars=settings.max_text_chars)
    server = GatewayServer(Gateway(store, settings, checker, os.environ.get("POLYTRACE_KEY") or None), settings)

    def stop() -> None:
        server.should_exit = True

    _watch(lifeline, stop)
    settle()
    server.run(sockets=[socket.socket(fileno=listener_fd)])
    store.close()


def run_controller(config: ControllerConfig, store_folder: str, lifeline: int) -> None:
    """Joins Ray, and serves the deployments that the store wants."""
    from api.opening import forget_database, open_store
    from api.otlp import traces
    from api.patience import patient
    from cluster.controller import Controller

    store = open_store(Path(store_folder), quota_bytes=quota_bytes(), counts_as="controller")
    store.traces = traces("controller")
    controller = Controller(patient(store), config)
    forget_database()  # shards have no use for it

    def stop() -> None:
        if not controller.stop():  # it is still starting: nothing to save, and Ray cannot be interrupted
            os._exit(0)

    rearm = _watch(lifeline, stop)
    controller.start()
    rearm()  # Ray put its own handler in
    settle()
    controller.run_forever()
    store.tally.save()
    if store.traces is not None:
        store.traces.close()


def _watch(lifeline: int, stop: Callable[[], None]) -> Callable[[], None]:
    """Calls `stop` once, from a thread, at SIGTERM or when the supervisor is gone; ends the process if that takes too
    long.

    A signal handler runs in the middle of anything, so it only writes to a pipe. Returns what installs the handler
    again.
    """
    told, tell = os.pipe()

    def on_signal(number: int, frame: FrameType | None) -> None:
        os.write(tell, b"\0")

    def watch() -> None:
        select.select([lifeline, told], [], [])
        stop()
        threading.Event().wait(GRACE_S)
        os._exit(1)

    def arm() -> None:
        signal.signal(signal.SIGTERM, on_signal)

    arm()
    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    return arm


if __name__ == "__main__":
    main()
