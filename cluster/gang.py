"""The shards of one deployment as Ray actors: called all at once, and a pass that one of them fails is lost to all.

Owns what it means that a shard fails. Says in every error which shard it was, and prefers the shard that died over its
neighbours, who only noticed. `RayShards` is the loop's view of a gang.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.shipping import Outgoing
from polytrace.errors import PolytraceError, ServiceError
from scheduling.plan import PassAbandonedError, PassTooLargeError, Plan, ShardResult
from scheduling.policy import passes_in_flight

_REACH_S = 10.0  # for Ray to tell that an actor is dead

_HEARSAY_S = 1.0  # after a failure the other shards hear of it within moments: gloo and NCCL notice a dead peer


class ShardLostError(ServiceError):
    """A shard's process is gone: starting it again may help."""


class Gang:
    """Stages x ranks actors, by stage, then rank."""

    def __init__(self, actors: list[Any], *, stages: int, ranks: int) -> None:
        self.actors = actors
        self.stages = stages
        self.ranks = ranks

    def name(self, index: int) -> str:
        """What a shard is called in progress lines and errors."""
        return f"stage {index // self.ranks} rank {index % self.ranks}"

    def call(self, method: str, *args: Any) -> list[Any]:
        """Calls every shard at once; their answers, or the error of the shard that is to blame."""
        answers = self.answers(self.start(method, *args))
        if isinstance(answers, PolytraceError):
            raise answers
        return list(answers)

    def call_first(self, method: str, *args: Any) -> Any:
        """Calls the first shard alone."""
        try:
            return ray.get(getattr(self.actors[0], method).remote(*args))
        except RayError as error:
            raise self.explain(0, error) from error

    def start(self, method: str, *args: Any) -> list[Any]:
        """Calls every shard and waits for none: handles of the answers."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def answers(self, calls: list[Any]) -> tuple[Any, ...] | PolytraceError:
        """Waits for one call of every shard; their answers, or the error of the shard that is to blame."""
        if len(calls) == 1:  # nobody else can fail first
            try:
                return (ray.get(calls[0]),)
            except RayError as error:
                return self.explain(0, error)
        return self.first_failure(calls) or tuple(ray.get(calls))

    def first_failure(self, calls: list[Any]) -> PolytraceError | None:
        """Waits for one call of every shard, or for the first to fail; None when all went well."""
        waiting: list[Any] = list(calls)
        failed: dict[int, RayError] = {}
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=_HEARSAY_S if failed else None)
            if not ready:
                break
            try:
                ray.get(ready[0])
            except RayError as error:
                failed[calls.index(ready[0])] = error
        if not failed:
            return None
        told = [self.explain(index, error) for index, error in failed.items()]
        return min(told, key=_hearsay)

    def end_hung(self, timeout_s: float, indices: Iterable[int]) -> PolytraceError | None:
        """Ends the shards among these that do not answer within the time-out; why one of them is lost, if one is."""
        beats = {self.actors[index].beat.remote(): index for index in indices}
        ready, silent = wait_for_all(beats, timeout_s)
        loss: PolytraceError | None = None
        for beat in silent:
            index = beats[beat]
            ray.kill(self.actors[index])
            loss = ShardLostError(f"the shard {self.name(index)} did not answer for {timeout_s:.0f} s and was ended")
        for beat in ready:
            try:
                ray.get(beat)
            except RayError as error:
                loss = self.explain(beats[beat], error)
        return loss

    def find_dead(self) -> list[int]:
        """The shards whose processes are gone. One that is still starting is not."""
        beats = {actor.beat.remote(): index for index, actor in enumerate(self.actors) if actor is not None}
        ready, _ = wait_for_all(beats, _REACH_S)
        dead = []
        for beat in ready:
            try:
                ray.get(beat)
            except RayError:
                dead.append(beats[beat])
        return sorted(dead)

    def leave(self, timeout_s: float, indices: Iterable[int]) -> None:
        """Every shard leaves the world that it is in. Those among `indices` that do not in time are ended: they wait
        for a neighbour who is gone, and nothing else would wake them.
        """
        calls = {actor.leave.remote(): index for index, actor in enumerate(self.actors)}
        prompt = {call: index for call, index in calls.items() if index in set(indices)}
        _, stuck = wait_for_all(prompt, timeout_s)
        for call in stuck:
            ray.kill(self.actors[prompt[call]])
        if stuck:
            names = ", ".join(self.name(prompt[call]) for call in stuck)
            raise ShardLostError(f"{names} did not leave within {timeout_s:.0f} s, and was ended")
        for call, index in calls.items():
            try:
                ray.get(call)
            except RayError as error:
                raise self.explain(index, error) from error

    def explain(self, index: int, error: RayError) -> PolytraceError:
        """What a shard's failure is to us. Its own PolytraceError keeps its kind."""
        name = self.name(index)
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, PolytraceError):
            return type(cause)(f"{name}: {cause.message}", where=cause.where)
        if isinstance(error, RayActorError):
            return ShardLostError(f"the shard {name} died: {_first_line(error)}")
        return ServiceError(f"the shard {name} failed: {_first_line(cause or error)}")


