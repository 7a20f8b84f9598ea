"""A `polytrace serve` of its own, as a user would start it: a child process on a free port, ended with the block."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 30.0


class ServiceDidNotStartError(RuntimeError):
    """The message has the end of the service's log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A service that answers."""

    url: str
    log: Path
    start_seconds: float  # from the process' start to ready


@contextlib.contextmanager
def running_service(
    model: str | Path,
    *,
    name: str,
    stages: int,
    ranks: int,
    log: Path,
    cpus: int | None = None,
    key: str | None = None,
    settings: Mapping[str, str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Service]:
    """Starts a service, waits until every shard is loaded and self-tested, and stops it when the block ends.

    `cpus`: of each shard; None: a small share. `key`: an operator's; None: a service without keys. `settings`: more
    environment variables for the service. `report` gets the last line of the service's log about three times a
    second while it starts.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "api.commands", "serve", str(model)),
        *("--name", name, "--stages", str(stages), "--ranks", str(ranks), "--port", str(port)),
        *(() if cpus is None else ("--cpus", str(cpus))),
        *(() if key is not None else ("--without-keys",)),
    ]
    environment = os.environ | dict(settings or {}) | ({} if key is None else {"POLYTRACE_KEY": key})
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        start = time.monotonic()
        # Its own session, so that Ctrl-C reaches it once, through the block's end.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log, report)
            yield Service(url=url, log=log, start_seconds=time.monotonic() - start)
        finally:
            _stop(process)


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux, what makes the child hear SIGTERM when the thread that started it is gone, however it went."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>

    def in_child() -> None:
        libc.prctl(set_parent_death_signal, signal.SIGTERM)

    return in_child


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, report: Callable[[str], None]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServiceDidNotStartError(f"the service ended with {process.returncode}:\n{_tail(log)}")
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/readyz").status_code == 200:
                    return
            report(_last_line(log))
            time.sleep(0.3)
    raise ServiceDidNotStartError(f"the service was not ready after {_START_TIMEOUT_S:.0f} s:\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As a user would, by SIGTERM; what does not listen is ended with its whole session."""
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "starting"


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-25:])
