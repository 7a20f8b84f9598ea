"""Brings the sequences of a pass's members into one forest of rows, and says all of it in a `Plan`.

Owns which sequences share rows and which rows the head runs on. Knows nothing of who should go (`scheduling.policy`)
and nothing of nodes (`scheduling.program` placed them). Where a row lies in the stream is worked out from the plan by
every shard (`engine.streams`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace

from polytrace.description import ModelDescription
from scheduling.ahead import Ahead, Stretch
from scheduling.caches import Cache
from scheduling.checks import table_of
from scheduling.forest import Forest, Placed, Stored, grow
from scheduling.generating import Generating, Row
from scheduling.plan import (
    NO_ROWS,
    NOWHERE,
    PROLOGUE,
    Cone,
    Grow,
    Keep,
    Member,
    PassId,
    Plan,
    Program,
    RequestId,
    Segment,
    Trunk,
    TrunkId,
    View,
)
from scheduling.trunks import extended


@dataclass(frozen=True, slots=True)
class Taped:
    """A pass that may be run backwards."""

    pass_id: PassId
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """A program that goes into a pass with one of its waves."""

    program: Program
    wave: int
    is_keeping: bool = False  # the program's trunks are kept, and those of earlier waves are in the store
    generating: Generating | None = None  # whose step the program is
    ahead: Ahead | None = None  # how far its prompts are, when it is at these
    stretches: tuple[Stretch, ...] = ()  # only these rows of its prompts go, ahead of the program
    of: Taped | None = None  # the pass that it runs backwards
    copies: MutableMapping[int, Program] = field(default_factory=dict)  # as shards get them: worked out once, by id

    @property
    def is_step(self) -> bool:
        """Whether it is behind its prompts, with one token a sequence."""
        return self.generating is not None and self.generating.run is not None


class Packer:
    """Builds plans for one model."""

    def __init__(self, description: ModelDescription) -> None:
        self._orders = [site.order for site in description.sites]
        self._stages = [site.stage for site in description.sites]
        self._num_layers = description.num_layers
        levels = table_of(description).levels
        self._through = levels.output(levels.count - 1) if levels.count else PROLOGUE  # all layers

    def pack(self, pass_id: PassId, going: Sequence[Going], ended: tuple[RequestId, ...] = ()) -> Plan:
        """The plan of a pass in which each program runs one of its waves. Members stand in the order given.

        Those of whom some rows only go ahead are no members.
        """
        stretches = [stretch for one in going for stretch in one.stretches]
        kept = [found for one in going for found in _found(one)]
        going = [one for one in going if not one.stretches]
        runs = [
            (member, invoke, kept, cones)
            for member, one in enumerate(going)
            if not one.is_step
            for invoke, kept, cones in _runs(one)
        ]
        placed = [
            Placed(tokens=tokens, cone=cone, domain=_domain(going[member], invoke, place))
            for member, invoke, _, cones in runs
            for place, (tokens, cone) in enumerate(
                zip(going[member].program.invokes[invoke].sequences, cones, strict=True)
            )
        ]
        forest = self._grow([*placed, *(stretch.placed for stretch in stretches)], kept)
        views: list[View] = []
        taken = 0
        for member, invoke, columns, _ in runs:
            lengths = tuple(map(len, going[member].program.invokes[invoke].sequences))
            places = forest.places[taken : taken + len(lengths)]
            taken += len(lengths)
            is_drawing = invoke in going[member].program.waves[going[member].wave].drawing
            views.append(
                View(
                    member=member,
                    invoke=invoke,
                    lengths=lengths,
                    segments=places,
                    kept_columns=columns,
                    is_drawing=is_drawing,
                )
            )
        grows = list(_begun(going, views))
        for stretch, segment in zip(stretches, forest.places[taken:], strict=True):
            grows.append(stretch.cache.grow(segment, stretch.start, len(stretch.placed.tokens)))
        steps = StepRows(forest.segments, self._num_layers)
        for member, one in enumerate(going):
            if one.is_step:
                views.extend(steps.views(member, one))
        until = max([*map(_until, going), self._through if stretches else PROLOGUE])
        num_stages = 1 + self._stages[bisect_left(self._orders, until)] if until != PROLOGUE else 0
        waves = [one.program.waves[one.wave] for one in going]
        cuts = {wave.cuts for wave in waves}
        of = {one.of for one in going}
        assert len(cuts) <= 1 and len(of) <= 1, "those go together whose gradients take the same way"
        taped = next(iter(of), None)
        return Plan(
            pass_id=pass_id,
            segments=tuple(steps.segments),
            layer_rows=tuple([rows + steps.num_rows for rows in forest.layer_rows]),
            skipped_rows=forest.skipped_rows,
            views=tuple(views),
            members=tuple(map(_member, going)),
            keeps=tuple(_keeps(going, views)),
            grows=(*grows, *steps.grows),
            until=until,
            num_stages=num_stages if taped is None else taped.num_stages,
            ended=ended,
            cuts=next(iter(cuts), ()),
            of=None if taped is None else taped.pass_id,
            reruns=any(wave.reruns for wave in waves),
        )

    def _grow(self, placed: list[Placed], kept: list[Stored]) -> Forest:
        """Forks from caches share no rows of the pass above these: others may be better off without."""
        forest = grow(placed, self._num_layers, kept)
        others = [found for found in kept if found.trunk[1] >= 0]
        if len(others) == len(kept) or len(placed) == 1:
            return forest
        anew = grow(placed, self._num_layers, others)
        return anew if sum(anew.layer_rows) < sum(forest.layer_rows) else forest


class StepRows:
    """The rows of decode steps, behind the forest's: one a sequence, which forks from its cache."""

    def __init__(self, segments: Sequence[Segment], num_layers: int) -> None:
        self.segments = list(segments)
        self.num_layers = num_layers
        self.num_rows = 0
        self.grows: list[Grow] = []
        self._prefixes: dict[TrunkId, int] = {}  # caches that several fork from -> their segment

    def views(self, member: int, one: Going) -> Iterator[View]:
        """The views of a program that is a step of a generation, and their rows."""
        generating = one.generating
        assert generating is not None
        work, over = one.program.waves[one.wave], generating.over
        for invoke, columns in zip(work.invokes, work.kept, strict=True):
            if invoke in over:
                continue
            is_drawing = invoke in work.drawing
            rows = generating.rows(invoke)
            places = [
                NO_ROWS if row is None else self._place(row, generating.caches.own[invoke, place], is_drawing)
                for place, row in enumerate(rows)
            ]
            yield View(
                member=member,
                invoke=invoke,
                lengths=(1,) * len(rows),
                segments=tuple(places),
                kept_columns=columns,
                begins=tuple([0 if row is None else row.position for row in rows]),
                is_drawing=is_drawing,
            )

    def _place(self, row: Row, cache: Cache, is_drawing: bool) -> int:
        """The segment of one row."""
        parent = None
        if cache.prefix is not None:
            parent = self._prefixes.get(cache.prefix)
            if parent is None:
                parent = self._prefixes[cache.prefix] = self._trunk(cache.prefix, None, 0, cache.begin)
        position, count = row.position, self.num_layers
        own = self._trunk(cache.trunk, parent, cache.begin, position)
        self.segments.append(
            Segment(
                parent=own,
                starts=(position,) * (count + 1),
                stops=(position + 1,) * count,
                head=(position,),
                tokens=(row.token,),
            )
        )
        self.num_rows += 1
        place = len(self.segments) - 1
        if is_drawing:  # an invoke that runs again in a later wave of the step keeps what it has there
            self.grows.append(cache.grow(place, position, position + 1))
        return place

    def _trunk(self, trunk: TrunkId, parent: int | None, start: int, stop: int) -> int:
        count = self.num_layers
        self.segments.append(
            Segment(
                parent=parent,
                trunk=trunk,
                outputs=(NOWHERE,) * count,
                starts=(start,) * (count + 1),
                stops=(stop,) * count,
                head=(),
                tokens=(),
            )
        )
        return len(self.segments) - 1


