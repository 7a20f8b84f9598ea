"""A PostgreSQL server of a test's own, from the system's packages: in a folder, on a socket there and nowhere else."""

from __future__ import annotations

import contextlib
import getpass
import glob
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

_counter = itertools.count()


def why_no_postgres() -> str | None:
    """Why no server can be started here; None where one can."""
    if _programs() is None:
        return "no PostgreSQL server is installed (initdb, postgres)"
    if os.geteuid() == 0 and not _has_user("postgres"):
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


class Postgres:
    """A server. `start`, `stop` and `kill` may be called again and again; `close` removes all of it."""

    def __init__(self, *, is_durable: bool = False) -> None:
        """`is_durable`: what it has committed survives `kill`."""
        programs = _programs()
        assert programs is not None
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="ptpg", dir="/tmp"))  # a short path, as sockets need it
        self.user = "postgres" if os.geteuid() == 0 else getpass.getuser()
        self._as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = pwd.getpwnam("postgres")
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self._as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        self._options = [] if is_durable else ["-c", "fsync=off", "-c", "synchronous_commit=off"]
        self._server: subprocess.Popen[bytes] | None = None
        self._run("initdb", "--no-sync", "-A", "trust", "-U", self.user, "-D", str(self.folder / "data"))
        self._template: str | None = None

    def url(self, name: str = "postgres") -> str:
        return f"postgresql://{self.user}@/{name}?host={self.folder}"

    def start(self) -> None:
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder)]
        command += ["-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-c", "max_connections=60", *self._options]
        with (self.folder / "server.log").open("ab") as log:
            self._server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self._as_user)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url(), connect_timeout=5).close()
                return
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
            time.sleep(0.05)

    def is_running(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def stop(self) -> None:
        """As an operator stops it: connections are ended."""
        if self._server is not None:
            self._server.send_signal(2)  # SIGINT: fast
            self._server.wait(timeout=60)
            self._server = None

    def kill(self) -> None:
        """As a machine loses it."""
        if self._server is not None:
            self._server.send_signal(3)  # SIGQUIT: at once, without a checkpoint
            self._server.wait(timeout=60)
            self._server = None

    def empty_database(self) -> str:
        """The URL of a new database without tables."""
        name = f"t{next(_counter)}"
        self._ask(f"CREATE DATABASE {name}")
        return self.url(name)

    def database(self) -> str:
        """The URL of a new database that has the store's tables."""
        from api.database import open_database

        if self._template is None:
            made = self.empty_database()
            open_database(made).close()
            self._template = made.partition("@/")[2].partition("?")[0]
        name = f"t{next(_counter)}"
        self._ask(f"CREATE DATABASE {name} TEMPLATE {self._template} STRATEGY FILE_COPY")
        return self.url(name)

    def close(self) -> None:
        self.kill()  # nobody wants what it has
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, query: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(query)  # type: ignore[call-overload]

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._as_user)


def _programs() -> Path | None:
    """The folder with the server's programs, of the newest version there is."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda folder: float(folder.split("/")[4]))
    if (found := shutil.which("initdb")) is not None:
        folders.append(str(Path(found).resolve().parent))
    return next((Path(one) for one in reversed(folders) if (Path(one) / "postgres").exists()), None)


def _has_user(name: str) -> bool:
    with contextlib.suppress(KeyError):
        pwd.getpwnam(name)
        return True
    return False
