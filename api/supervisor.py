"""One service as a family of processes: this one, the gateway, and the controller with its Ray cluster.

Owns their lives: starts them, restarts one that breaks, on SIGTERM or Ctrl-C lets them finish what was accepted
(`api.stopping`) and ends all of them, and leaves none behind. The listening socket, the store's folder and Ray's
scratch folder are made here and outlive a restart of either child. Serves nothing itself and never imports torch or
Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import httpx

from api.away import AwayError
from api.children import GRACE_S
from api.first_key import let_in
from api.opening import places_in
from api.processes import adopt_orphans, end_descendants
from api.server import bind
from api.settings import ServeSettings, gateway_settings, is_ray_token_given, ray_auth_mode
from api.stopping import finish_accepted, what_is_left
from api.store import Store
from cluster.config import ControllerConfig, address_file, jobs_file
from cluster.requests import DeploymentState
from polytrace.codec import to_json
from polytrace.errors import ServiceError, UserError

MAX_RESTARTS = 3  # of children within the window below; then the service gives up
RESTART_WINDOW_S = 600.0
POLL_S = 0.1
SCRATCH_MIN_AGE_S = 60.0  # a younger folder without an owner may be about to be locked

Report = Callable[[str], None]


class Supervisor:
    """Runs one service until it is told to stop. `report` gets lines of progress for people."""

    def __init__(self, settings: ServeSettings, report: Report) -> None:
        self._settings = settings
        self._report = report
        self._num_signals = 0  # that told it to stop
        self._was_ready = False
        self._told: dict[str, tuple[DeploymentState, str]] = {}  # what was last said of each deployment
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts: list[float] = []  # when, lately

    @property
    def url(self) -> str:
        """Where the gateway is reached from this machine; known once `run` has the socket."""
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, on_ready: Callable[[str], None], on_begun: Callable[[], None] = lambda: None) -> None:
        """Blocks until SIGTERM or Ctrl-C, or until the service cannot go on: ServiceError. Main thread only.

        `on_begun` is called when nothing stands in the way of a start, `on_ready` once with the URL.
        """
        adopt_orphans()
        with self._signals(), self._socket(), self._folders():
            try:
                on_begun()
                self._report(where_it_keeps(self._settings, self._store.folder.resolve()))
                for role in ("gateway", "controller"):
                    self._children[role] = self._start(role)
                self._watch(on_ready)
            finally:
                self._end_all()
            folder = None if self._settings.store is None else str(self._store.folder.resolve())
            self._report(what_is_left(self._store, None if self._goes else folder or "its database"))

    # --- what the children share

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(number: int, frame: FrameType | None) -> None:
            self._num_signals += 1

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def _socket(self) -> Iterator[None]:
        host, port = self._settings.host, self._settings.port
        try:
            self._listener = bind(host, port)
        except OSError as error:
            raise UserError(f"{host}:{port} cannot be listened on: {error.strerror}; choose another --port") from error
        self._lifeline, self._lifeline_end = os.pipe()  # nobody writes: it closes when this process is gone
        try:
            yield
        finally:
            self._listener.close()
            os.close(self._lifeline)
            os.close(self._lifeline_end)

    @contextlib.contextmanager
    def _folders(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._settings.store is None:
                folder = stack.enter_context(scratch("polytrace-scratch-", tempfile.gettempdir())) / "store"
            else:
                folder = Path(self._settings.store)
            self._store = Store(folder, database=self._settings.database, objects=self._settings.objects)
            stack.callback(self._store.close)
            lock = stack.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"the store {folder} is in use by another service; choose another --store") from None
            if not self._store.hold():
                raise UserError("the database is in use by another service; choose another --database")
            self._store.sweep()
            self._store.draining.forget()
            if self._settings.asks_key and (told := let_in(self._store.keys, self._settings)):
                self._report(told)
            self._store.set_all_states(DeploymentState.STARTING, "starting")
            if self._settings.spec is not None:
                self._store.want(self._settings.spec, replaces=True)
            # Ray puts sockets in there, 81 bytes further down, and their paths may have 107. It opens its folder to all
            # users, so it gets one inside one of ours.
            root = tempfile.gettempdir() if len(tempfile.gettempdir()) < 26 else "/tmp"
            private = stack.enter_context(scratch("ptray-", root))
            self._ray_folder = str(private / "r")
            self._ray_auth = {"RAY_AUTH_MODE": ray_auth_mode()}
            if self._settings.address is None and ray_auth_mode() == "token" and not is_ray_token_given():
                self._ray_auth["RAY_AUTH_TOKEN_PATH"] = _new_token(private)
            yield

    # --- the children

    def _start(self, role: str) -> subprocess.Popen[bytes]:
        folder = str(self._store.folder)
        listener = self._listener.fileno()
        descriptors: tuple[int, ...]
        if role == "gateway":
            gateway = gateway_settings(folder, asks_key=self._settings.asks_key)
            settings, extra, descriptors = to_json(gateway), str(listener), (self._lifeline, listener)
        else:
            settings, extra, descriptors = to_json(self._controller_config()), folder, (self._lifeline,)
        command = [sys.executable, "-P", "-m", "api.children", role, json.dumps(settings), str(self._lifeline), extra]
        with open_log(self._log(role)) as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                env=self._environment(role),
                start_new_session=True,  # a terminal's Ctrl-C reaches this process only
            )

    def _controller_config(self) -> ControllerConfig:
        return ControllerConfig(
            address=self._settings.address,
            ray_folder=self._ray_folder,
            url=self.url,
            budget_tokens=self._settings.budget_tokens,
            takes_jobs=self._settings.takes_jobs,
        )

    def _environment(self, role: str) -> dict[str, str]:
        environment = places_in(os.environ, self._settings.database, self._settings.objects)
        environment.pop("POLYTRACE_KEY", None)
        if role == "gateway" and self._settings.key:
            environment["POLYTRACE_KEY"] = self._settings.key
        environment |= self._ray_auth
        # the packages may lie in a checkout; the user's own folder must not come before them (-P)
        root = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        return environment

    def _watch(self, on_ready: Callable[[str], None]) -> None:
        told_address = ""
        while self._num_signals == 0:
            self._keep_up()
            with contextlib.suppress(AwayError):  # the children wait for it
                self._tell()
            if not self._was_ready and self._is_ready():
                self._was_ready = True
                on_ready(self.url)
            address = self._ray_address()
            if self._was_ready and address != told_address:  # another one after every start of the controller
                told_address = address
                joining = " ".join(f"{name}={value}" for name, value in self._ray_auth.items())
                self._report(f"Ray programs on this machine join with RAY_ADDRESS={address} {joining}")
                if self._settings.takes_jobs:
                    jobs = jobs_file(self._ray_folder).read_text()
                    self._report(f"`ray job submit` on this machine takes RAY_API_SERVER_ADDRESS={jobs} {joining}")
            time.sleep(POLL_S)
        finish_accepted(self._store, self._settings.drain_s, self._report, goes_on=self._keep_up)
        self._report("stopping")

    def _keep_up(self) -> bool:
        """Both children run. Whether nobody has told it to stop at once."""
        for role in ("gateway", "controller"):
            self._mend(role)
        return self._num_signals < 2

    def _ray_address(self) -> str:
        """Of the own cluster; empty before there is one."""
        file = address_file(self._ray_folder)
        return file.read_text() if file.exists() else ""

    def _tell(self) -> None:
        """What has changed with the deployments. ServiceError when the one that was asked for will not come up."""
        first = None if self._was_ready or self._settings.spec is None else self._settings.spec.name
        known = {one.model: one for one in self._store.deployments()}
        for name in self._told.keys() - known.keys():
            del self._told[name]
            self._report(f"{name} is gone")
        for name, one in known.items():
            if name == first and one.state is DeploymentState.FAILED:
                raise ServiceError(f"{name} did not start: {one.progress}")
            if self._told.get(name) != (one.state, one.progress):
                self._told[name] = (one.state, one.progress)
                if name != first:
                    self._report(f"{name}, {one.state.value}: {one.progress}")
                elif one.progress != "starting":  # which has been said
                    self._report(one.progress)

    def _is_ready(self) -> bool:
        """Whether it takes requests for what it was started for, or anything else, when it was started for nothing."""
        spec = self._settings.spec
        path = "/healthz" if spec is None else f"/readyz?model={spec.name}"
        try:
            # plain HTTP: to read all certificates for each look would take a sixth of a core
            return httpx.get(f"{self.url}{path}", timeout=5, trust_env=False, verify=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _mend(self, role: str) -> None:
        """Starts a child again that broke; ServiceError when that has not helped, or it never came up."""
        code = self._children[role].poll()
        if code is None:
            return
        now = time.monotonic()
        self._restarts = [then for then in self._restarts if now - then < RESTART_WINDOW_S] + [now]
        if not self._was_ready or len(self._restarts) > MAX_RESTARTS:
            raise ServiceError(self._last_words(role) or f"the {role} ended with code {code} and said nothing")
        self._report(f"the {role} ended with code {code}; it is started again")
        if role == "controller":
            with contextlib.suppress(AwayError):
                self._store.set_all_states(DeploymentState.STARTING, "the controller is started again")
        others = [child.pid for other, child in self._children.items() if other != role]
        end_descendants(0.0, keep=others)  # what it had started: shards, Ray
        self._children[role] = self._start(role)

    def _end_all(self) -> None:
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S + 2.0
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
        end_descendants(2.0)
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()
        with contextlib.suppress(AwayError):
            self._store.set_all_states(DeploymentState.STOPPED, "the service was stopped")

    @property
    def _goes(self) -> bool:
        """Whether what it keeps goes with it."""
        return self._settings.store is None and self._settings.database is None

    def _log(self, role: str) -> Path:
        return self._store.folder / f"{role}.log"

    def _last_words(self, role: str) -> str:
        """Why a child ended: what the controller told, else the end of its log."""
        with contextlib.suppress(AwayError):
            for one in self._store.deployments():
                if role == "controller" and one.state is DeploymentState.FAILED:
                    return f"{one.model} did not start: {one.progress}"
        return "\n".join(self._log(role).read_text(errors="replace").splitlines()[-20:])


def where_it_keeps(settings: ServeSettings, folder: Path) -> str:
    """For people, who look for results and logs, or start it again. URLs are not told: they may have passwords."""
    places = {"database": settings.database, "objects": settings.objects}
    elsewhere = " and ".join(name for name, url in places.items() if url is not None)
    told = f"its store is {folder}" + (f", its {elsewhere} elsewhere, as it was said" if elsewhere else "")
    goes = settings.store is None  # what is elsewhere stays
    return f"{told}; without --store FOLDER that folder goes when the service ends" if goes else told


@contextlib.contextmanager
def scratch(prefix: str, root: str) -> Iterator[Path]:
    """A folder of this user alone that goes when the block ends. Those that killed services left behind go first."""
    for old in Path(root).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), (old / "lock").open("r+") as lock:
            if time.time() - old.stat().st_mtime > SCRATCH_MIN_AGE_S:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, dir=root, ignore_cleanup_errors=True) as made,
        (Path(made) / "lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(made)


def open_log(path: Path) -> BinaryIO:
    """To be appended to, and this user's alone: it may name what users sent."""
    file = open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115  the caller closes it
    os.chmod(path, 0o600)  # of one that an older version made
    return file


def _new_token(folder: Path) -> str:
    """The path of a file with a new Ray token that only this user can read. Left alone, Ray would keep one in the home
    folder, readable by all, and use it for every cluster.
    """
    path = folder / "auth_token"
    with open(path, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))
    return str(path)
