"""The loop of a deployment: stored requests become programs, programs share passes, outcomes become results.

Three threads. The loop owns the scheduler and the shards and never touches a file; intake and delivery do. The loop
sleeps until one of them, or a finished pass, wakes it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from cluster.delivery import Delivery, Done
from cluster.intake import Cancel, Intake, IntakeEvent
from cluster.requests import Finished, PassFigures, RequestStore
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError, ServiceError
from scheduling.fair import FairShares
from scheduling.loop import Shards, step
from scheduling.plan import Plan, Program, RequestId, ShardResult
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler
from scheduling.stopping import Decode


def give_up(loss: PolytraceError) -> None:
    """Shards that are lost stay lost."""
    raise loss


class Dispatcher:
    """One deployment's loop."""

    def __init__(
        self,
        store: RequestStore,
        description: ModelDescription,
        shards: Shards,
        policy: PassPolicy,
        *,
        awake: threading.Event,  # the shards set it when a pass has ended
        recover: Callable[[PolytraceError], None] = give_up,  # makes the shards whole after a loss, or raises
        max_active: int,  # programs in memory; the rest waits in the store
        decode: Decode | None = None,  # the text of tokens; without it requests have no texts to end at
        shares: FairShares | None = None,  # of all replicas of the deployment; None: its own
        shares_across_tenants: bool = False,  # as of `Intake`
    ) -> None:
        self._shards = _Lossy(shards, lambda told: store.note_pass(description.name, told))
        self._recover = recover
        self._scheduler = Scheduler(description, policy, decode=decode, shares=shares, replica=store)
        self._events: queue.SimpleQueue[IntakeEvent] = queue.SimpleQueue()
        self._awake = awake
        self._programs: dict[RequestId, Program] = {}
        self._intake = Intake(
            store, description, self._on_event, max_active=max_active, shares_across_tenants=shares_across_tenants
        )
        self._delivery = Delivery(store, self._intake.ended)
        self._threads = [
            self._thread("intake", self._intake.run_forever),
            self._thread("delivery", self._delivery.run_forever),
        ]
        self._failure: BaseException | None = None
        self._is_stopped = False

    def run_forever(self) -> None:
        """Until `stop`. Raises what ended one of its threads, or why lost shards cannot be had back."""
        for thread in self._threads:
            thread.start()
        try:
            while not self._is_stopped:
                self._awake.clear()  # before looking: what comes from now on is another round
                self._take_events()
                step(self._scheduler, self._shards)
                if self._shards.loss is not None:
                    self._run_again()
                self._deliver()
                if self._failure is not None:
                    raise self._failure
                if not (self._scheduler.has_work() and self._shards.have_room()):
                    self._awake.wait()
        finally:
            self._deliver()
            self._intake.stop()
            self._delivery.stop()
            for thread in self._threads:
                thread.join(timeout=10)

    def stop(self) -> None:
        """Ends `run_forever` after the round it is in; unfinished requests stay claimed in the store. Any thread."""
        self._is_stopped = True
        self._awake.set()

    @property
    def suspects(self) -> list[RequestId]:
        """Unfinished requests that were in a pass that died with its shards. Not while `run_forever` runs."""
        return self._scheduler.suspects

    def _run_again(self) -> None:
        """After a loss, when all passes in flight have been handed back: new shards, and their requests once more."""
        loss, lost = self._shards.take_loss()
        for plan, error in lost:
            self._scheduler.again(plan, error)
        self._deliver()  # what is not run again
        self._recover(loss)

    def _on_event(self, event: IntakeEvent) -> None:
        self._events.put(event)
        self._awake.set()

    def _take_events(self) -> None:
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, Finished):
                self._delivery.put(event)
            elif isinstance(event, Cancel):
                if event.request in self._programs:
                    self._scheduler.cancel(event.request)
            else:
                self._programs[event.request] = event
                self._scheduler.add(event)

    def _deliver(self) -> None:
        for told in self._scheduler.take_progress():
            self._delivery.put(told)
        self._intake.limit_passes(self._scheduler.budget_tokens)
        for outcome in self._scheduler.take_outcomes():
            if outcome.may_be_cut:
                self._intake.work_out_again(outcome.request)
            else:
                self._delivery.put(self._end(outcome))

    def _end(self, outcome: Outcome) -> Done | Finished:
        program = self._programs.pop(outcome.request)
        if outcome.receipt is not None and outcome.error is None:
            return Done(program=program, receipt=outcome.receipt, saves=outcome.saves)
        return Finished(
            request=outcome.request,
            error=outcome.error or ServiceError("it ended without a receipt"),
            token_layers=outcome.spent_token_layers,
            run_seconds=outcome.spent_seconds,
        )

    def _thread(self, name: str, body: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                body()
            except BaseException as error:  # noqa: BLE001  the edge of the thread: the loop raises it
                self._failure = error
                self._awake.set()

        return threading.Thread(target=run, name=name, daemon=True)


class _Lossy:
    """Shards whose loss the scheduler hears of only when it is known what becomes of the lost passes. `tell` hears of
    every pass that ran.
    """

    def __init__(self, shards: Shards, tell: Callable[[PassFigures], None]) -> None:
        self.have_room = shards.have_room
        self.submit = shards.submit
        self._finished = shards.finished
        self._tell = tell
        self._lost: list[tuple[Plan, PolytraceError]] = []
        self.loss: PolytraceError | None = None  # once every pass in flight has been handed back

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...]]]:
        try:
            for plan, results in self._finished():
                if isinstance(results, PolytraceError):
                    self._lost.append((plan, results))
                else:
                    if not plan.is_of_nobody:
                        self._tell(_figures(plan, results))
                    yield plan, results
        except PolytraceError as error:
            self.loss = error

    def take_loss(self) -> tuple[PolytraceError, list[tuple[Plan, PolytraceError]]]:
        """The loss and the passes that it took."""
        assert self.loss is not None, "nothing was lost"
        loss, self.loss = self.loss, None
        lost, self._lost = self._lost, []
        return loss, lost


def _figures(plan: Plan, results: tuple[ShardResult, ...]) -> PassFigures:
    busy = [0.0] * (1 + max((result.stage for result in results), default=-1))
    for result in results:  # ranks of a stage work at the same time
        busy[result.stage] = max(busy[result.stage], result.busy_seconds)
    return PassFigures(
        requests=tuple({member.program.request: None for member in plan.members}),
        rows=sum(plan.layer_rows[:1]),
        seconds=max((result.seconds for result in results), default=0.0),
        busy_seconds=tuple(busy),
    )
