"""Who goes into the next pass. Owns the choice only: what a pass looks like is `scheduling.packing`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPolicy:
    """How large a pass may be."""

    budget_tokens: int = 8192  # rows of all members, each at its widest layer; a wave that alone has more goes alone
    max_members: int = 256


class Candidate(Protocol):
    """A wave that is ready to go."""

    @property
    def is_suspect(self) -> bool:
        """Whether it goes alone."""

    @property
    def num_rows(self) -> int:
        """Rows it adds to a pass."""


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


class FirstComeFirstServed:
    """In order of arrival; a smaller one may fill the room that a larger one before it does not fit into.

    The first candidate always goes, so nobody waits for ever. Waves without rows cost nothing and always fit. A suspect
    goes alone, when it is the first.
    """

    def __init__(self, policy: PassPolicy) -> None:
        self.policy = policy

    def choose(self, candidates: Iterable[AnyCandidate], budget_tokens: int | None = None) -> list[AnyCandidate]:
        """Those of the candidates, given in order of arrival, that go now.

        `budget_tokens` stands for the policy's where the candidates are known to have rows in common.
        """
        chosen: list[AnyCandidate] = []
        room = self.policy.budget_tokens if budget_tokens is None else budget_tokens
        has_rows = False
        for candidate in candidates:
            if len(chosen) == self.policy.max_members:
                break
            if candidate.is_suspect and chosen:
                continue
            if candidate.is_suspect:
                return [candidate]
            rows = candidate.num_rows
            if rows == 0 or rows <= room or not has_rows:
                chosen.append(candidate)
                room -= rows
                has_rows = has_rows or rows > 0
        return chosen
