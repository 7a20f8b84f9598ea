"""Runs programs with symbols for values: once as planned, by stages and waves, and once by the bare semantics.

The planned run checks on its way that every operand is where it is needed, that both sides of a transfer agree, and
that nothing is left behind. A symbol is an integer for how a value came about: equal symbols mean equal values.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from polytrace.graph import Graph, NodeId, Read, Save, Write, operands
from scheduling.plan import PROLOGUE, Program, StageWork, Wave


class Symbols:
    """Gives equal things equal numbers."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def of(self, *parts: object) -> int:
        return self._known.setdefault(parts, len(self._known))


class CycleFoundError(Exception):
    """A value depends on itself."""


class Semantics:
    """What every node's value is, from the order rules alone: no stages, no waves."""

    def __init__(self, graph: Graph, orders: dict[NodeId, int], symbols: Symbols) -> None:
        self.graph, self.orders, self.symbols = graph, orders, symbols
        self._values: dict[NodeId, int | None] = {}

    def needed(self) -> set[NodeId]:
        """The nodes that a save or a write needs, with those."""
        found: set[NodeId] = set()
        pending = [NodeId(n) for n, node in enumerate(self.graph.nodes) if isinstance(node, (Save, Write))]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending.extend(operands(self.graph.nodes[node]))
        return found

    def value(self, node: NodeId) -> int:
        """The symbol of a node (of a write or a save: of its value). Raises CycleFoundError."""
        if node in self._values:
            known = self._values[node]
            if known is None:
                raise CycleFoundError
            return known
        self._values[node] = None
        event = self.graph.nodes[node]
        if isinstance(event, Read):
            seen = [(write, self.value(write)) for write in self.seen(node)]
            symbol = read_symbol(self.symbols, event, seen)
        elif isinstance(event, (Write, Save)):
            symbol = self.value(event.value.node)
        else:
            symbol = self.symbols.of("made", node, tuple(self.value(operand) for operand in operands(event)))
        self._values[node] = symbol
        return symbol

    def seen(self, read: NodeId) -> list[NodeId]:
        """The writes that a read sees, in the order they act."""
        event, place = self.graph.nodes[read], (self.orders[read], read)
        assert isinstance(event, Read)
        writes = [
            (self.orders[NodeId(n)], NodeId(n))
            for n, node in enumerate(self.graph.nodes)
            if isinstance(node, Write) and node.invoke == event.invoke and (self.orders[NodeId(n)], n) < place
        ]
        return [node for _, node in sorted(writes)]


def read_symbol(symbols: Symbols, event: Read, seen: list[tuple[NodeId, int]]) -> int:
    return symbols.of("read", event.site, event.invoke, tuple(seen))


@dataclass(slots=True)
class Ran:
    """What a planned run did."""

    saved: dict[str, int] = field(default_factory=dict)
    written: dict[NodeId, int] = field(default_factory=dict)
    ran: dict[NodeId, int] = field(default_factory=dict)  # node -> how often
    moves: list[tuple[NodeId, int]] = field(default_factory=list)  # (node, target stage)


def run(program: Program, graph: Graph, orders: dict[NodeId, int], stage_of: dict[int, int], symbols: Symbols) -> Ran:
    """The program, as its plan says. `graph` is the request's own. AssertionError when the plan does not hold."""
    ran = Ran()
    stores: list[dict[NodeId, int]] = [{} for _ in program.waves[0].stages]
    for wave in program.waves:
        _move_held(wave, stores, ran)
        rows: dict[int, list[tuple[NodeId, int]]] = {invoke: [] for invoke in wave.invokes}
        touched: set[int] = set()
        channels: dict[tuple[int, int], deque[tuple[NodeId, int]]] = defaultdict(deque)
        for stage, work in enumerate(wave.stages):
            store = stores[stage]
            for move in work.arriving:
                assert move.target == stage and move.source < stage
                node, value = channels[move.source, stage].popleft()
                assert node == move.node and node not in store
                store[node] = value
            _run_fragments(work, stage, wave, graph, orders, stage_of, store, rows, touched, ran, symbols)
            for move in work.leaving:
                assert move.source == stage < move.target
                channels[stage, move.target].append((move.node, store[move.node]))
                ran.moves.append((move.node, move.target))
            for node in work.drops:
                del store[node]
        assert not any(channels.values()), "everything sent was received"
        assert touched == set(wave.invokes), "the invokes of a wave are those that it reads or writes"
    assert not any(stores), "nothing is left after the last wave"
    return ran


def _move_held(wave: Wave, stores: list[dict[NodeId, int]], ran: Ran) -> None:
    sent: dict[tuple[int, int], list[NodeId]] = defaultdict(list)
    received: dict[tuple[int, int], list[NodeId]] = defaultdict(list)
    taken: list[tuple[int, NodeId, int]] = []
    for stage, work in enumerate(wave.stages):
        for move in work.held:
            assert stage in (move.source, move.target) and move.source != move.target
            if stage == move.source:
                sent[stage, move.target].append(move.node)
                taken.append((move.target, move.node, stores[stage][move.node]))
                ran.moves.append((move.node, move.target))
            else:
                received[move.source, stage].append(move.node)
    assert sent == received
    for target, node, value in taken:
        assert node not in stores[target]
        stores[target][node] = value


def _run_fragments(
    work: StageWork,
    stage: int,
    wave: Wave,
    graph: Graph,
    orders: dict[NodeId, int],
    stage_of: dict[int, int],
    store: dict[NodeId, int],
    rows: dict[int, list[tuple[NodeId, int]]],
    touched: set[int],
    ran: Ran,
    symbols: Symbols,
) -> None:
    visited = [fragment.order for fragment in work.fragments]
    assert visited == sorted(set(visited))
    for fragment in work.fragments:
        assert fragment.nodes and list(fragment.nodes) == sorted(set(fragment.nodes))
        assert fragment.order == PROLOGUE or (stage_of[fragment.order] == stage and fragment.order <= wave.until)
        for node in fragment.nodes:
            ran.ran[node] = ran.ran.get(node, 0) + 1
            event = graph.nodes[node]
            if isinstance(event, (Read, Write)):
                assert fragment.order == orders[node]
                touched.add(event.invoke)
            if isinstance(event, Read):
                assert node not in store
                store[node] = read_symbol(symbols, event, rows[event.invoke])
            elif isinstance(event, Write):
                rows[event.invoke].append((node, store[event.value.node]))
                assert ran.written.setdefault(node, store[event.value.node]) == store[event.value.node]
            elif isinstance(event, Save):
                ran.saved[event.name] = store[event.value.node]
            else:
                assert node not in store
                store[node] = symbols.of("made", node, tuple(store[operand] for operand in operands(event)))
        for node in fragment.drops:
            del store[node]
