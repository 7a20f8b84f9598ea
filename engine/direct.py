"""Requests straight to shards, with no service between: the same plans and the same loop as on a cluster.

`DirectBackend` drives any shards; `LocalShards` is one in this process. Knows nothing of where a model comes from.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from engine.keeping import LocalKeeper
from engine.shapes import infer
from engine.shard import Shard
from engine.tokenizer import tokenizer_json
from polytrace.backend import Result
from polytrace.certificate import Certificate
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError, ServiceError
from polytrace.generation import check_stop_texts
from polytrace.graph import Request
from polytrace.progress import Hear, HearTokens, Tell, hear_no_tokens, hear_nothing, tell_nobody
from polytrace.tokenizer import load_tokenizer
from scheduling.loop import Shards, step
from scheduling.plan import Plan, Program, RequestId, ShardResult
from scheduling.policy import PassPolicy
from scheduling.program import certify
from scheduling.scheduler import Outcome, Progress, Scheduler
from scheduling.steps import Facts
from scheduling.working_out import work_out


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
        except Exception as error:  # noqa: BLE001  of its members: who drives may be somebody else
            told = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "  # torch's say enough
            failed = ServiceError(f"the pass failed: {told}{error}")
            failed.__cause__ = error
            self._finished.append((plan, failed))

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        finished, self._finished = self._finished, []
        yield from finished


class _Waiting:
    """Who waits for a request."""

    def __init__(self, tell: Tell, hear: Hear, hear_tokens: HearTokens) -> None:
        self._tell, self._hear, self._hear_tokens = tell, hear, hear_tokens
        self.news: deque[Progress | Outcome] = deque()
        self.outcome: Outcome | None = None

    def listen(self) -> None:
        """Takes in what is new; in the thread that waits, so that nobody else has what goes wrong there."""
        while self.news:
            told = self.news.popleft()
            if isinstance(told, Progress):
                self._tell(told.passes_done, told.passes)
                self._hear(told.values)
            if told.tokens:
                self._hear_tokens(told.tokens)


class DirectBackend:
    """Works requests out and drives shards with them. Threads may share it; their requests take turns."""

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
        self.scheduler = Scheduler(description, policy or PassPolicy(), decode=self._decode)
        self.keeper = LocalKeeper()
        self._meta = meta
        self._tokenizer: Any = None
        self._arrived: deque[Program] = deque()  # for the scheduler, which one thread at a time calls
        self._unwanted: deque[RequestId] = deque()
        self._waiting: dict[RequestId, _Waiting] = {}
        self._turn = threading.Condition()
        self._is_driven = False  # by a thread, for all that wait

    def describe(self) -> ModelDescription:
        return self.description

    def _decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, for texts that end a sequence."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def _has_tokenizer(self) -> bool:
        if self._tokenizer is None and (stored := self.tokenizer_json()) is not None:
            self._tokenizer = load_tokenizer(stored)
        return self._tokenizer is not None

    def tokenizer_json(self) -> bytes | None:
        return tokenizer_json(self.source)

    def validate(self, request: Request) -> Certificate:
        program, facts = self._worked_out(request)
        return certify(program, facts, self.description)

    def work_out(self, request: Request) -> Program:
        """The request worked out, ready for the scheduler; GraphError and TooLargeError as at a service's submit."""
        return self._worked_out(request)[0]

    def _worked_out(self, request: Request) -> tuple[Program, Facts]:
        """The program, and what is known of the request's nodes."""
        check_stop_texts(request.invokes, self._has_tokenizer)
        return self._program_of(RequestId(secrets.token_hex(8)), request)

    def _program_of(self, request_id: RequestId, request: Request) -> tuple[Program, Facts]:
        return work_out(request_id, request, self.description, self._infer)

    def _infer(self, request: Request) -> Facts:
        return infer(self.description, request, self._meta)

    def run(
        self,
        request: Request,
        tell: Tell = tell_nobody,
        hear: Hear = hear_nothing,
        hear_tokens: HearTokens = hear_no_tokens,
    ) -> Result:
        """Runs one request to its end, in as many passes as it has waves; in more when these turn out too large.

        Requests of several threads share passes.
        """
        with self.keeper.begun(request) as begun:
            return self._run(begun, tell, hear, hear_tokens)

    def _run(self, request: Request, tell: Tell, hear: Hear, hear_tokens: HearTokens) -> Result:
        (outcome,) = self.run_together([self.work_out(request)], tell, hear, hear_tokens)
        while outcome.may_be_cut:
            limits = replace(self.description.limits, pass_tokens=self.scheduler.budget_tokens)
            self.description = replace(self.description, limits=limits)
            (outcome,) = self.run_together([self.work_out(request)], tell, hear, hear_tokens)
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
        self,
        programs: Sequence[Program],
        tell: Tell = tell_nobody,
        hear: Hear = hear_nothing,
        hear_tokens: HearTokens = hear_no_tokens,
    ) -> list[Outcome]:
        """Runs programs merged, as far as the pass policy lets them, also with those of other threads; their outcomes,
        in order. A program runs once.

        `tell` hears how far those are that take several passes, `hear` what they log on the way, and `hear_tokens` what
        they go on with. One of the threads that wait runs the passes for all.
        """
        own = [_Waiting(tell, hear, hear_tokens) for _ in programs]
        with self._turn:
            self._waiting.update((program.request, one) for program, one in zip(programs, own, strict=True))
            self._arrived.extend(programs)
        try:
            while not all(one.outcome is not None for one in own):
                self._go_on()
                for one in own:
                    one.listen()
        finally:
            self._unwanted.extend(program.request for program in programs if self._waiting.pop(program.request, None))
        return [one.outcome for one in own if one.outcome is not None]

    def _go_on(self) -> None:
        """Runs a pass, or waits until another thread has run one."""
        with self._turn:
            if self._is_driven:
                self._turn.wait()
                return
            self._is_driven = True
        try:
            self._drive()
        finally:
            with self._turn:
                self._is_driven = False
                self._turn.notify_all()

    def _drive(self) -> None:
        while self._unwanted:
            self.scheduler.cancel(self._unwanted.popleft())
        while self._arrived:
            self.scheduler.add(self._arrived.popleft())
        step(self.scheduler, self.shards)
        for told in self.scheduler.take_progress():
            if (one := self._waiting.get(told.request)) is not None:
                one.news.append(told)
        for outcome in self.scheduler.take_outcomes():
            if (one := self._waiting.pop(outcome.request, None)) is not None:
                one.news.append(outcome)
                one.outcome = outcome
        if not self._waiting:
            while self.scheduler.has_work():  # shards are told what has ended
                step(self.scheduler, self.shards)

    def forget_prefixes(self) -> None:
        """Drops what generations have left in the cache for others to go on from."""
        with self._turn:
            while self._is_driven:
                self._turn.wait()
            self.scheduler.forget_prefixes()
            while self.scheduler.has_work():
                step(self.scheduler, self.shards)

    def close(self) -> None:
        """Nothing is held here: the shards are their maker's."""
