"""The deployments as the gateway answers for them: read from the store at every ring, kept ready to send."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anyio import to_thread

from api.away import AwayError
from api.catalogue import Deployment, check_taking
from api.identity import Identity
from api.store import Store
from api.wishes import ChatWish, CompletionWish
from api.worker import Answer, Composed, Verdict
from cluster.config import Heat
from cluster.requests import DeploymentState, Published
from polytrace.codec import from_json
from polytrace.description import ModelDescription
from polytrace.errors import CapacityError, NotFoundError, WireError

DRAINING = (DeploymentState.DRAINING, DeploymentState.DRAINED)
_RUNNING = (DeploymentState.READY, *DRAINING)  # nothing is in the way of their requests
RETRY_S = 5.0
AWAY_S = 0.5  # between two looks while the database is away
ANEW_S = 60.0  # between two loads for the sake of a description
PAUSE_S = 0.05  # between two looks: most rings are about requests, not deployments

_log = logging.getLogger(__name__)


class Checker(Protocol):
    """Who says whether a stored request can be honoured: `api.worker.CheckerPool`."""

    def start(self) -> None: ...
    async def warm(self, model: str, version: str) -> None: ...
    async def check(self, model: str, version: str, path: Path, *, contents: Path, certify: bool) -> Verdict: ...
    async def compose(
        self, model: str, version: str, path: Path, wish: CompletionWish | ChatWish, *, contents: Path
    ) -> Composed: ...
    async def nearest(
        self, model: str, version: str, path: Path, *, contents: Path, most: Mapping[str, int]
    ) -> str | None: ...
    async def sites(self, model: str, version: str, asked: bytes) -> Answer: ...
    async def check_edits(self, model: str, version: str, path: Path) -> Verdict: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A deployment that requests can be sent to."""

    description: ModelDescription
    body: bytes  # the description as JSON
    zipped: bytes  # the same, gzip
    version: str  # of the body: its ETag, and the name that the workers know it by
    revision: int  # of the deployment: another one when it was deployed again
    tokenizer: bytes | None


