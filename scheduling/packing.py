"""Puts the rows of a pass's members into one stream, and says all of it in a `Plan`.

Owns rows: which sequence lies where, its positions, what it attends to, which rows the head runs on. Knows nothing of
who should go (`scheduling.policy`) and nothing of nodes (`scheduling.program` placed them).
"""

from __future__ import annotations

from bisect import bisect_left

from polytrace.description import ModelDescription
from scheduling.plan import MIN_ROWS, PROLOGUE, Member, PassId, Plan, Program, RequestId, Segment, Span, View


class Packer:
    """Builds plans for one model."""

    def __init__(self, description: ModelDescription) -> None:
        self._orders = [site.order for site in description.sites]
        self._stages = [site.stage for site in description.sites]
        self._row_multiple = description.row_multiple

    def pack(self, pass_id: PassId, waves: list[tuple[Program, int]], ended: tuple[RequestId, ...] = ()) -> Plan:
        """The plan of a pass in which each program runs one of its waves. Members stand in the order given."""
        stream = _Stream(pass_id)
        placed = [
            (program.invokes[invoke].longest, index, invoke, kept)
            for index, (program, wave) in enumerate(waves)
            for invoke, kept in zip(program.waves[wave].invokes, program.waves[wave].kept, strict=True)
        ]
        # Neighbours of equal length can be attended to in one batch.
        for _, index, invoke, kept in sorted(placed, key=lambda entry: entry[0]):
            stream.append(waves[index][0], index, invoke, kept)
        until = max((program.waves[wave].until for program, wave in waves), default=PROLOGUE)
        return Plan(
            pass_id=pass_id,
            tokens=padded(stream.tokens, self._row_multiple),
            positions=padded(stream.positions, self._row_multiple),
            segments=tuple(stream.segments),
            kept=padded(stream.kept, self._row_multiple),
            views=tuple(stream.views),
            members=tuple(
                Member(program=program, wave=wave, is_last_wave=wave == len(program.waves) - 1)
                for program, wave in waves
            ),
            until=until,
            num_stages=1 + self._stages[bisect_left(self._orders, until)] if until != PROLOGUE else 0,
            ended=ended,
        )


class _Stream:
    """The packed stream while it grows."""

    def __init__(self, pass_id: PassId) -> None:
        self.pass_id = pass_id
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.kept: list[int] = []
        self.segments: list[Segment] = []
        self.views: list[View] = []

    def append(self, program: Program, member: int, invoke: int, kept_columns: tuple[int, ...]) -> None:
        """One invoke's sequences, one after another."""
        prompts = program.invokes[invoke]
        longest = prompts.longest
        view = View(
            member=member,
            invoke=invoke,
            start=len(self.tokens),
            lengths=tuple(map(len, prompts.sequences)),
            kept_columns=kept_columns,
            kept_start=len(self.kept),
        )
        self.views.append(view)
        for index, sequence in enumerate(prompts.sequences):
            start, stop = len(self.tokens), len(self.tokens) + len(sequence)
            spans = (Span(block=self.pass_id, start=start, stop=stop),)
            self.segments.append(
                Segment(member=member, invoke=invoke, sequence=index, start=start, stop=stop, spans=spans)
            )
            self.tokens.extend(sequence)
            self.positions.extend(range(len(sequence)))
            pads = longest - len(sequence)
            self.kept.extend(start + column - pads for column in kept_columns if column >= pads)


def padded(rows: list[int], multiple: int) -> tuple[int, ...]:
    """Rows with zeros up to a number from which on bits do not depend on it; nothing stays nothing."""
    if not rows:
        return ()
    return (*rows, *[0] * (-(-max(len(rows), MIN_ROWS) // multiple) * multiple - len(rows)))
