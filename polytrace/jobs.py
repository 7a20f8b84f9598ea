"""Jobs: requests that run while nobody waits, and whose results are fetched later, also by another process.

    with model.trace(prompt, blocking=False) as tracer:
        hidden = model.model.layers[5].output[0].save()
    job = tracer.job                # job.id survives this process
    job.result(); hidden.shape      # a saved value is the tensor that it is from here on

    polytrace.job(id).result().values["0"]      # elsewhere: by the order in which they were saved

A job of a service is one of its requests; its result stays there until it expires. A model in this process runs a job
on a thread, and it ends with the process.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from polytrace.backend import Backend, Result
from polytrace.errors import CancelledError, PolytraceError, ServiceError
from polytrace.graph import Request
from polytrace.tracebacks import edge

if TYPE_CHECKING:
    pass

T = TypeVar("T")

_threads = ThreadPoolExecutor(512, thread_name_prefix="polytrace-wait")  # made as they are needed


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """How a job does. Times are seconds since the epoch."""

    id: str
    state: str  # "queued", "running", "done", "failed", "cancelled"
    passes_done: int = 0
    passes: int = 0  # 0 while nobody knows how many there are
    queue_position: int | None = None  # requests that go before it
    expected_start: float | None = None
    created: float | None = None
    started: float | None = None
    finished: float | None = None
    error: PolytraceError | None = None  # why it failed
    waits_for: str | None = None  # why it does not run yet, such as how far the loading of its model is

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def __str__(self) -> str:
        if self.state == "queued" and self.waits_for is not None:
            return f"queued: {self.waits_for}"
        if self.state == "queued" and self.queue_position is not None:
            return f"queued behind {self.queue_position} others" if self.queue_position else "queued, next to go"
        if self.state == "running" and self.passes:
            return f"running: {self.passes_done} of {self.passes} passes"
        return self.state if self.error is None else f"{self.state}: {self.error}"


Watch = Callable[[JobStatus], Any]


class Running(Protocol):
    """A request on its way, wherever it runs. Threads may share it."""

    @property
    def id(self) -> str: ...

    def status(self) -> JobStatus:
        """How it does now."""

    def wait(self, timeout_s: float | None, watch: Watch | None) -> JobStatus:
        """How it ended, or does when the time is over. `watch` hears every change."""

    def result(self) -> Result:
        """What a job that is done gave back; raises why it has not."""

    def cancel(self) -> None:
        """Nobody wants it any more."""


class Job:
    """A request that runs without anybody waiting. `await job` is its result too."""

    def __init__(self, running: Running, land: Callable[[Result], Result] | None = None) -> None:
        """`land` makes of the result, once, what a trace's values become."""
        self._running = running
        self._land = land
        self._lock = threading.Lock()
        self._result: Result | None = None

    @property
    def id(self) -> str:
        """What `polytrace.job` finds it by."""
        return self._running.id

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._result is not None or self._running.status().is_over

    def status(self) -> JobStatus:
        """How it does."""
        return self._running.status()

    def wait(self, timeout: float | None = None, on_status: Watch | None = None) -> JobStatus:
        """Returns when it has ended or after so many seconds; how it does then. `on_status` hears every change."""
        return self._running.wait(timeout, on_status)

    @edge
    def result(self, timeout: float | None = None, on_status: Watch | None = None) -> Result:
        """Its saved values and its receipt, once it has ended. The values of its trace become tensors.

        Raises what the service says of a job that failed, CancelledError of one that was cancelled, and TimeoutError
        after `timeout` seconds: the job goes on, and can be asked again.
        """
        with self._lock:
            if self._result is None:
                status = self._running.wait(timeout, on_status)
                if not status.is_over:
                    raise TimeoutError(f"job {self.id} is {status} after {timeout} s; it goes on")
                result = self._running.result()
                self._result = result if self._land is None else self._land(result)
            return self._result

    def cancel(self) -> None:
        """Ends it, unless it has ended; its result stays with a job that is done."""
        self._running.cancel()

    def __await__(self) -> Generator[Any, None, Result]:
        return in_thread(self.result).__await__()

    async def collected(self) -> Result:
        """Its result; a task that is cancelled while it waits cancels the job."""
        try:
            return await self
        except asyncio.CancelledError:
            _threads.submit(self.cancel)
            raise

    def __repr__(self) -> str:
        return f"<job {self.id}>"


def begin(backend: Backend, request: Request, *, is_interactive: bool = False) -> Running:
    """Sends a request and does not wait: to a service, else to a thread of this process.

    `is_interactive`: somebody waits all the same, so it goes before its tenant's batch work.
    """
    submit: Callable[..., Running] | None = getattr(backend, "submit", None)
    if submit is not None:
        return submit(request, is_interactive=is_interactive)
    return ThreadJob(lambda: backend.run(request))


async def in_thread(do: Callable[..., T], *given: Any, **named: Any) -> T:
    """What `do` returns, without the event loop waiting. Hundreds may wait at once, more than asyncio's own threads."""
    return await asyncio.get_running_loop().run_in_executor(_threads, partial(do, *given, **named))


class ThreadJob:
    """A request on a thread of this process. A cancelled one runs to its end, and nobody hears of it."""

    def __init__(self, run: Callable[[], Result]) -> None:
        self.id = secrets.token_hex(16)
        self._run = run
        self._over = threading.Event()
        self._outcome: Result | BaseException | None = None
        threading.Thread(target=self._body, name=f"job {self.id[:8]}", daemon=True).start()

    def status(self) -> JobStatus:
        outcome = self._outcome
        if outcome is None:
            return JobStatus(id=self.id, state="running")
        if isinstance(outcome, Result):
            return JobStatus(id=self.id, state="done")
        error = outcome if isinstance(outcome, PolytraceError) else ServiceError(f"{type(outcome).__name__}: {outcome}")
        return JobStatus(id=self.id, state="cancelled" if isinstance(error, CancelledError) else "failed", error=error)

    def wait(self, timeout_s: float | None, watch: Watch | None) -> JobStatus:
        if watch is not None:
            watch(self.status())
        self._over.wait(timeout_s)
        if watch is not None and self._over.is_set():
            watch(self.status())
        return self.status()

    def result(self) -> Result:
        if not isinstance(self._outcome, Result):
            assert self._outcome is not None
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        self._end(CancelledError("the job was cancelled"))

    def _body(self) -> None:
        try:
            self._end(self._run())
        except BaseException as error:  # noqa: BLE001  the edge of the thread: `result` raises it
            self._end(error)

    def _end(self, outcome: Result | BaseException) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._over.set()
