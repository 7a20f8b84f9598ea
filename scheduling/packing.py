"""Brings the sequences of a pass's members into one forest of rows, and says all of it in a `Plan`.

Owns which sequences share rows and which rows the head runs on. Knows nothing of who should go (`scheduling.policy`)
and nothing of nodes (`scheduling.program` placed them). Where a row lies in the stream is worked out from the plan by
every shard (`engine.streams`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from polytrace.description import ModelDescription
from scheduling.forest import Kept, Placed, grow
from scheduling.plan import PROLOGUE, Cone, Keep, Member, PassId, Plan, Program, RequestId, Trunk, TrunkId, View
from scheduling.trunks import extended


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """A program that goes into a pass with one of its waves."""

    program: Program
    wave: int
    is_keeping: bool = False  # the program's trunks are kept, and those of earlier waves are in the store


class Packer:
    """Builds plans for one model."""

    def __init__(self, description: ModelDescription) -> None:
        self._orders = [site.order for site in description.sites]
        self._stages = [site.stage for site in description.sites]
        self._num_layers = description.num_layers

    def pack(self, pass_id: PassId, going: Sequence[Going], ended: tuple[RequestId, ...] = ()) -> Plan:
        """The plan of a pass in which each program runs one of its waves. Members stand in the order given."""
        runs = [(member, invoke, kept, cones) for member, one in enumerate(going) for invoke, kept, cones in _runs(one)]
        forest = grow(
            [
                Placed(tokens=tokens, cone=cone, domain=_domain(going[member]))
                for member, invoke, _, cones in runs
                for tokens, cone in zip(going[member].program.invokes[invoke].sequences, cones, strict=True)
            ],
            self._num_layers,
            [kept for one in going for kept in _found(one)],
        )
        views: list[View] = []
        taken = 0
        for member, invoke, columns, _ in runs:
            lengths = tuple(map(len, going[member].program.invokes[invoke].sequences))
            places = forest.places[taken : taken + len(lengths)]
            taken += len(lengths)
            views.append(View(member=member, invoke=invoke, lengths=lengths, segments=places, kept_columns=columns))
        until = max(map(_until, going), default=PROLOGUE)
        return Plan(
            pass_id=pass_id,
            segments=forest.segments,
            layer_rows=forest.layer_rows,
            skipped_rows=forest.skipped_rows,
            views=tuple(views),
            members=tuple(
                Member(
                    program=_for_shards(one.program),
                    wave=one.wave,
                    is_last_wave=one.wave == len(one.program.waves) - 1,
                )
                for one in going
            ),
            keeps=tuple(_keeps(going, views)),
            until=until,
            num_stages=1 + self._stages[bisect_left(self._orders, until)] if until != PROLOGUE else 0,
            ended=ended,
        )


def _domain(one: Going) -> object:
    """Rows of a wave that forks from its own request's trunks are that request's alone."""
    return ("request", one.program.request) if _trunks_before(one) else one.program.sharing_domain


def _trunks_before(one: Going) -> list[TrunkId]:
    if not one.is_keeping:
        return []
    trunks = one.program.trunks
    return [(one.program.request, place) for place, trunk in enumerate(trunks) if trunk.wave < one.wave]


def _found(one: Going) -> Iterable[Kept]:
    """The trunks that a wave finds in the store."""
    for trunk_id in _trunks_before(one):
        trunk = one.program.trunks[trunk_id[1]]
        yield Kept(
            trunk=trunk_id,
            tokens=one.program.invokes[trunk.invoke].sequences[trunk.sequence],
            edits=trunk.edits,
            domain=_domain(one),
            stops=trunk.stops,
            outputs=trunk.outputs,
        )


def _keeps(going: Sequence[Going], views: Sequence[View]) -> Iterable[Keep]:
    """What the pass leaves in the store."""
    segments = {(view.member, view.invoke): view.segments for view in views}
    for member, one in enumerate(going):
        for place, trunk in enumerate(one.program.trunks):
            if one.is_keeping and trunk.wave == one.wave:
                segment = segments[member, trunk.invoke][trunk.sequence]
                trunk_id = (one.program.request, place)
                yield Keep(trunk=trunk_id, segment=segment, stops=trunk.stops, outputs=trunk.outputs)


def _for_shards(program: Program) -> Program:
    """The program without what only packing needs: cones grow with the prompts, and every shard gets every plan."""
    return replace(program, waves=tuple([replace(wave, cones=()) for wave in program.waves]), trunks=())


def _runs(one: Going) -> Iterable[tuple[int, tuple[int, ...], tuple[Cone, ...]]]:
    """Invoke, kept columns and cones of what a wave runs."""
    work = one.program.waves[one.wave]
    kept = {(trunk.invoke, trunk.sequence): trunk for trunk in _kept_now(one)}
    for invoke, columns, cones in zip(work.invokes, work.kept, work.cones, strict=True):
        if kept:
            cones = tuple(
                [
                    extended(cone, kept[invoke, place]) if (invoke, place) in kept else cone
                    for place, cone in enumerate(cones)
                ]
            )
        yield invoke, columns, cones


def _kept_now(one: Going) -> list[Trunk]:
    """The trunks that a wave leaves in the store."""
    return [trunk for trunk in one.program.trunks if one.is_keeping and trunk.wave == one.wave]


def _until(one: Going) -> int:
    """The last order that a wave needs, with what is kept of it."""
    return max((one.program.waves[one.wave].until, *(trunk.until for trunk in _kept_now(one))))
