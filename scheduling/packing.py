"""Brings the sequences of a pass's members into one forest of rows, and says all of it in a `Plan`.

Owns which sequences share rows and which rows the head runs on. Knows nothing of who should go (`scheduling.policy`)
and nothing of nodes (`scheduling.program` placed them). Where a row lies in the stream is worked out from the plan by
every shard (`engine.streams`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace

from polytrace.description import ModelDescription
from scheduling.forest import Placed, grow
from scheduling.plan import PROLOGUE, Cone, Member, PassId, Plan, Program, RequestId, View


class Packer:
    """Builds plans for one model."""

    def __init__(self, description: ModelDescription) -> None:
        self._orders = [site.order for site in description.sites]
        self._stages = [site.stage for site in description.sites]
        self._num_layers = description.num_layers

    def pack(self, pass_id: PassId, waves: list[tuple[Program, int]], ended: tuple[RequestId, ...] = ()) -> Plan:
        """The plan of a pass in which each program runs one of its waves. Members stand in the order given."""
        runs = [
            (member, invoke, kept, cones)
            for member, (program, wave) in enumerate(waves)
            for invoke, kept, cones in _runs(program, wave)
        ]
        forest = grow(
            [
                Placed(tokens=tokens, cone=cone, domain=waves[member][0].sharing_domain)
                for member, invoke, _, cones in runs
                for tokens, cone in zip(waves[member][0].invokes[invoke].sequences, cones, strict=True)
            ],
            self._num_layers,
        )
        views, taken = [], 0
        for member, invoke, kept, _ in runs:
            lengths = tuple(map(len, waves[member][0].invokes[invoke].sequences))
            places = forest.places[taken : taken + len(lengths)]
            taken += len(lengths)
            views.append(View(member=member, invoke=invoke, lengths=lengths, segments=places, kept_columns=kept))
        until = max((program.waves[wave].until for program, wave in waves), default=PROLOGUE)
        return Plan(
            pass_id=pass_id,
            segments=forest.segments,
            layer_rows=forest.layer_rows,
            views=tuple(views),
            members=tuple(
                Member(program=_for_shards(program), wave=wave, is_last_wave=wave == len(program.waves) - 1)
                for program, wave in waves
            ),
            until=until,
            num_stages=1 + self._stages[bisect_left(self._orders, until)] if until != PROLOGUE else 0,
            ended=ended,
        )


def _for_shards(program: Program) -> Program:
    """The program without what only packing needs: cones grow with the prompts, and every shard gets every plan."""
    return replace(program, waves=tuple([replace(wave, cones=()) for wave in program.waves]))


def _runs(program: Program, wave: int) -> Iterable[tuple[int, tuple[int, ...], tuple[Cone, ...]]]:
    work = program.waves[wave]
    return zip(work.invokes, work.kept, work.cones, strict=True)
