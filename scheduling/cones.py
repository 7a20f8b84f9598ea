"""What each sequence of a wave changes, from where on, and how far its rows are needed: its causal cone.

A write to a layer's output acts from the next level on, any other write from its own level on, and from the first
position that it changes: rows before that position and layers before that level are what they would be without it.

A layer whose output is assigned need not run for these rows, unless something inside of it is read or written, or its
output before that. Then the write acts from the layer on: whoever has it goes around the layer, with rows of its own.

Two writes are equal when their keys are: a key says the site, the operations, constants by content, and for values
read from the model what was read of which tokens after which writes; for random operations, the seed and
the number of the draw.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b

from polytrace.description import Rows
from polytrace.graph import (
    LEAVES,
    Call,
    Carried,
    Constant,
    Last,
    Mask,
    NodeId,
    Op,
    Operand,
    OpGrad,
    Parameter,
    Read,
    Ref,
    Request,
    SeedGrad,
    SiteGrad,
    Write,
    draw_of,
    refs,
)
from polytrace.ops import OPS
from scheduling.checks import ModelTable, Resolved
from scheduling.columns import Columns, Part, columns_of
from scheduling.levels import Levels
from scheduling.placement import Order
from scheduling.plan import NOWHERE, Cone, Edit, Key
from scheduling.waves import Run


def find_cones(
    request: Request,
    resolved: Resolved,
    columns: Columns,
    keys: Keys,
    runs: list[Run],
    table: ModelTable,
    taped: Collection[int] = (),
) -> dict[tuple[int, int], tuple[Cone, ...]]:
    """(wave, invoke) -> a cone for each sequence.

    Where the gate found that rows cannot be left out, all are needed everywhere; and up to the last layer that is
    needed at all in waves that are `taped`, whose gradients flow through all rows.
    """
    levels, has_forks = table.levels, table.description.has_forks
    known: dict[object, _Needs] = {}  # by what is read: few differ in that
    found: dict[tuple[int, int], tuple[Cone, ...]] = {}
    for run in runs:
        invoke = request.invokes[run.invoke]
        longest, is_one = invoke.longest, len(invoke.sequences) == 1
        sites = tuple(
            [(*_place(resolved, levels, node), columns_of(columns.narrowed, node, invoke)) for node in run.reads]
        )
        if not has_forks:
            sites = ((levels.count, False, range(longest)),)
        elif run.wave in taped:
            sites = (*sites, (levels.of(run.until), False, range(longest)))
        # What goes on needs the keys and values of every layer: it goes around none.
        may_skip = has_forks and invoke.generation is None and run.wave not in taped
        skipped = _skipped(run, request, resolved, columns, levels) if may_skip else {}
        skips = tuple(sorted(skipped.values()))
        cones = []
        for place, sequence in enumerate(invoke.sequences):
            pads = longest - len(sequence)
            if (sites, pads) not in known:
                known[sites, pads] = _needs(sites, pads, levels.count)
            needs = known[sites, pads]
            own_place = None if is_one else place
            edits = sorted(
                _edits(run.writes, resolved, columns, keys, levels, own_place, range(-pads, len(sequence)), skipped),
                key=_by_level,
            )
            cones.append(
                Cone(
                    edits=tuple(edits),
                    needs=needs.rows,
                    head=needs.head,
                    inside=needs.inside,
                    behind=needs.behind,
                    skips=skips,
                )
            )
        found[run.wave, run.invoke] = tuple(cones)
    return found


def kept_columns(
    request: Request, resolved: Resolved, columns: Columns, runs: list[Run]
) -> dict[tuple[int, int], tuple[int, ...]]:
    """(wave, invoke) -> columns that the head runs on: those that a read of its sites gives."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for run in runs:
        kept: set[int] = set()
        for node in run.reads:
            entry = resolved.sites[node]
            if entry is not None and entry[0].rows is Rows.KEPT:
                kept.update(columns_of(columns.narrowed, node, request.invokes[run.invoke]))
        found[run.wave, run.invoke] = tuple(sorted(kept))
    return found


def _by_level(edit: Edit) -> tuple[int, int, Key]:
    return edit.level, edit.position, edit.key