class RayShards:
    """The loop's shards (`scheduling.loop.Shards`): as many passes in flight as keep the stages at work.

    After a loss `finished` hands back every pass in flight with the reason, and raises it from then on, until `resume`.
    `wake` is called from a thread of its own whenever there is something new for `finished`.
    """

    def __init__(self, gang: Gang, wake: Callable[[], None]) -> None:
        self._gang = gang
        self._wake = wake
        self._num_in_flight = 0
        self._submitted: queue.SimpleQueue[tuple[Plan, list[Any]] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]] = queue.SimpleQueue()
        self._loss: PolytraceError | None = None
        self._outgoing = Outgoing()
        threading.Thread(target=self._watch, name="passes", daemon=True).start()

    def have_room(self) -> bool:
        """Whether a stage would have nothing to do without another pass; False after a loss."""
        return self._loss is None and self._num_in_flight < passes_in_flight(self._gang.stages)

    def submit(self, plan: Plan) -> None:
        """Sends the plan to every shard, without what they have; serialised once for all.

        To one shard alone it goes with the call itself: the object store would cost a message to and fro.
        """
        self._num_in_flight += 1
        shipment = self._outgoing.pack(plan)
        sent = shipment if len(self._gang.actors) == 1 else ray.put(shipment)
        self._submitted.put((plan, self._gang.start("run", sent)))

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        """The passes that ended since the last call, in the order they went in."""
        if self._loss is not None and self._num_in_flight == 0:
            raise self._loss
        while not self._ended.empty():
            plan, results = self._ended.get()
            self._num_in_flight -= 1
            yield plan, results
        if self._loss is not None:
            self._wake()  # so that the loop comes again and hears of it

    def lose(self, loss: PolytraceError) -> None:
        """A shard is lost, though no pass may have noticed. Any thread."""
        self._loss = self._loss or loss
        self._wake()

    def resume(self) -> None:
        """The gang is whole again. For the loop's thread, when every lost pass has been handed back."""
        assert self._num_in_flight == 0, "passes are still in flight"
        self._outgoing.forget_all()
        self._loss = None

    def close(self) -> None:
        """Nothing is submitted from now on."""
        self._submitted.put(None)

    def _watch(self) -> None:
        while (submitted := self._submitted.get()) is not None:
            plan, calls = submitted
            answers = self._gang.answers(calls) if self._loss is None else _beside(self._loss)
            if isinstance(answers, PolytraceError) and self._loss is None:
                self._lose_all(plan, answers)
            else:
                self._ended.put((plan, answers))
            self._wake()

    def _lose_all(self, plan: Plan, failure: PolytraceError) -> None:
        """A pass failed, and with it all behind it: the first that fails need not be the one that broke a shard."""
        failures = [(plan, failure)]
        while not self._submitted.empty():
            submitted = self._submitted.get()
            if submitted is None:
                self.close()
                break
            later, calls = submitted
            is_known = self._loss is not None or isinstance(failure, ShardLostError)
            failures.append((later, failure if is_known else self._gang.first_failure(calls) or failure))
        loss = self._loss = self._loss or min((told for _, told in failures), key=_hearsay)
        for lost, told in failures:
            self._ended.put((lost, told if isinstance(told, PassTooLargeError) else _beside(loss)))


def wait_for_all(calls: Iterable[Any], timeout_s: float) -> tuple[list[Any], list[Any]]:
    """The calls that have ended when all have or the time is up, and the others."""
    waiting = list(calls)
    return ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s) if waiting else ([], [])


def _hearsay(error: PolytraceError) -> int:
    """How far an error is from what caused it: shards whose neighbours fail or die can only tell that they are gone."""
    return 0 if isinstance(error, ShardLostError) else 1 if isinstance(error, PassTooLargeError) else 2


def _beside(loss: PolytraceError) -> PolytraceError:
    """Why a pass is lost that was in flight beside what was lost."""
    if isinstance(loss, PassTooLargeError):
        return PassAbandonedError(f"another pass was abandoned: {loss.message}")
    return loss


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
