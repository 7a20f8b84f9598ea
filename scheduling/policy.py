"""Who goes into the next pass, and how large it is. Owns the choice: what a pass looks like is `scheduling.packing`.

With several stages a pass is at one of them at a time, so the others have work only when there are other passes. What
waits is therefore cut into passes of about equal cost, as many as keep every stage busy (`share_of`). Fewer and larger
ones would leave stages idle, more and smaller ones would make kernels wait for memory. Steps of generations are cut by
themselves (`share_of_steps`): each waits for the one before, and a pass of few rows costs what it costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from scheduling.plan import MIN_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPolicy:
    """How large a pass may be."""

    budget_tokens: int = 8192  # rows of all members, each at its widest layer; a wave that alone has more goes alone
    least_tokens: int = 256  # no pass is cut below so many rows: each would read all weights for too little
    max_members: int = 256
    tokens_beside_steps: int = 256  # rows of others in a pass of steps, so that no generation waits long for its next
    max_waits: int = 8  # passes that one with more rows stands behind steps before it goes all the same


def passes_in_flight(stages: int) -> int:
    """How many passes keep all stages at work: one each, and one that waits at the first, so that this one need not
    wait until it is known at the other end of the pipeline that a pass has ended.
    """
    return stages + 1 if stages > 1 else 1


def share_of(waiting_rows: int, slots: int, policy: PassPolicy) -> int:
    """The rows of the next pass when so many wait and so many passes could start: all of them in equal passes."""
    return min(policy.budget_tokens, max(policy.least_tokens, -(-waiting_rows // max(1, slots))))


def share_of_steps(waiting_rows: int, slots: int) -> int:
    """The rows of steps in the next pass: all that wait in equal groups, one for each pass that could start.

    A step follows when the one before has been through all stages, so a group that has all steps would keep one stage
    at work. Groups are no smaller than what kernels compute anyway.
    """
    return max(MIN_ROWS, -(-waiting_rows // max(1, slots)))


def wave_tokens(policy: PassPolicy, stages: int) -> int:
    """The most rows of a request's wave: one that has the deployment to itself fills the stages with its own waves."""
    return max(min(policy.least_tokens, policy.budget_tokens), policy.budget_tokens // stages)


class Candidate(Protocol):
    """A wave that is ready to go."""

    @property
    def party(self) -> object | None:
        """Those of one party go together and beside nobody else; None: with anyone who has none."""

    @property
    def num_rows(self) -> int:
        """Rows it adds to a pass."""

    @property
    def is_step(self) -> bool:
        """Whether it is a step of a generation, behind its prompts."""


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


class Choice(Protocol):
    """Who goes next."""

    def choose(self, candidates: Iterable[AnyCandidate], budget_tokens: int) -> list[AnyCandidate]:
        """Those of the candidates, given in the order in which they should go, that go now."""

    def went(self, chosen: Sequence[Candidate]) -> None:
        """These are in a pass."""


class FirstComeFirstServed:
    """In order of arrival; a smaller one may fill the room that a larger one before it does not fit into.

    The first candidate always goes, so nobody waits for ever. Waves without rows cost nothing and always fit. Whom the
    first has for its party goes with it, however many rows that is.
    """

    def __init__(self, max_members: int) -> None:
        self._max_members = max_members

    def choose(self, candidates: Iterable[AnyCandidate], budget_tokens: int) -> list[AnyCandidate]:
        """Those of the candidates, given in the order in which they should go, that go now."""
        chosen: list[AnyCandidate] = []
        room = budget_tokens
        has_rows = False
        for candidate in candidates:
            if len(chosen) == self._max_members:
                break
            if chosen and candidate.party != chosen[0].party:
                continue
            rows = candidate.num_rows
            if candidate.party is not None or rows == 0 or rows <= room or not has_rows:
                chosen.append(candidate)
                room -= rows
                has_rows = has_rows or rows > 0
        return chosen

    def went(self, chosen: Sequence[Candidate]) -> None:
        """As `Choice.went`: nothing depends on it."""


class InTurns:
    """Where sequences run one by one: steps of all generations together, in turns with one other wave at a time.

    So who comes later waits for a step, and not until generations end, and these for one wave of another. Waves of
    several requests in one pass would only make the first wait for the last.
    """

    def __init__(self, max_members: int) -> None:
        """`max_members` are generations in one pass."""
        self._steps, self._others = FirstComeFirstServed(max_members), FirstComeFirstServed(1)
        self._had_steps = False  # the last pass

    def choose(self, candidates: Iterable[AnyCandidate], budget_tokens: int) -> list[AnyCandidate]:
        """As `Choice.choose`."""
        waiting = list(candidates)
        steps = [one for one in waiting if one.is_step]
        others = [one for one in waiting if not one.is_step]
        if steps and not (others and self._had_steps):
            return self._steps.choose(steps, budget_tokens)
        return self._others.choose(others, budget_tokens)

    def went(self, chosen: Sequence[Candidate]) -> None:
        """As `Choice.went`."""
        self._had_steps = any(one.is_step for one in chosen)
