"""Which stage holds which value when: what is carried, what is held between waves, what is dropped.

Owns the rules: a value is moved to a stage once, in the first wave that needs it there, straight from its home, and
stays until its last use. A floating value is never moved: each stage that needs it makes its own, in the prologue of
the first wave that does.

Invariant: both sides of a transfer list the transfers between them in the same order (by node).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from polytrace.errors import GraphError
from polytrace.graph import Carried, Graph, NodeId
from scheduling.checks import Resolved
from scheduling.placement import PURE, Scale
from scheduling.plan import PROLOGUE, Fragment, StageWork, Transfer, ValueFacts


def stage_works(
    graph: Graph,
    resolved: Resolved,
    points: list[int],
    facts: tuple[ValueFacts | None, ...],
    executions: list[tuple[int, int]],
    scale: Scale,
    holds: Collection[int] = (),
) -> list[tuple[StageWork, ...]]:
    """Per wave, per stage: fragments, transfers and drops. `executions` is sorted and lacks the floating nodes.

    Values that are held stay at home.
    """
    carried = {place: node.stage for place, node in enumerate(graph.nodes) if isinstance(node, Carried)}
    residency = _Residency(resolved, points, scale, carried, holds)
    residency.use(executions)
    residency.float_where_needed()
    residency.move(graph, facts)
    residency.drop()
    num_waves = 1 + max((scale.wave(point) for point in residency.fragments), default=0)
    return [
        tuple(residency.work(scale.slot(wave, stage)) for stage in range(scale.stages)) for wave in range(num_waves)
    ]


class _Residency:
    """Collects who uses what where. Slots are `Scale`'s; a resident is `node * stages + stage`."""

    def __init__(
        self,
        resolved: Resolved,
        points: list[int],
        scale: Scale,
        carried: Mapping[int, int],
        holds: Collection[int],
    ) -> None:
        """`carried` are nodes whose values are there before anything runs, and on which stage."""
        self.resolved, self.points, self.scale = resolved, points, scale
        self.carried, self.holds = carried, holds
        self.fragments: dict[int, list[int]] = {}  # point -> nodes
        self.points_of_slot: dict[int, list[int]] = {}  # slot -> points of its fragments, ascending
        self.first_wave: dict[int, int] = {}  # resident -> first wave that uses it
        self.last_use: dict[int, int] = {}  # resident -> point of its last use
        self.departure: dict[int, tuple[int, bool]] = {}  # node -> wave of its last move, and whether it leaves then
        self.held: dict[int, list[Transfer]] = {}  # slot -> transfers, for these three
        self.arriving: dict[int, list[Transfer]] = {}
        self.leaving: dict[int, list[Transfer]] = {}
        self.fragment_drops: dict[int, list[int]] = {}  # point -> nodes
        self.final_drops: dict[int, list[int]] = {}  # slot -> nodes

    def use(self, executions: list[tuple[int, int]]) -> None:
        """Notes fragments and uses, in the order they happen."""
        scale, operands = self.scale, self.resolved.operands
        for point, node in executions:
            self.fragments.setdefault(point, []).append(node)
            stage = scale.stage(point)
            for operand in operands[node]:
                resident = operand * scale.stages + stage
                self.first_wave.setdefault(resident, scale.wave(point))
                self.last_use[resident] = point

    def float_where_needed(self) -> None:
        """Puts floating nodes, users before what they use, into the prologue of their first wave on every stage."""
        scale = self.scale
        for node in range(len(self.points) - 1, -1, -1):
            if self.points[node] != PURE:
                continue
            for stage in range(scale.stages):
                wave = self.first_wave.get(node * scale.stages + stage)
                if wave is None:
                    continue
                point = scale.point(wave, stage, PROLOGUE)
                self.fragments.setdefault(point, []).append(node)
                for operand in self.resolved.operands[node]:
                    resident = operand * scale.stages + stage
                    self.first_wave[resident] = min(self.first_wave.get(resident, wave), wave)
                    self.last_use[resident] = max(self.last_use.get(resident, point), point)
        for point in sorted(self.fragments):
            self.fragments[point].sort()
            self.points_of_slot.setdefault(point // scale.width, []).append(point)

    def move(self, graph: Graph, facts: tuple[ValueFacts | None, ...]) -> None:
        """Plans every transfer. Raises GraphError for a value that has no planned shape."""
        scale = self.scale
        for resident in sorted(self.first_wave):
            node, stage = divmod(resident, scale.stages)
            home = self.points[node]
            if home == PURE or self._home(node) == stage:
                continue
            planned = facts[node]
            if planned is None:
                told = "the shape of this value is not known ahead, so it cannot go to another stage of the model"
                raise GraphError(told, where=graph.nodes[node].where)
            wave, source = self.first_wave[resident], self._home(node)
            transfer = Transfer(node=NodeId(node), source=source, target=stage, facts=planned)
            from_slot, to_slot = scale.slot(wave, source), scale.slot(wave, stage)
            leaves = wave == scale.wave(home) and node not in self.carried
            assert not leaves or from_slot < to_slot, "within a wave values go one way only"
            self.departure[node] = max(self.departure.get(node, (wave, leaves)), (wave, leaves))
            (self.leaving if leaves else self.held).setdefault(from_slot, []).append(transfer)
            (self.arriving if leaves else self.held).setdefault(to_slot, []).append(transfer)

    def drop(self) -> None:
        """Drops every value after its last use on a stage, or after its last move away from home."""
        scale = self.scale
        for resident, point in self.last_use.items():
            node, stage = divmod(resident, scale.stages)
            is_at_home = self.points[node] != PURE and self._home(node) == stage
            if is_at_home and node in self.holds:
                continue
            if not is_at_home or node not in self.departure:
                self.fragment_drops.setdefault(point, []).append(node)
        for node, (wave, leaves) in self.departure.items():
            stage = self._home(node)
            if node in self.holds:
                continue
            last = self.last_use.get(node * scale.stages + stage)
            if last is None or (scale.wave(last), False) < (wave, leaves):
                self.final_drops.setdefault(scale.slot(wave, stage), []).append(node)
            else:
                self.fragment_drops.setdefault(last, []).append(node)

    def _home(self, node: int) -> int:
        """The stage that has a value first."""
        stage = self.carried.get(node)
        return self.scale.stage(self.points[node]) if stage is None else stage

    def work(self, slot: int) -> StageWork:
        """All that was planned for a slot."""
        fragments = tuple(
            Fragment(
                order=self.scale.order(point),
                nodes=_node_ids(self.fragments[point]),
                drops=_node_ids(self.fragment_drops.get(point, ())),
            )
            for point in self.points_of_slot.get(slot, ())
        )
        return StageWork(
            held=tuple(self.held.get(slot, ())),
            arriving=tuple(self.arriving.get(slot, ())),
            fragments=fragments,
            leaving=tuple(self.leaving.get(slot, ())),
            drops=_node_ids(self.final_drops.get(slot, ())),
        )


def _node_ids(nodes: Iterable[int]) -> tuple[NodeId, ...]:
    return tuple(map(NodeId, nodes))
