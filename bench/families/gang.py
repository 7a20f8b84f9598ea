"""A model in several processes, stages or ranks, without Ray: pipes for plans and results, gloo between shards.

The processes are forked first, before this one has threads of its own, and wait until somebody has a model for them.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from engine.direct import DirectBackend
from engine.links import Distributed, join_store, open_store
from engine.loading import ShardConfig, meta_model
from engine.shard import Shard
from polytrace.errors import PolytraceError, ServiceError
from polytrace.model import Model
from scheduling.plan import Plan, ShardResult

_WAIT_S = 30.0
_HOST = "127.0.0.1"


class Workers:
    """Processes that wait for a shard to be; each is one once."""

    def __init__(self, number: int) -> None:
        context = get_context("fork")
        self._waiting: list[tuple[Connection, Any]] = []
        for _ in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            theirs.close()
            self._waiting.append((ours, process))

    def take(self, number: int) -> list[tuple[Connection, Any]]:
        """So many of them."""
        taken, self._waiting = self._waiting[:number], self._waiting[number:]
        return taken

    def close(self) -> None:
        """Ends those that still wait."""
        _end(self.take(len(self._waiting)))


@contextmanager
def gang(workers: Workers, source: str, *, stages: int, ranks: int) -> Iterator[Model]:
    """The model of a folder over some workers. ServiceError when they cannot serve it."""
    shards = _Shards(workers.take(stages * ranks), source, stages=stages, ranks=ranks)
    try:
        yield Model(DirectBackend(source, shards, shards.start(), meta_model(source)))
    finally:
        shards.close()


class _Shards:
    """The loop's view of them, one pass at a time."""

    def __init__(self, workers: list[tuple[Connection, Any]], source: str, *, stages: int, ranks: int) -> None:
        self._store = open_store(_HOST, timeout_s=_WAIT_S)
        self._workers = workers
        self._pipes = [pipe for pipe, _ in workers]
        self._plan: Plan | None = None
        for number, pipe in enumerate(self._pipes):
            stage, rank = divmod(number, ranks)
            config = ShardConfig(source=source, stage=stage, stages=stages, rank=rank, ranks=ranks, threads=1)
            pipe.send((config, self._store.port))

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
        _end(self._workers)

    def _collect(self) -> list[Any]:
        """An answer of each. What fails on one is not waited for on others, who may be waiting for it."""
        answers: dict[int, Any] = {}
        failures: list[str] = []
        while len(answers) < len(self._pipes):
            open_pipes = [pipe for number, pipe in enumerate(self._pipes) if number not in answers]
            ready = wait(open_pipes, 2.0 if failures else _WAIT_S)
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    answer = pipe.recv()
                except EOFError:
                    answer = "a shard's process ended"
                answers[self._pipes.index(pipe)] = answer
                failures += [answer] if isinstance(answer, str) else []
        if failures:
            raise ServiceError(min(failures, key=_is_told))
        if len(answers) < len(self._pipes):
            raise ServiceError("a shard did not answer")
        return [answers[number] for number in range(len(self._pipes))]


def _is_told(message: str) -> bool:
    """Whether it only says what another shard's failure did here."""
    return "lost" in message or "another rank" in message


def _end(workers: list[tuple[Connection, Any]]) -> None:
    for pipe, _ in workers:
        with suppress(OSError):
            pipe.send(None)
    for _, process in workers:
        process.join(5)
        if process.is_alive():
            process.kill()


def _serve(pipe: Connection) -> None:
    """A worker: a shard's configuration and its world's port come first, then its gang's gate reports, then plans."""
    try:
        if (told := pipe.recv()) is not None:
            config, port = told
            store = join_store(_HOST, port, timeout_s=_WAIT_S)
            place = {name: getattr(config, name) for name in ("stage", "stages", "rank", "ranks")}
            shard = Shard(config, Distributed(store, **place, timeout_s=_WAIT_S))
            shard.start(lambda line: None)
            pipe.send(shard.gate())
            if (reports := pipe.recv()) is not None:
                description = shard.describe("tiny", reports)
                shard.open(description)
                pipe.send(description)
                while (plan := pipe.recv()) is not None:
                    pipe.send(shard.run(plan))
    except Exception as error:  # noqa: BLE001 - the edge of a process
        told = error.message if isinstance(error, PolytraceError) else traceback.format_exc().strip().split("\n")[-1]
        pipe.send(told)
    os._exit(0)  # at once: nothing here outlives the trial
