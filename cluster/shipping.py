"""Plans on their way to shards: what these have from earlier passes is not sent again.

A request's program, or the part that a step of its generation runs, goes to the shards once; later plans only name it.
Both ends follow the same plans in the same order and forget a request when the shards do: behind its last wave, and
when a plan says that it has ended. After a loss shards have nothing left, and neither end may think otherwise
(`Outgoing.forget_all`, `Incoming.forget_all`).

Most segments of a plan are the same at all layers; those travel as one number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from polytrace.errors import ServiceError
from polytrace.graph import Graph
from scheduling.plan import Member, Plan, Program, RequestId, Segment, TrunkId

Part: TypeAlias = "int | None"  # as of `Member.part`
Levels: TypeAlias = "tuple[int, ...] | tuple[None, int, int]"  # as they are, or one number and how often

_NO_PROGRAM = Program(
    request=RequestId(""),
    graph=Graph(nodes=()),
    narrowed={},
    invokes=(),
    seed=0,
    sharing_domain=None,
    facts=(),
    below={},
    waves=(),
    saves=(),
    trunks=(),
    trunk_bytes=0,
    live_bytes=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOnWire:
    """A `Segment`."""

    parent: int | None
    trunk: TrunkId | None
    outputs: Levels
    starts: Levels
    stops: Levels
    head: tuple[int, ...]
    tokens: tuple[int, ...]
    skips: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """A plan on its way."""

    plan: Plan  # without segments and without programs
    segments: tuple[SegmentOnWire, ...]
    requests: tuple[RequestId, ...]  # whose the members are
    programs: tuple[Program | None, ...]  # theirs; None: it was sent with an earlier plan


class Outgoing:
    """The end that sends."""

    def __init__(self) -> None:
        self._sent: dict[RequestId, set[Part]] = {}

    def pack(self, plan: Plan) -> Shipment:
        """The plan without what shards have. Every plan comes by once, in the order in which shards get them."""
        for request in plan.ended:
            self._sent.pop(request, None)
        programs = tuple([self._new(member) for member in plan.members])
        for member in plan.members:
            if member.is_last_wave:
                self._sent.pop(member.program.request, None)
        return Shipment(
            plan=replace(
                plan, segments=(), members=tuple([replace(member, program=_NO_PROGRAM) for member in plan.members])
            ),
            segments=tuple(map(_packed, plan.segments)),
            requests=tuple([member.program.request for member in plan.members]),
            programs=programs,
        )

    def _new(self, member: Member) -> Program | None:
        sent = self._sent.setdefault(member.program.request, set())
        if member.part in sent:
            return None
        sent.add(member.part)
        return member.program

    def forget_all(self) -> None:
        """Shards have nothing any more."""
        self._sent.clear()


class Incoming:
    """A shard's end."""

    def __init__(self) -> None:
        self._programs: dict[RequestId, dict[Part, Program]] = {}

    def unpack(self, shipment: Shipment) -> Plan:
        """The plan as it was. ServiceError where a program is only named that never came."""
        for request in shipment.plan.ended:
            self._programs.pop(request, None)
        members = []
        for member, request, program in zip(shipment.plan.members, shipment.requests, shipment.programs, strict=True):
            known = self._programs.setdefault(request, {})
            if program is not None:
                known[member.part] = program
            elif member.part not in known:
                raise ServiceError(f"a plan names a program of request {request} that never came")
            members.append(replace(member, program=known[member.part]))
        for member in members:
            if member.is_last_wave:
                self._programs.pop(member.program.request, None)
        return replace(shipment.plan, segments=tuple(map(_unpacked, shipment.segments)), members=tuple(members))

    def forget_all(self) -> None:
        """The shard has forgotten all requests."""
        self._programs.clear()


def _packed(segment: Segment) -> SegmentOnWire:
    return SegmentOnWire(
        parent=segment.parent,
        trunk=segment.trunk,
        outputs=_short(segment.outputs),
        starts=_short(segment.starts),
        stops=_short(segment.stops),
        head=segment.head,
        tokens=segment.tokens,
        skips=segment.skips,
    )


def _unpacked(segment: SegmentOnWire) -> Segment:
    return Segment(
        parent=segment.parent,
        trunk=segment.trunk,
        outputs=_long(segment.outputs),
        starts=_long(segment.starts),
        stops=_long(segment.stops),
        head=segment.head,
        tokens=segment.tokens,
        skips=segment.skips,
    )


def _short(levels: tuple[int, ...]) -> Levels:
    if len(levels) > 3 and levels.count(levels[0]) == len(levels):
        return (None, levels[0], len(levels))
    return levels


def _long(levels: Levels) -> tuple[int, ...]:
    if levels and levels[0] is None:
        _, value, count = levels
        return (value,) * count
    return levels  # whole numbers only: the other form begins with None
