"""One request on its way through its waves and steps: where it is, what it has, what goes next of it.

How it ends is an `Outcome`, how far it is a `Progress`. Who goes when is `scheduling.scheduler`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polytrace.certificate import Receipt, Token
from polytrace.errors import PolytraceError
from scheduling.ahead import Ahead
from scheduling.alike import Alike
from scheduling.generating import Generating
from scheduling.packing import Going, Taped
from scheduling.plan import PAGE, Member, PassId, Program, RequestId, SaveSlot
from scheduling.receipts import Account, Logged

PASSES_AHEAD = 32  # that a request may have waited behind those that somebody waits for, before it goes like them


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a request ended: with a receipt or with an error."""

    request: RequestId
    receipt: Receipt | None = None
    error: PolytraceError | None = None
    may_be_cut: bool = (
        False  # too large, but for passes of fewer rows (`Scheduler.budget_tokens`) it takes more of them
    )
    values: Mapping[str, Any] = field(default_factory=dict)  # saves, when the program has no result file
    tokens: tuple[Token, ...] = ()  # of the last steps, which no `Progress` has told
    saves: tuple[SaveSlot, ...] = ()  # of a generation: all that came, as of `Progress`
    spent_token_layers: int = 0  # when it failed: what it ran until then
    spent_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a request of several passes is."""

    request: RequestId
    passes_done: int
    passes: int
    tokens: tuple[Token, ...] = ()  # that are new since it was told before
    saves: tuple[SaveSlot, ...] = ()  # of a generation: those that came since then, where they are in the result
    logs: tuple[Logged, ...] = ()  # of these passes
    result_start: int = 0  # as of `Program`: where their slots are counted from
    values: Mapping[str, Any] = field(default_factory=dict)  # of logs, when the program has no result file


class Job:
    """A request on its way through its waves."""

    def __init__(self, program: Program, number: int, now: float, num_layers: int = 1) -> None:
        self.program = program
        self.num_layers = num_layers  # of the model
        self.charged = 0.0  # to its tenant
        self.number = number  # of arrival
        self.added = now
        self.is_cancelled = False
        self.is_keeping: bool | None = None  # its trunks; None: nobody has asked yet
        self.losses = 0  # passes that died with shards while it was in them, since it got further than there
        self.lost_at = 0  # the step of its generation that it was at then
        self.losses_alone = 0  # of these, those that it had to itself
        self.party: object | None = None  # with whom it goes, and with nobody else; None: with anyone
        self.since: PassId | None = None  # the pass behind which it waits, to be fair among equals
        self.least = 0  # positions that its caches have room for from the begin
        self.num_told = 0  # steps whose tokens have been told
        self.num_saves_told = 0  # the same ones come again when it starts again
        self.copies: dict[int, Program] = {}  # as of `Going`
        self.is_calling = False  # a model as it is, with which calls may be one
        self.alike: Alike | None = None  # those whose calls may be one with its own; None: nobody's

    def restart(self, generating: Generating | None, ahead: Ahead | None) -> None:
        """From its first wave, with its generation, if it is one; what is in flight of it counts no more."""
        self.wave = 0  # that goes next
        self.in_flight: list[PassId] = []
        self.num_ahead = 0  # passes in flight that run rows of its prompts ahead
        self.passes_ahead = 0  # that have
        self.started: float | None = None
        self.account = Account(self.program)
        self.generating, self.ahead = generating, ahead
        self.is_step = False  # it is behind its prompts, with one row a sequence
        self.taped: dict[int, Taped] = {}  # the passes of its waves that are run backwards later
        self.has_tape_room = not self.program.tape_bytes  # before it may go
        self.reserved = 0  # positions of its caches
        self.leaving = 0  # of these, what it leaves with its next step, for a larger one
        self.needed = 0 if generating is None else generating.caches.num_positions  # more, before it may go

    @property
    def now(self) -> Program:
        """What runs: the program, or the step that its generation is at."""
        return self.program if self.generating is None else self.generating.program

    @property
    def is_suspect(self) -> bool:
        """A pass died with it in: it goes alone, so that nobody suffers should it be the cause."""
        return self.losses > 0

    def land(self, pass_id: PassId, *, is_ahead: bool) -> None:
        self.in_flight.remove(pass_id)
        self.num_ahead -= is_ahead
        self.passes_ahead += is_ahead

    def may_be_cut(self, member: Member | None) -> bool:
        """Whether what was too large in a pass may go with fewer rows."""
        return member is None or (not self.is_step and self.ahead is not None and self.ahead.num_left > 0)

    @property
    def company(self) -> object | None:
        """With whom it goes for the sake of gradients: whose way back is the same, or who was in the same pass. Where a
        model is called as it is: whose calls may be one with its own.
        """
        wave = self.now.waves[self.wave]
        if self.is_calling:
            is_alone = self.alike is None or self.alike.is_apart or wave.of is not None or wave.is_taped
            return self.number if is_alone else self.alike
        return self.of or ((wave.cuts, wave.reruns) if wave.cuts else None)

    @property
    def of(self) -> Taped | None:
        """The pass that its next wave runs backwards."""
        of = self.now.waves[self.wave].of
        return None if of is None else self.taped[of]

    @property
    def num_rows(self) -> int:
        if self.is_step and self.generating is not None:
            return self.generating.num_rows
        wave = self.program.waves[self.wave]
        rows = (wave.rows_anew if self.is_keeping is False else wave.rows).widest
        return rows if self.ahead is None else max(1, rows - self.ahead.num_spared)

    @property
    def tenant(self) -> str:
        return self.program.tenant

    def cost(self, num_rows: int | None = None) -> float:
        """Token-layers of its next wave, with so many of its rows, or all; what is shared with others counts in full,
        as it does in its price. One without rows costs a little, or it could be had for nothing.
        """
        wave = self.now.waves[self.wave]
        if self.is_step:
            return max(1.0, float((num_rows or self.num_rows) * self.num_layers))
        if wave.of is not None:
            there = self.now.waves[wave.of]
            return max(1.0, float(self._tokens(there.invokes) * self.num_layers * (2 + there.reruns)))
        counts = wave.rows_anew if self.is_keeping is False else wave.rows
        full = counts.token_layers or self._tokens(wave.invokes) * self.num_layers
        if num_rows is None and self.ahead is None:
            return max(1.0, float(full))
        rows = self.num_rows if num_rows is None else num_rows
        return max(1.0, full * min(1.0, rows / max(1, counts.widest)))

    def _tokens(self, invokes: Sequence[int]) -> int:
        return sum(self.now.invokes[invoke].num_tokens for invoke in invokes)

    @property
    def least_rows(self) -> int:
        can_be_cut = not self.is_step and self.ahead is not None and self.ahead.num_left >= PAGE
        return min(PAGE, self.num_rows) if can_be_cut else self.num_rows

    def going(self, num_rows: int) -> Going:
        """With so many rows: when that is not all of them, of its prompts alone."""
        ahead = None if self.is_step else self.ahead
        return Going(
            program=self.now,
            wave=self.wave,
            is_keeping=self.is_keeping is True and not self.is_step,
            generating=self.generating,
            ahead=ahead,
            stretches=() if ahead is None or num_rows >= self.num_rows else ahead.next(num_rows),
            of=self.of,
            copies=self.copies,
        )

    @property
    def num_waves(self) -> int:
        return len(self.now.waves)

    @property
    def num_done(self) -> int:
        """Waves that have ended."""
        return self.wave - (len(self.in_flight) - self.num_ahead)

    @property
    def progress(self) -> Progress:
        logs, values = self.account.logs, self.account.values
        steps = 0 if self.program.chain is None else len(self.program.chain.steps)
        return Progress(
            request=self.program.request,
            passes_done=self.account.num_passes,
            passes=len(self.program.waves) + steps + self.passes_ahead,
            logs=tuple(logs),
            result_start=self.program.result_start,
            values={log.slot.name: values[log.slot.name] for log in logs if log.slot.name in values},
        )

    @property
    def is_held(self) -> bool:
        """Whether shards keep values for a wave that has not gone yet."""
        if self.generating is not None:
            return self.started is not None  # caches too
        return 0 < self.wave < self.num_waves

    def advance(self) -> bool:
        """Behind the last wave of a step: goes on with the next one; False when there is none."""
        if self.generating is None or not self.generating.advance():
            return False
        self.wave = 0
        self.is_step = True
        self.needed = self.generating.caches.needed(self.generating.lengths)
        return True

    @property
    def turn(self) -> tuple[bool, bool, bool, int, int]:
        """Its place among those of its tenant: suspects first, or they would wait for ever behind those that share
        passes; then steps; those whose last wave is under way only fill what others leave. Whom somebody waits for
        goes before others, but for those that wait since `PASSES_AHEAD` passes before it.
        """
        since = (self.since or 0) - PASSES_AHEAD * self.program.is_interactive
        return bool(self.in_flight), not self.is_suspect, not self.is_step, since, self.number

    def clear(self) -> None:
        """Ends the suspicion once its generation is behind the step at which a pass died."""
        if self.is_suspect and self.generating is not None and self.generating.step > self.lost_at:
            self.losses, self.party = 0, None

    def take_tokens(self) -> tuple[Token, ...]:
        """What was drawn and has not been told, also when it was drawn before."""
        if self.generating is None:
            return ()
        told, self.generating.told = self.generating.told, []
        fresh = tuple([token for token in told if token.step >= self.num_told])
        self.num_told = max([self.num_told, *[token.step + 1 for token in fresh]])
        return fresh

    def take_saves(self) -> tuple[SaveSlot, ...]:
        """What was saved and has not been told, also when it was saved before."""
        fresh = self.account.saves[self.num_saves_told :]
        self.num_saves_told += len(fresh)
        return tuple(fresh)

    def may_follow(self) -> bool:
        """Whether the next wave may go while another is in flight: no stage would wait for one behind it."""
        works = self.now.waves[self.wave].stages
        return all(held.source < held.target for work in works for held in work.held)


@dataclass(frozen=True, slots=True)
class Flight:
    """Who is in a pass."""

    members: list[Job]  # of its plan
    ahead: list[Job]  # rows of whose prompts run ahead

    @property
    def jobs(self) -> list[Job]:
        return [*self.members, *self.ahead]