@dataclass(frozen=True, slots=True, kw_only=True)
class _Needs:
    """What the reads of one sequence are about. As in `Cone`."""

    rows: tuple[int, ...]
    head: tuple[int, ...]
    inside: tuple[int, ...]
    behind: tuple[int, ...]


def _place(resolved: Resolved, levels: Levels, node: int) -> tuple[int, bool]:
    """The level that a read gives rows of, and whether it is the output of its layer that it reads."""
    entry = resolved.sites[node]
    assert entry is not None
    site, leaf = entry
    return levels.of(site.order), levels.is_output(site.order) and leaf.selector in ((), (0,))


def _needs(sites: Iterable[tuple[int, bool, Iterable[int]]], pads: int, num_layers: int) -> _Needs:
    needs = [0] * (num_layers + 1)
    inside, behind = [NOWHERE] * (num_layers + 1), [NOWHERE] * num_layers
    head: set[int] = set()
    for level, is_output, named in sites:
        positions = [column - pads for column in named if column >= pads]
        if not positions:
            continue
        first = behind if is_output else inside
        first[level] = min(first[level], *positions)
        if level == num_layers:
            head.update(positions)
        else:
            needs[level] = max(needs[level], max(positions) + 1)
    if head:
        needs[num_layers] = max(head) + 1
    for level in range(num_layers - 1, -1, -1):
        needs[level] = max(needs[level], needs[level + 1])
    return _Needs(rows=tuple(needs[:num_layers]), head=tuple(sorted(head)), inside=tuple(inside), behind=tuple(behind))


def _edits(
    writes: Iterable[NodeId],
    resolved: Resolved,
    columns: Columns,
    keys: Keys,
    levels: Levels,
    place: int | None,
    every: range,
    skipped: Mapping[NodeId, int],
) -> Iterator[Edit]:
    """The edits of one sequence: at `place`, or the only one; `every` are the positions of its view, pads below 0."""
    for write in writes:
        change = columns.changed.get(write)
        positions = every if change is None else tuple(_positions(change.parts, place or 0, -every.start))
        first = min((position for position in positions if position >= 0), default=None)
        if first is not None:
            # Where the cells of the value fall in this sequence is part of what is written to it.
            key = _digest(keys.acting[write], positions, place)
            if write in skipped:
                yield Edit(skipped[write], first, _digest("skip", key))
            else:
                yield Edit(levels.acts_from(resolved.order(write)), first, key)


def _skipped(run: Run, request: Request, resolved: Resolved, columns: Columns, levels: Levels) -> dict[NodeId, int]:
    """Writes that give a layer's output, for rows that need not run the layer then; with the layer."""
    nodes = request.graph.nodes
    found: dict[NodeId, int] = {}
    for write in run.writes:
        event, entry = nodes[write], resolved.sites[write]
        assert isinstance(event, Write) and entry is not None
        site = entry[0]
        is_whole = not event.in_place and write not in columns.changed and len(site.leaves) == 1
        if is_whole and levels.is_output(site.order) and levels.of(site.order) not in found.values():
            found[write] = levels.of(site.order)
    if not found:
        return found
    layers = {layer: write for write, layer in found.items()}
    for node in (*run.reads, *run.writes):
        order = resolved.order(node)
        write = layers.get(levels.of(order), node)
        if write != node and (levels.is_inside(order) or (levels.is_output(order) and node < write)):
            found.pop(write, None)
    return found


def _positions(parts: Iterable[Part], place: int, pads: int) -> Iterator[int]:
    """The positions of a sequence that are changed, in the order of the index; negative ones are pads."""
    for part in parts:
        if part.sequences is None or place in part.sequences:
            yield from (column - pads for column in part.columns)


