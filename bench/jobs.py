"""Users' requests as a service gets them: recorded once through the client, run alone, held against Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.plain import Plain, difference
from bench.workloads import KINDS, choice
from polytrace.backend import Backend, Result
from polytrace.certificate import Certificate
from polytrace.description import ModelDescription
from polytrace.graph import Request
from polytrace.progress import Hear, HearTokens, Tell, hear_no_tokens, hear_nothing, tell_nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A user's request as it reaches the service, and what it must bring back."""

    kind: str
    request: Request
    alone: Result  # of the same engine, with nobody else in the pass
    off: float  # largest difference of `alone` to plain Hugging Face, see `bench.plain.difference`


class Recorder:
    """A backend that runs each request alone in another backend, and remembers it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.seen: list[tuple[Request, Result]] = []

    def describe(self) -> ModelDescription:
        return self._backend.describe()

    def tokenizer_json(self) -> bytes | None:
        return self._backend.tokenizer_json()

    def validate(self, request: Request) -> Certificate:
        return self._backend.validate(request)

    def run(
        self,
        request: Request,
        tell: Tell = tell_nobody,
        hear: Hear = hear_nothing,
        hear_tokens: HearTokens = hear_no_tokens,
    ) -> Result:
        result = self._backend.run(request)
        # a copy: a saved value takes over the tensor that it is given
        copies = {name: torch.as_tensor(value).clone() for name, value in result.values.items()}
        self.seen.append((request, Result(values=copies, receipt=result.receipt)))
        return result

    def close(self) -> None:
        """Nothing: the other backend is its maker's."""


def make_jobs(model: Any, recorder: Recorder, plain: Plain, *, num_users: int) -> list[Job]:
    """One request of each user, run alone and held against plain Hugging Face. `model` talks to `recorder`."""
    jobs = []
    for user in range(num_users):
        kind, at = KINDS[user % len(KINDS)], choice(user, plain)
        ours, theirs = kind.ask(model, at), kind.check(plain, at)
        request, result = recorder.seen[-1]
        off = max(difference(ours[name], theirs[name]) for name in theirs)
        jobs.append(Job(kind=kind.name, request=request, alone=result, off=off))
    return jobs


def sequences(jobs: Sequence[Job]) -> list[tuple[int, ...]]:
    """Every prompt of every request, as often as it is sent."""
    return [sequence for job in jobs for invoke in job.request.invokes for sequence in invoke.sequences]