class Deployments:
    """All that the store knows of, and those of them that are ready. Belongs to one event loop."""

    def __init__(self, store: Store, checker: Checker, changed: Callable[[], None] = lambda: None) -> None:
        """`changed` is called when there is something new of one that does not run."""
        self._store = store
        self._checker = checker
        self._changed = changed
        self.are_loading = False  # some of them, or they rest
        self._known: dict[str, Deployment] = {}
        self._served: dict[str, Served] = {}
        self._unreadable: dict[str, int] = {}  # of another program's descriptions: the deployments' revisions
        self._asked_anew: dict[str, float] = {}  # when such a deployment was to be loaded for the last time
        self._tasks: set[asyncio.Task[None]] = set()
        self._refresh: asyncio.Task[None] | None = None
        self._rung = False
        self._has_looked = False

    def ring(self) -> None:
        """Something may have changed."""
        self._rung = True
        if self._refresh is None:
            self._refresh = asyncio.get_running_loop().create_task(self._refresh_until_quiet())

    def find(self, known: Deployment) -> Served | None:
        """What is served of a deployment, None while it is not ready."""
        served = self._served.get(known.model)
        return served if served is not None and served.revision == known.revision else None

    def taking(self, name: str, caller: Identity) -> Served:
        """A deployment that takes requests. Raises NotFoundError, or CapacityError with the reason."""
        served = self.get(name, caller)
        self._store.draining.check()
        check_taking(name, self._known[name].mode)
        return served

    def get(self, name: str, caller: Identity) -> Served:
        """A deployment that can say what it serves. Raises NotFoundError, also for one that the caller may not use, or
        CapacityError while it is not ready.
        """
        if name in self._served and caller.may_use(name):
            return self._served[name]
        if name in self._unreadable and caller.may_use(name):
            self._describe_anew(self._known[name])
            told = f"{name} was described by another version of polytrace"
            raise CapacityError(f"{told}, and is loaded anew first ({_progress(self._known[name])})", retry_after_s=5.0)
        if name in self._known and caller.may_use(name):
            raise CapacityError(f"{name} is not ready ({_progress(self._known[name])})")
        if not self._has_looked:
            raise CapacityError("the gateway has just been started and does not know the deployments yet")
        names = ", ".join(sorted(filter(caller.may_use, self._known)))
        others = f"; there is {names}" if names else ", and no other that you could use"
        raise NotFoundError(f"there is no model {name[:100]!r} here{others}")

    def waits_for(self, name: str) -> str | None:
        """Why requests of a deployment do not run yet, None when nothing is in their way."""
        known = self._known.get(name)
        if known is None or known.state in _RUNNING:
            return None
        return f"{name} is {known.state.value}: {_first_line(known.progress)}"

    def not_ready(self, name: str | None = None) -> str | None:
        """What the service still waits for, or one of its deployments; None when it waits for nothing.

        A service is ready when any deployment takes requests: what another one lacks must not take it off the network.
        """
        if name in self._served or (name is None and self._served):
            return None
        waiting = [f"{one}: {_progress(self._known[one])}" for one in sorted(self._known) if name in (None, one)]
        return "; ".join(waiting) or f"no deployment{'' if name is None else f' {name[:100]!r}'} has begun to load"

    async def _refresh_until_quiet(self) -> None:
        try:
            while self._rung:
                await asyncio.sleep(PAUSE_S)
                self._rung = False
                try:
                    known = {one.model: one for one in await to_thread.run_sync(self._store.deployments)}
                except AwayError:  # what is known stays so until it is back
                    await asyncio.sleep(AWAY_S)
                    self._rung = True
                    continue
                before, self._known, self._has_looked = self._known, known, True
                loading = {name: one.progress for name, one in known.items() if one.state not in _RUNNING}
                self.are_loading = bool(loading)
                if any(name not in before or before[name].progress != told for name, told in loading.items()):
                    self._changed()
                ready = {name for name, one in known.items() if one.is_found}
                self._served = {
                    name: one
                    for name, one in self._served.items()
                    if name in ready and one.revision == known[name].revision
                }
                self._unreadable = {
                    name: revision
                    for name, revision in self._unreadable.items()
                    if name in ready and revision == known[name].revision
                }
                lacking = ready - self._served.keys() - self._unreadable.keys()
                # those that run first: a start of the gateway takes in all that requests may load as well
                for name in sorted(lacking, key=lambda name: known[name].state not in _RUNNING):
                    await self._take_in(name, known[name].revision)
        finally:
            self._refresh = None

    async def _take_in(self, name: str, revision: int) -> None:
        """Makes a deployment that has become ready one that requests can be sent to."""
        try:
            published = await to_thread.run_sync(self._store.published, name)
            if published is None:
                return
            try:
                served = await to_thread.run_sync(_serve, published, revision)
            except (WireError, ValueError) as error:
                _log.warning("%s is loaded anew when it is asked for: %s", name, error, extra={"model": name})
                self._unreadable[name] = revision
                return
            await self._checker.warm(name, served.version)
        except Exception:  # noqa: BLE001  the edge of a task: it stays unready, and is tried again
            _log.exception("%s cannot be served yet", name, extra={"model": name})
            asyncio.get_running_loop().call_later(RETRY_S, self.ring)
        else:
            self._served[name] = served

    def _describe_anew(self, known: Deployment) -> None:
        """Has a deployment loaded of which it is not known what requests are checked against, as when it was new."""
        now = time.monotonic()
        if known.heat is Heat.HOT or now - self._asked_anew.get(known.model, -ANEW_S) < ANEW_S:
            return
        self._asked_anew[known.model] = now
        task = asyncio.get_running_loop().create_task(self._heat_up(known.model))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _heat_up(self, name: str) -> None:
        with contextlib.suppress(AwayError):  # it is asked for again
            await to_thread.run_sync(self._store.heat_up, name)


def _serve(published: Published, revision: int) -> Served:
    body = published.description
    return Served(
        description=from_json(ModelDescription, json.loads(body)),
        body=body,
        zipped=gzip.compress(body, compresslevel=6, mtime=0),
        version=hashlib.sha256(body).hexdigest()[:32],
        revision=revision,
        tokenizer=published.tokenizer,
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:500]


def _progress(deployment: Deployment) -> str:
    if deployment.state.is_serving or deployment.state in DRAINING:
        return "getting ready to check requests"
    return f"{deployment.state.value}: {deployment.progress}"
