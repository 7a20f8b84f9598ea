"""Requests straight to shards, with no service between: the same plans and the same loop as on a cluster.

`DirectBackend` drives any shards; `LocalBackend` drives one shard in this process (`LocalShards`, depth 1) and is what
`polytrace.load` talks to.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from engine.keeping import LocalKeeper
from engine.links import Solo
from engine.loading import ShardConfig, meta_model
from engine.reading import Reading
from engine.shapes import infer
from engine.shard import Shard
from engine.tokenizer import tokenizer_json
from polytrace.backend import Result
from polytrace.certificate import Certificate
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError, ServiceError
from polytrace.graph import Request
from polytrace.progress import Hear, Tell, hear_nothing, tell_nobody
from scheduling.loop import Shards, step
from scheduling.plan import Plan, Program, RequestId, ShardResult, ValueFacts
from scheduling.program import certify, compile_program
from scheduling.scheduler import Outcome, PassPolicy, Scheduler


class LocalShards:
    """One shard in this process. A pass runs when it is submitted."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._finished: list[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]] = []

    def have_room(self) -> bool:
        return not self._finished

    def submit(self, plan: Plan) -> None:
        try:
            self._finished.append((plan, (self.shard.run(plan),)))
        except PolytraceError as error:
            self._finished.append((plan, error))
        except RuntimeError as error:  # torch's: a kernel that failed
            self._finished.append((plan, ServiceError(f"the pass failed: {error}")))

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        finished, self._finished = self._finished, []
        yield from finished


class DirectBackend:
    """Compiles requests and drives shards with them. Threads may share it; their requests take turns."""

    def __init__(
        self,
        source: str,
        shards: Shards,
        description: ModelDescription,
        meta: nn.Module,
        policy: PassPolicy | None = None,
    ) -> None:
        self.source = source
        self.shards = shards
        self.description = description
        self.scheduler = Scheduler(description, policy or PassPolicy())
        self.keeper = LocalKeeper()
        self._meta = meta
        self._lock = threading.Lock()

    def describe(self) -> ModelDescription:
        return self.description

    def tokenizer_json(self) -> bytes | None:
        return tokenizer_json(self.source)

    def validate(self, request: Request) -> Certificate:
        facts = infer(self.description, request, self._meta)
        return certify(self._compile(request, facts), facts, self.description)

    def compile(self, request: Request) -> Program:
        """The request worked out, ready for the scheduler; GraphError and TooLargeError as at a service's submit."""
        return self._compile(request, infer(self.description, request, self._meta))

    def _compile(self, request: Request, facts: tuple[ValueFacts | None, ...]) -> Program:
        return compile_program(RequestId(secrets.token_hex(8)), request, self.description, facts)

    def run(self, request: Request, tell: Tell = tell_nobody, hear: Hear = hear_nothing) -> Result:
        """Runs one request to its end, in as many passes as it has waves; in more when these turn out too large."""
        with self.keeper.begun(request) as begun:
            return self._run(begun, tell, hear)

    def _run(self, request: Request, tell: Tell, hear: Hear) -> Result:
        (outcome,) = self.run_together([self.compile(request)], tell, hear)
        while outcome.may_be_cut:
            limits = replace(self.description.limits, pass_tokens=self.scheduler.budget_tokens)
            self.description = replace(self.description, limits=limits)
            (outcome,) = self.run_together([self.compile(request)], tell, hear)
        if outcome.error is not None:
            raise outcome.error
        if outcome.receipt is None:
            raise ServiceError(f"request {outcome.request} ended without a receipt")
        if request.keeps:
            self.keeper.publish(outcome.receipt.request, request.keeps, outcome.values)
        left = {keep.save for keep in request.keeps}
        values = {name: value for name, value in outcome.values.items() if name not in left}
        return Result(values=values, receipt=outcome.receipt)

    def run_together(
        self, programs: Sequence[Program], tell: Tell = tell_nobody, hear: Hear = hear_nothing
    ) -> list[Outcome]:
        """Runs programs merged, as far as the pass policy lets them; their outcomes, in order. A program runs once.

        `tell` hears how far those are that take several passes, and `hear` what they log on the way.
        """
        outcomes: dict[RequestId, Outcome] = {}
        with self._lock:
            for program in programs:
                self.scheduler.add(program)
            while len(outcomes) < len(programs):
                step(self.scheduler, self.shards)
                for told in self.scheduler.take_progress():
                    tell(told.passes_done, told.passes)
                    hear(told.values)
                outcomes.update((outcome.request, outcome) for outcome in self.scheduler.take_outcomes())
        return [outcomes[program.request] for program in programs]

    def close(self) -> None:
        """Nothing is held here: the shards are their maker's."""


class LocalBackend(DirectBackend):
    """A model in this process."""

    def __init__(
        self,
        source: str,
        *,
        dtype: str = "auto",
        name: str | None = None,
        threads: int | None = None,
        device: str | None = None,
        policy: PassPolicy | None = None,
        random_weights: int | None = None,
        offload_gib: float = 0.0,
        tell: Tell = tell_nobody,
    ) -> None:
        """`random_weights`: a seed, to read none. `offload_gib`: of the weights to keep in the host's memory.
        `tell` hears how many bytes of the weights are there, of how many.
        """
        config = ShardConfig(
            source=source,
            dtype=dtype,
            threads=threads,
            device=device or best_device(),
            random_weights_seed=random_weights,
            offload_bytes=int(offload_gib * (1 << 30)),
        )
        self.shard = Shard(config, Solo())
        self.shard.start(lambda told: tell(told.read_bytes, told.total_bytes) if isinstance(told, Reading) else None)
        description = self.shard.describe(name or source, [self.shard.gate()])
        policy = policy or PassPolicy()
        description = replace(description, limits=replace(description.limits, pass_tokens=policy.budget_tokens))
        self.shard.open(description)
        super().__init__(source, LocalShards(self.shard), description, meta_model(source, dtype), policy)

    def close(self) -> None:
        self.shard.stop()


def best_device() -> str:
    """The GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
