"""Lanes in step: several runs of one piece of code, each in a thread of its own, of which exactly one goes at a time.

A lane goes until it stops somewhere with a value, or ends. When every lane has stopped at the same place, all their
values are looked at together, and each goes on with its own answer. Lanes go in their order, always, so what happens
does not depend on the machine. Knows nothing of models.

Invariant: when `in_step` is over, however it ends, no lane is left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from polytrace.errors import ServiceError

# Gets a place and what the lanes stopped there with, in their order; gives each its answer.
Meet = Callable[[Any, list[Any]], list[Any]]


def in_step(lanes: Sequence[Callable[[], None]], meet: Meet) -> None:
    """Runs lanes to their ends. What a lane or `meet` raises ends all of them, and comes through.

    Lanes stop with `stop`; they run in other threads than `meet`, which runs in this one.
    """
    threads = [_Lane(work) for work in lanes]
    try:
        for lane in threads:
            lane.go(None)
        while going := [lane for lane in threads if lane.is_going]:
            places = [lane.place for lane in going]
            if len(going) < len(threads) or any(place is not places[0] for place in places):
                raise ServiceError("the prompts of a pass ran through different modules of the model: run each alone")
            values = [lane.take() for lane in going]
            for lane, answer in zip(going, meet(places[0], values), strict=True):
                lane.go(answer)
    finally:
        for lane in threads:
            lane.abandon()


def in_order(
    lanes: Sequence[Callable[[], None]],
    meet: Callable[[int, dict[int, Any]], dict[int, Any]],
    failed: Callable[[int, Exception], None],
) -> None:
    """Runs lanes whose places are numbers to their ends, the smallest number first.

    `meet` gets it and what the lanes that have stopped there did so with, by their places in `lanes`; the others wait.
    Where a lane goes, its numbers grow. What a lane raises ends that lane, and `failed` hears of it.
    """
    threads = [_Lane(work) for work in lanes]

    def go(number: int, answer: Any) -> None:
        try:
            threads[number].go(answer)
        except Exception as error:  # noqa: BLE001  one lane's own
            failed(number, error)

    try:
        for number in range(len(threads)):
            go(number, None)
        while going := [number for number, lane in enumerate(threads) if lane.is_going]:
            place = min(threads[number].place for number in going)
            here = {number: threads[number].take() for number in going if threads[number].place == place}
            for number, answer in meet(place, here).items():
                go(number, answer)
    finally:
        for lane in threads:
            lane.abandon()


def stop(place: Any, value: Any) -> Any:
    """Called in a lane: waits until all lanes have come to the same place, and gives this lane's answer."""
    lane = _own.get()
    assert lane is not None, "only a lane can stop"
    return lane.stop(place, value)


class _Abandoned(BaseException):
    """Ends a lane whose others have failed. No code of a model catches it."""


class _Lane:
    """One of them, and the baton between its thread and the one that asks it to go."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.place: Any = None
        self.is_going = True  # it has not ended
        self._value: Any = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._is_abandoned = False
        self._may_go, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._work = work
        self._thread = threading.Thread(target=self._run, name="lane", daemon=True)

    def go(self, answer: Any) -> None:
        """Lets it go to its next stop or to its end; raises what it raised."""
        self._answer = answer
        if self._thread.ident is None:
            self._thread.start()
        self._may_go.release()
        self._has_stopped.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take(self) -> Any:
        """What it stopped with, which it does not hold any more."""
        value, self._value = self._value, None
        return value

    def stop(self, place: Any, value: Any) -> Any:
        self.place, self._value = place, value
        self._has_stopped.release()
        self._may_go.acquire()
        if self._is_abandoned:
            raise _Abandoned
        answer, self._answer = self._answer, None
        return answer

    def abandon(self) -> None:
        """Ends it where it has stopped, and waits for the end."""
        if self._thread.ident is None:
            return
        if self.is_going:
            self._is_abandoned = True
            self._may_go.release()
        self._thread.join()

    def _run(self) -> None:
        self._may_go.acquire()
        try:
            if not self._is_abandoned:
                _own.set(self)
                self._work()
        except _Abandoned:
            pass
        except BaseException as error:  # noqa: BLE001  raised again by `go`, in the thread that waits for it
            self._error = error
        finally:
            self.is_going = False
            self._has_stopped.release()


_own: ContextVar[_Lane | None] = ContextVar("lane", default=None)
