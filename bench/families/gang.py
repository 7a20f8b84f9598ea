"""A model in several processes, stages or ranks, without Ray: pipes for plans and results, gloo between shards."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from engine.links import Distributed, join_store, open_store
from engine.loading import ShardConfig, meta_model
from engine.local import DirectBackend
from engine.shard import Shard
from polytrace.errors import PolytraceError, ServiceError
from polytrace.model import Model
from scheduling.plan import Plan, ShardResult

_WAIT_S = 60.0
_HOST = "127.0.0.1"


@contextmanager
def gang(source: str, *, stages: int, ranks: int) -> Iterator[Model]:
    """The model of a folder, its shards in forks of this process. ServiceError when they cannot serve it."""
    shards = _Shards(source, stages=stages, ranks=ranks)
    try:
        yield Model(DirectBackend(source, shards, shards.start(), meta_model(source)))
    finally:
        shards.close()


class _Shards:
    """The loop's view of them, one pass at a time."""

    def __init__(self, source: str, *, stages: int, ranks: int) -> None:
        context = get_context("fork")  # what is imported stays so, and this process has no threads of its own
        self._store = open_store(_HOST, timeout_s=_WAIT_S)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._plan: Plan | None = None
        for stage in range(stages):
            for rank in range(ranks):
                config = ShardConfig(source=source, stage=stage, stages=stages, rank=rank, ranks=ranks, threads=1)
                ours, theirs = context.Pipe()
                self._processes.append(context.Process(target=_serve, args=(theirs, config, self._store.port)))
                self._processes[-1].start()
                theirs.close()
                self._pipes.append(ours)

    def start(self) -> Any:
        """The deployment's description."""
        reports = self._collect()
        for pipe in self._pipes:
            pipe.send(reports)
        return self._collect()[0]

    def have_room(self) -> bool:
        return self._plan is None

    def submit(self, plan: Plan) -> None:
        self._plan = plan
        for pipe in self._pipes:
            pipe.send(plan)

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        if self._plan is not None:
            plan, self._plan = self._plan, None
            yield plan, tuple(self._collect())

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()

    def _collect(self) -> list[Any]:
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(_WAIT_S):
                raise ServiceError("a shard did not answer")
            try:
                answers.append(pipe.recv())
            except EOFError:
                raise ServiceError("a shard's process ended") from None
        failures = [answer for answer in answers if isinstance(answer, str)]
        if failures:
            raise ServiceError(min(failures, key=_is_told))
        return answers


def _is_told(message: str) -> bool:
    """Whether it only says what another shard's failure did here."""
    return "lost" in message or "another rank" in message


def _serve(pipe: Connection, config: ShardConfig, port: int) -> None:
    try:
        store = join_store(_HOST, port, timeout_s=_WAIT_S)
        place = {name: getattr(config, name) for name in ("stage", "stages", "rank", "ranks")}
        shard = Shard(config, Distributed(store, **place, timeout_s=_WAIT_S))
        shard.start(lambda line: None)
        pipe.send(shard.gate())
        description = shard.describe("tiny", pipe.recv())
        shard.open(description)
        pipe.send(description)
        while True:
            pipe.send(shard.run(pipe.recv()))
    except EOFError:
        pass  # the pipe was closed: it is over
    except Exception as error:  # noqa: BLE001 - the edge of a process
        told = error.message if isinstance(error, PolytraceError) else traceback.format_exc().strip().split("\n")[-1]
        pipe.send(told)
    os._exit(0)  # at once: nothing here outlives the trial
