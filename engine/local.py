"""The whole engine in one process: the same plans and the same loop as on a cluster, with one shard and no Ray.

`LocalShards` is the loop's view of that shard (depth 1); `LocalBackend` is what `polytrace.load` talks to.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from engine.links import Solo
from engine.loading import ShardConfig, meta_model
from engine.shapes import infer
from engine.shard import Shard
from engine.tokenizer import tokenizer_json
from polytrace.backend import Result
from polytrace.certificate import Certificate
from polytrace.description import ModelDescription
from polytrace.errors import ServiceError
from polytrace.graph import Request
from scheduling.loop import step
from scheduling.plan import Plan, Program, RequestId, ShardResult
from scheduling.program import certify, compile_program
from scheduling.scheduler import PassPolicy, Scheduler


class LocalShards:
    """One shard in this process. A pass runs when it is submitted."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._finished: list[tuple[Plan, tuple[ShardResult, ...]]] = []

    def have_room(self) -> bool:
        return not self._finished

    def submit(self, plan: Plan) -> None:
        self._finished.append((plan, (self.shard.run(plan),)))

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...]]]:
        finished, self._finished = self._finished, []
        yield from finished


class LocalBackend:
    """A model in this process. Threads may share it; their requests take turns."""

    def __init__(
        self,
        source: str,
        *,
        dtype: str = "auto",
        name: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        policy: PassPolicy | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.source = source
        self.shard = Shard(
            ShardConfig(source=source, dtype=dtype, threads=threads, device=device or best_device()), Solo()
        )
        self.shard.start(report)
        self.description = self.shard.describe(name or source, [self.shard.gate()])
        self.shard.open(self.description)
        self.shards = LocalShards(self.shard)
        self.scheduler = Scheduler(self.description, policy or PassPolicy())
        self._meta: PreTrainedModel = meta_model(source, dtype)
        self._lock = threading.Lock()

    def describe(self) -> ModelDescription:
        return self.description

    def tokenizer_json(self) -> bytes | None:
        return tokenizer_json(self.source)

    def validate(self, request: Request) -> Certificate:
        return certify(self.compile(request), request, self.description)

    def compile(self, request: Request) -> Program:
        """The request worked out, ready for the scheduler; GraphError and TooLargeError as at a service's submit."""
        facts = infer(self.description, request, self._meta)
        program = compile_program(RequestId(secrets.token_hex(8)), request, self.description, facts)
        return dataclasses.replace(program, constants=request.constants)

    def run(self, request: Request) -> Result:
        """Runs one request to its end, in as many passes as it has waves."""
        program = self.compile(request)
        with self._lock:
            self.scheduler.add(program)
            while True:
                for outcome in self.scheduler.take_outcomes():
                    if outcome.request != program.request:
                        continue
                    if outcome.error is not None:
                        raise outcome.error
                    if outcome.receipt is None:
                        raise ServiceError(f"request {program.request} ended without a receipt")
                    return Result(values=outcome.values, receipt=outcome.receipt)
                step(self.scheduler, self.shards)

    def close(self) -> None:
        self.shard.stop()


def best_device() -> str:
    """The GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
