"""The shards of one deployment as Ray actors: called all at once, lost all at once.

Owns what it means that a shard fails: one gang, one fate. Says in every error which shard it was, and prefers the shard
that died over its neighbours, who only noticed. `RayShards` is the loop's view of a gang.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from polytrace.errors import PolytraceError, ServiceError
from scheduling.plan import Plan, ShardResult

_HEARSAY_S = 1.0  # after a failure the other shards hear of it within moments: gloo and NCCL notice a dead peer


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
        calls = self.start(method, *args)
        failure = self.first_failure(calls)
        if failure is not None:
            raise failure
        answers: list[Any] = ray.get(calls)
        return answers

    def call_first(self, method: str, *args: Any) -> Any:
        """Calls the first shard alone."""
        try:
            return ray.get(getattr(self.actors[0], method).remote(*args))
        except RayError as error:
            raise self.explain(0, error) from error

    def start(self, method: str, *args: Any) -> list[Any]:
        """Calls every shard and waits for none: handles of the answers."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

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
        dead = (index for index, error in failed.items() if isinstance(error, RayActorError))
        index = next(dead, next(iter(failed)))
        return self.explain(index, failed[index])

    def explain(self, index: int, error: RayError) -> PolytraceError:
        """What a shard's failure is to us. Its own PolytraceError keeps its kind."""
        name = self.name(index)
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, PolytraceError):
            return type(cause)(f"{name}: {cause.message}", where=cause.where)
        if isinstance(error, RayActorError):
            return ServiceError(f"the shard {name} died: {_first_line(error)}")
        return ServiceError(f"the shard {name} failed: {_first_line(cause or error)}")


class RayShards:
    """The loop's shards (`scheduling.loop.Shards`): as many passes in flight as there are stages.

    After a loss `finished` hands back every pass in flight with the reason, and raises it from then on. `wake` is
    called from a thread of its own whenever there is something new for `finished`.
    """

    def __init__(self, gang: Gang, wake: Callable[[], None]) -> None:
        self._gang = gang
        self._wake = wake
        self._num_in_flight = 0
        self._submitted: queue.SimpleQueue[tuple[Plan, list[Any]] | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]] = queue.SimpleQueue()
        self._loss: PolytraceError | None = None
        threading.Thread(target=self._watch, name="passes", daemon=True).start()

    def have_room(self) -> bool:
        """Whether a stage would have nothing to do without another pass; False for ever after a loss."""
        return self._loss is None and self._num_in_flight < self._gang.stages

    def submit(self, plan: Plan) -> None:
        """Sends the plan to every shard; serialised once for all."""
        self._num_in_flight += 1
        self._submitted.put((plan, self._gang.start("run", ray.put(plan))))

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

    def close(self) -> None:
        """Nothing is submitted from now on."""
        self._submitted.put(None)

    def _watch(self) -> None:
        while (submitted := self._submitted.get()) is not None:
            plan, calls = submitted
            if self._loss is None:
                self._loss = self._gang.first_failure(calls)
            self._ended.put((plan, self._loss or tuple(ray.get(calls))))
            self._wake()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