class Keys:
    """The key of every live write, and of the values that go into them."""

    def __init__(self, request: Request, resolved: Resolved, columns: Columns, order: Order) -> None:
        self.of: dict[int, Key] = {}
        self.acting: dict[int, Key] = {}  # a write's key behind those of its invoke at the same visit
        self._request, self._columns, self._order = request, columns, order
        self._nodes = request.graph.nodes
        self._prefixes: dict[int, list[Key]] = {}  # invoke -> keys of its tokens and the first 0, 1, ... writes
        if any(order.writes.values()):
            needed = self._needed(resolved)
            for node in order.nodes:
                if needed[node]:
                    self.of[node] = self._key(node)
        for writes in order.writes.values():
            visit, key = None, b""
            for write in writes:  # which of those at one visit is the later makes a difference
                here = resolved.order(write)
                visit, key = here, _digest(key if here == visit else b"", self.of[write])
                self.acting[write] = key

    def _needed(self, resolved: Resolved) -> bytearray:
        """Per node, whether a key has that of the node in it: writes, and what goes into them."""
        needed = bytearray(len(self._nodes))
        for node in reversed(self._order.nodes):
            event = self._nodes[node]
            if isinstance(event, Write):
                needed[node] = True
                for made in self._steps(NodeId(node), event):
                    for operand in refs(made.args[1:]):
                        needed[operand] = True
                if NodeId(node) not in self._columns.changed:
                    needed[event.value.node] = True
            elif needed[node]:
                for operand in resolved.operands[node]:
                    needed[operand] = True
        return needed

    def _key(self, node: int) -> Key:
        event = self._nodes[node]
        if isinstance(event, Op):
            draw = (self._request.options.seed, draw_of(event, NodeId(node))) if OPS[event.name].is_random else None
            return _digest(event.name, draw, self._spelled(event.args), self._spelled(tuple(event.kwargs.items())))
        if isinstance(event, Read):
            return _digest("read", event.site, self._content(event.invoke, self._order.seen[node]))
        if isinstance(event, Write):
            return _digest("write", event.site, event.in_place, self._written(NodeId(node), event))
        if isinstance(event, Constant):
            raw = self._request.constants[event.name]
            content = raw.digest or raw.state or blake2b(raw.data, digest_size=16).digest()
            return _digest(raw.dtype, raw.shape, content)
        if isinstance(event, Call):
            return _digest("call", event.module, self._spelled(event.args))
        if isinstance(event, Parameter):
            return _digest("parameter", event.path)
        if isinstance(event, (Carried, Last)):
            return _digest("earlier", node)
        if isinstance(event, (SiteGrad, OpGrad, SeedGrad)):
            return _digest("gradient", node)
        assert isinstance(event, Mask)
        return _digest("mask", tuple(map(len, self._request.invokes[event.invoke].sequences)))

    def _written(self, write: NodeId, event: Write) -> object:
        """What a write says: where only some cells change, of these alone."""
        if write not in self._columns.changed:
            return self.of[event.value.node]
        return [(made.name, self._spelled(made.args[1:])) for made in self._steps(write, event)]

    def _steps(self, write: NodeId, event: Write) -> Iterator[Op]:
        """The in-place code by which a write changes some cells, the last first; none when it may change any."""
        change = self._columns.changed.get(write)
        node = event.value.node
        while change is not None and node != change.base:
            made = self._nodes[node]
            assert isinstance(made, Op)
            yield made
            base = made.args[0]
            assert isinstance(base, Ref)
            node = base.node

    def _content(self, invoke: int, count: int) -> Key:
        """What the rows of an invoke are behind so many of its writes: its tokens and these."""
        if invoke not in self._prefixes:
            self._prefixes[invoke] = [_digest("tokens", self._request.invokes[invoke].sequences)]
        prefixes = self._prefixes[invoke]
        for write in self._order.writes[invoke][len(prefixes) - 1 : count]:
            prefixes.append(_digest(prefixes[-1], self.of[write]))
        return prefixes[count]

    def _spelled(self, operand: Operand) -> object:
        """An operand with keys for the values in it."""
        if type(operand) in LEAVES:
            return operand
        if isinstance(operand, Ref):
            return self.of[operand.node]
        if isinstance(operand, tuple):
            return tuple([self._spelled(part) for part in operand])
        if isinstance(operand, list):
            return [self._spelled(part) for part in operand]
        if isinstance(operand, slice):
            return slice(self._spelled(operand.start), self._spelled(operand.stop), self._spelled(operand.step))
        return operand


def _digest(*parts: object) -> Key:
    return blake2b(repr(parts).encode(), digest_size=16).digest()
