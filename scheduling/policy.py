"""Who goes into the next pass, and how large it is. Owns the choice: what a pass looks like is `scheduling.packing`.

With several stages a pass is at one of them at a time, so the others have work only when there are other passes. What
waits is therefore cut into passes of about equal cost, as many as keep every stage busy (`share_of`). Fewer and larger
ones would leave stages idle, more and smaller ones would make kernels wait for memory.

Steps of generations go first, and beside them so few rows of others that nobody waits long for the next token: prompts
are cut, and what cannot be cut goes before steps once it has waited for some passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

BUDGET_TOKENS = 8192  # rows of a pass, where nobody says otherwise
MAX_ACTIVE = 1024  # the same of requests that a replica has worked out and in memory; the rest waits in the store


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPolicy:
    """How large a pass may be."""

    budget_tokens: int = BUDGET_TOKENS  # of all members, each at its widest layer; a wave that has more goes alone
    least_tokens: int = 256  # no pass is cut below so many rows: each would read all weights for too little
    max_members: int = 256
    tokens_beside_steps: int = 256  # rows of others in a pass of steps, so that no generation waits long for its next
    max_waits: int = 8  # passes that one with more rows stands behind steps before it goes all the same
    least_steps: int = 16  # no group of steps is cut below so many: kernels have as many rows in any case
    prefix_bytes: int | None = None  # of caches kept for others to go on from; None: half of what shards have; 0: none
    tells_of_other_tenants: bool = False  # receipts: how many shared a pass, with how many rows
    merges_calls: bool = False  # of a model that is called as it is: requests whose calls may be one share a pass


def passes_in_flight(stages: int) -> int:
    """How many passes keep all stages at work: one each, and one that waits at the first, so that this one need not
    wait until it is known at the other end of the pipeline that a pass has ended.
    """
    return stages + 1 if stages > 1 else 1


def share_of(waiting_rows: int, slots: int, policy: PassPolicy) -> int:
    """The rows of the next pass when so many wait and so many passes could start: all of them in equal passes."""
    return min(policy.budget_tokens, max(policy.least_tokens, -(-waiting_rows // max(1, slots))))


def step_share(step_rows: int, slots: int, policy: PassPolicy) -> int:
    """The rows of the next pass's steps when so many are on their way in so many passes: about equal groups of them."""
    return max(policy.least_steps, -(-step_rows // max(1, slots)))


def most_wave_rows(policy: PassPolicy, stages: int) -> int:
    """The most rows of a request's wave: one that has the deployment to itself fills the stages with its own waves."""
    return max(min(policy.least_tokens, policy.budget_tokens), policy.budget_tokens // stages)


class Candidate(Protocol):
    """A wave that is ready to go."""

    @property
    def party(self) -> object | None:
        """Those of one party go together and beside nobody else; None: with anyone who has none."""

    @property
    def company(self) -> object | None:
        """As `party`, but no more of them than there is room for."""

    @property
    def is_step(self) -> bool:
        """Whether somebody waits for its next token."""

    @property
    def num_rows(self) -> int:
        """Rows it adds to a pass."""

    @property
    def least_rows(self) -> int:
        """The fewest that it may go with; less than `num_rows` when it can be cut."""


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


class Choice(Protocol):
    """Who goes next."""

    def choose(
        self, candidates: Iterable[AnyCandidate], step_rows: int, other_rows: int
    ) -> list[tuple[AnyCandidate, int]]:
        """Those of the candidates, given in the order in which they should go, that go now, each with its rows."""

    def went(self, chosen: Sequence[Candidate]) -> None:
        """These are in a pass."""


class FirstComeFirstServed:
    """In the order given; a smaller one may fill the room that a larger one before it does not fit into.

    Steps have room of their own, and others have what is left for them beside. The first candidate always goes, so
    nobody waits for ever who comes first. Waves without rows cost nothing and always fit. Whom the first has for its
    party goes with it, however many rows that is. What can be cut goes with the rows that there is room for.
    """

    def __init__(self, max_members: int) -> None:
        self._max_members = max_members

    def choose(
        self, candidates: Iterable[AnyCandidate], step_rows: int, other_rows: int
    ) -> list[tuple[AnyCandidate, int]]:
        """Those of the candidates that go now, each with its rows."""
        chosen: list[tuple[AnyCandidate, int]] = []
        room = {True: step_rows, False: other_rows}
        is_first = True  # of those with rows
        kind: tuple[object | None, object | None] | None = None
        for candidate in candidates:
            if len(chosen) == self._max_members:
                break
            rows, left, party = candidate.num_rows, room[candidate.is_step], candidate.party
            must = is_first or party is not None or not rows
            is_cut = rows > left and candidate.least_rows < rows and (must or candidate.least_rows <= left)
            if rows > left and not must and not is_cut:
                continue
            own = party, candidate.company
            if kind is None:
                kind = own
            elif own != kind:
                continue
            if is_cut:
                rows = max(candidate.least_rows, left)
            chosen.append((candidate, rows))
            room[candidate.is_step] -= rows
            is_first = is_first and not rows
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

    def choose(
        self, candidates: Iterable[AnyCandidate], step_rows: int, other_rows: int
    ) -> list[tuple[AnyCandidate, int]]:
        """As `Choice.choose`."""
        waiting = list(candidates)
        steps = [one for one in waiting if one.is_step]
        others = [one for one in waiting if not one.is_step]
        if steps and not (others and self._had_steps):
            return self._steps.choose(steps, step_rows, other_rows)
        return self._others.choose(others, step_rows, other_rows)

    def went(self, chosen: Sequence[Candidate]) -> None:
        """As `Choice.went`."""
        self._had_steps = any(one.is_step for one in chosen)


class Patience:
    """How long others stand behind steps: whoever is first of them goes before these when it has waited for a while."""

    def __init__(self, max_waits: int) -> None:
        self._max_waits = max_waits
        self._waits = 0  # passes that somebody has stood behind steps

    def ordered(self, candidates: Sequence[AnyCandidate]) -> list[AnyCandidate]:
        """The candidates, steps first, in the order in which they should go."""
        first = next((candidate for candidate in candidates if not candidate.is_step), None)
        if first is None or self._waits < self._max_waits:
            return list(candidates)
        return [first, *(candidate for candidate in candidates if candidate is not first)]

    def went(self, candidates: Sequence[AnyCandidate], chosen: Collection[AnyCandidate]) -> None:
        """Who went of them."""
        first = next((candidate for candidate in candidates if not candidate.is_step), None)
        self._waits = 0 if first is None or first in chosen else self._waits + 1
