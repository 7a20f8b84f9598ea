"""The requests in polytrace: recorded as its users write them, worked out beforehand, run merged or one by one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.generation.by_hand import Tokens
from bench.generation.users import User
from bench.merged import run_together
from engine.local import LocalBackend
from polytrace.graph import Request
from polytrace.model import Model
from scheduling.loop import step
from scheduling.plan import Program, RequestId
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome


class Ours:
    """A model in this process."""

    def __init__(self, folder: Path, *, threads: int, policy: PassPolicy | None = None) -> None:
        policy = policy or PassPolicy(prefix_bytes=0)  # what is measured again is done again
        self.backend = LocalBackend(str(folder), dtype="float32", threads=threads, device="cpu", policy=policy)
        self._model: Any = Model(self.backend)

    def close(self) -> None:
        self.backend.close()

    def programs(self, users: Sequence[User], *, samples: int = 1, sharing: str = "tenant") -> list[Program]:
        """Each user's request, ready for the scheduler. `samples` of each prompt are drawn, or the likeliest taken."""
        return [self.backend.work_out(self._record(user, samples, sharing)) for user in users]

    def merged(self, programs: Sequence[Program]) -> Tokens:
        """New tokens of each, all at once."""
        return [tokens for outcome in run_together(self.backend, programs) for tokens in tokens_of(outcome)]

    def one_by_one(self, programs: Sequence[Program]) -> Tokens:
        """New tokens of each, each in passes of its own."""
        return [tokens for program in programs for tokens in self.merged([program])]

    def _record(self, user: User, samples: int, sharing: str) -> Request:
        model = self._model
        drawn: dict[str, Any] = {"do_sample": True, "seed": 1, "n": samples} if samples > 1 else {}
        options = {"sharing": sharing, "eos": None, "run": False, **drawn}
        with model.generate([user.ids], max_new_tokens=user.new_tokens, **options) as tracer:
            if user.vector is not None or user.unit is not None:
                with tracer.all():
                    self._change(user)
        request: Request = tracer.built_request()
        return request

    def _change(self, user: User) -> None:
        layers = self._model.model.layers
        if user.layer is not None:
            layers[user.layer].output[0][:] += user.vector
        if user.unit is not None:
            for layer in layers:
                for hidden in (layer.self_attn.output[0], layer.mlp.output, layer.output[0]):
                    hidden[:] -= (hidden * user.unit).sum(-1, keepdim=True) * user.unit


class Watch:
    """The scheduler's loop with a clock: when each request's tokens came."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self.outcomes: dict[RequestId, Outcome] = {}
        self.came_s: dict[RequestId, list[float]] = {}  # when each step's tokens did

    def add(self, program: Program) -> None:
        self._backend.scheduler.add(program)
        self.came_s[program.request] = []

    def turn(self) -> None:
        """One round."""
        step(self._backend.scheduler, self._backend.shards)
        now = time.perf_counter()
        for told in self._backend.scheduler.take_progress():
            if told.tokens:
                self.came_s[told.request].append(now)
        for outcome in self._backend.scheduler.take_outcomes():
            if outcome.error is not None:
                raise outcome.error
            self.outcomes[outcome.request] = outcome


def tokens_of(outcome: Outcome) -> Tokens:
    """New tokens of every sequence."""
    if outcome.receipt is None:
        raise ValueError(f"request {outcome.request} has no receipt")
    return [generated.ids for generated in outcome.receipt.generated]