def _begun(going: Sequence[Going], views: Sequence[View]) -> Iterator[Grow]:
    """What prompts leave in the caches of sequences that go on."""
    for view in views:
        generating, ahead = going[view.member].generating, going[view.member].ahead
        if generating is None or not view.is_drawing:
            continue
        for place, (segment, length) in enumerate(zip(view.segments, view.lengths, strict=True)):
            done = 0 if ahead is None else ahead.done((view.invoke, place))
            shared = generating.caches.shared.get((view.invoke, place))
            if shared is not None and done < shared.capacity:
                yield shared.grow(segment, done, shared.capacity)
            yield generating.caches.own[view.invoke, place].grow(segment, done, length)


def _member(one: Going) -> Member:
    generating = one.generating
    run = None if generating is None else generating.run
    is_last = one.wave == len(one.program.waves) - 1 and (generating is None or generating.is_ending)
    program = one.copies.get(id(one.program))
    if program is None:
        program = one.copies[id(one.program)] = _for_shards(one.program)
    if generating is None or run is None:
        holds = {} if generating is None else generating.chain.holds
        return Member(program=program, wave=one.wave, is_last_wave=is_last, holds=holds)
    return Member(
        program=program,
        wave=one.wave,
        is_last_wave=is_last,
        step=generating.step,
        part=run.part,
        binds=run.binds,
        holds=run.holds,
        drops=run.drops,
        absent=generating.absent,
        offset=run.offset,
    )


def _domain(one: Going, invoke: int, place: int) -> object:
    """Rows of a wave that forks from its own request's trunks are that request's alone."""
    if _trunks_before(one):
        return "request", one.program.request
    own = None if one.ahead is None else one.ahead.domain((invoke, place))
    return one.program.sharing_domain if own is None else own


def _trunks_before(one: Going) -> list[TrunkId]:
    if not one.is_keeping:
        return []
    trunks = one.program.trunks
    return [(one.program.request, place) for place, trunk in enumerate(trunks) if trunk.wave < one.wave]


def _found(one: Going) -> Iterable[Stored]:
    """The trunks that a wave finds in the store."""
    for trunk_id in _trunks_before(one):
        trunk = one.program.trunks[trunk_id[1]]
        yield Stored(
            trunk=trunk_id,
            tokens=one.program.invokes[trunk.invoke].sequences[trunk.sequence],
            edits=trunk.edits,
            domain=("request", one.program.request),
            stops=trunk.stops,
            outputs=trunk.outputs,
        )
    if one.ahead is not None:
        yield from one.ahead.kept()


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
    return replace(program, waves=tuple([replace(wave, cones=()) for wave in program.waves]), trunks=(), chain=None)


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
