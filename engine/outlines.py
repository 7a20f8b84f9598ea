"""What a fragment does apart from its values: equal outlines of several requests run as one table of rows.

An outline has the nodes of a fragment in order, how they are wired, their static arguments, and shapes and dtypes of
all values. Not in it: which rows are read, and what comes from outside: constants, parameters, values made before. An
outline is worked out from its own request alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from engine.arguments import Selector
from engine.ops import TORCH_DTYPES
from engine.row_ops import Own, Run, Slot, compiled
from engine.row_spots import Place
from polytrace.description import Leaf, Rows, SiteInfo
from polytrace.graph import NodeId, Op, Operand, Port, Read, Ref, Save, Site, Write
from scheduling.plan import Fragment, Program

_MAX_BYTES = 1 << 22  # of a member's values: larger ones keep a kernel busy by themselves
_MAX_OUTSIDE = 1 << 18  # elements of one value from outside


@dataclass(frozen=True, slots=True)
class ReadAt:
    """Rows that every member reads."""

    slot: int
    selector: Selector
    shape: tuple[int, ...]
    is_output: bool  # read as the output of a layer, at a layer's output
    is_kept: bool  # of the rows that the head runs on


@dataclass(frozen=True, slots=True)
class WriteAt:
    """Rows that every member writes."""

    slot: int
    selector: Selector
    is_kept: bool
    in_place: bool
    turn: int  # how many writes of the member's invoke to the same tensor came before


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Worked out once, for all fragments that are like it."""

    owns: tuple[Own, ...]  # a member's own values, by slot
    outside: tuple[int, ...]  # slots of values that are stacked
    is_steady: tuple[bool, ...]  # of these: whether they are the same at every run of the program
    reads: tuple[ReadAt, ...]
    steps: tuple[tuple[int, Run], ...]  # which slot each makes
    writes: tuple[WriteAt, ...]
    saves: tuple[int | None, ...]  # slots of what is saved, None of what was made before
    stays: tuple[int, ...]  # slots of values that are needed after the visit
    own_bytes: int  # of a member's values


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A request's own side of an outline."""

    outline: Outline
    outside: tuple[NodeId, ...]
    reads: tuple[Place, ...]
    writes: tuple[Place, ...]
    saves: tuple[NodeId, ...]
    stays: tuple[NodeId, ...]
    fired: tuple[NodeId, ...]
    drops: tuple[NodeId, ...]  # of values from outside


class Outlines:
    """One a shard."""

    def __init__(self, site: Callable[[Site], tuple[SiteInfo, Leaf]], *, is_cpu: bool, is_split: bool) -> None:
        """`is_split`: ranks split the model."""
        self._site = site
        self._is_cpu = is_cpu
        self._is_split = is_split
        self._known: dict[Hashable, Outline | None] = {}

    def bind(self, program: Program, fragment: Fragment, is_steady: Callable[[NodeId], bool]) -> Bound | None:
        """The fragment as a row of tables, None when it has to run alone.

        `is_steady` tells which values from outside are the same at every run of the program.
        """
        look = _Look(program, fragment, self._site, self._is_split)
        try:
            look.at_all()
        except _UnfitError:
            return None
        steady = tuple([is_steady(node) for node in look.outside])
        key = (tuple(look.key), steady)
        if key not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = look.outline(steady, is_cpu=self._is_cpu)
        outline = self._known[key]
        if outline is None:
            return None
        outside = look.outside
        return Bound(
            outline=outline,
            outside=tuple(outside),
            reads=tuple(look.read_places),
            writes=tuple(look.write_places),
            saves=tuple(look.saves),
            stays=tuple(look.stays.values()),
            fired=tuple(look.fired),
            drops=tuple([node for node in fragment.drops if node in outside]),
        )


_MAX_KNOWN = 1024
_EVERY = slice(None)


class _UnfitError(Exception):
    """The fragment is no row of a table."""


class _Look:
    """One look at a fragment, in program order. What every request pays for each visit, once: kept short."""

    def __init__(
        self,
        program: Program,
        fragment: Fragment,
        site: Callable[[Site], tuple[SiteInfo, Leaf]],
        is_split: bool,
    ) -> None:
        self._program, self._fragment, self._site, self._is_split = program, fragment, site, is_split
        self.key: list[Hashable] = []
        self.outside: list[NodeId] = []
        self.reads: list[ReadAt] = []
        self.read_places: list[Place] = []
        self.writes: list[WriteAt] = []
        self.write_places: list[Place] = []
        self.saves: list[NodeId] = []
        self.save_slots: list[int | None] = []
        self.fired: list[NodeId] = []
        self.stays: dict[int, NodeId] = {}  # by slot
        self._slots: dict[NodeId, int] = {}
        self._nodes: list[NodeId] = []  # by slot
        self._read_slots: dict[tuple[Selector, int, tuple[int, ...] | None], int] = {}
        self._written: dict[tuple[Selector, int], list[bool]] = {}  # in place or not, in turn

    def at_all(self) -> None:
        """_UnfitError when a node has no form for tables, as far as that is seen without compiling it."""
        nodes, below, key = self._program.graph.nodes, self._program.below, self.key
        for node_id in self._fragment.nodes:
            node = nodes[node_id]
            if below and node_id in below:
                raise _UnfitError
            if isinstance(node, Op):
                args = self._outlined(node.args)
                if node.kwargs:
                    args = (*args, *node.kwargs, self._outlined(tuple(node.kwargs.values())))
                key.append((node.name, *args))
                self._make(node_id)
            elif isinstance(node, Read):
                self._read(node_id, node)
                self.fired.append(node_id)
            elif isinstance(node, Write):
                self._write(node_id, node)
                self.fired.append(node_id)
            elif isinstance(node, Save):
                slot = self._slots.get(node.value.node)
                key.append(("save", slot))
                self.saves.append(node_id)
                self.save_slots.append(slot)
                self.fired.append(node_id)
            else:
                raise _UnfitError
        drops, outside = self._fragment.drops, self.outside
        for node_id, slot in self._slots.items():
            if node_id not in drops and node_id not in outside:
                if slot in self.stays:
                    raise _UnfitError  # two reads that are one, and both are needed later
                self.stays[slot] = node_id
        if self.stays:
            key.append(("stays", *self.stays))

    def outline(self, is_steady: tuple[bool, ...], *, is_cpu: bool) -> Outline | None:
        """What runs for it; None when an op has no form for tables, or the values are large."""
        nodes, facts = self._program.graph.nodes, self._program.facts
        owns: list[Own] = []
        num_bytes = 0
        for node_id in self._nodes:
            known = facts[node_id]
            if known is None or known.dtype not in TORCH_DTYPES:
                return None
            owns.append(Own(known.shape, TORCH_DTYPES[known.dtype]))
            num_bytes += known.num_bytes
        steps: list[tuple[int, Run]] = []
        for slot, node_id in enumerate(self._nodes):
            op = nodes[node_id]
            if not isinstance(op, Op) or node_id in self.outside:
                continue
            args = tuple([self._slotted(part) for part in op.args])
            kwargs = {name: self._slotted(part) for name, part in op.kwargs.items()}
            try:
                made = compiled(op.name, args, kwargs, owns, owns[slot], is_cpu=is_cpu)
            except Exception:  # noqa: BLE001  what does not fit tells so when it runs by itself
                return None
            if made is None:
                return None
            run, layout = made
            owns[slot] = Own(owns[slot].shape, owns[slot].dtype, layout)
            steps.append((slot, run))
        outside = [self._slots[node_id] for node_id in self.outside]
        if num_bytes > _MAX_BYTES or any(prod(owns[slot].shape) > _MAX_OUTSIDE for slot in outside):
            return None
        return Outline(
            owns=tuple(owns),
            outside=tuple(outside),
            is_steady=is_steady,
            reads=tuple(self.reads),
            steps=tuple(steps),
            writes=tuple(self.writes),
            saves=tuple(
                [
                    self._slots.get(node.value.node)
                    for node in map(nodes.__getitem__, self.saves)
                    if isinstance(node, Save)
                ]
            ),
            stays=tuple(self.stays),
            own_bytes=max(num_bytes, 1),
        )

    def _read(self, node_id: NodeId, node: Read) -> None:
        info, leaf = self._site(node.site)
        selector, invoke, columns = node.site.selector, node.invoke, self._program.narrowed.get(node_id)
        if not self._is_plain(node, info, leaf) or (selector, invoke) in self._written:
            raise _UnfitError
        known = self._read_slots.get((selector, invoke, columns))
        if known is not None:
            self._slots[node_id] = known
            self.key.append(("again", known))
            return
        shape, dtype = self._shape(node_id)
        slot = self._read_slots[selector, invoke, columns] = self._make(node_id)
        is_kept = info.rows is Rows.KEPT
        self.reads.append(ReadAt(slot, selector, shape, selector in ((), (0,)), is_kept))
        self.read_places.append((invoke, columns))
        self.key.append(("read", selector, is_kept, invoke, shape, dtype))

    def _write(self, node_id: NodeId, node: Write) -> None:
        info, leaf = self._site(node.site)
        selector, invoke, columns = node.site.selector, node.invoke, self._program.narrowed.get(node_id)
        slot = self._use(node.value.node)
        given, own = self._shape(node.value.node)[0], self._program.invokes[invoke]
        if not self._is_plain(node, info, leaf) or given != (
            len(own.sequences),
            own.longest if columns is None else len(columns),
            *leaf.tail,
        ):
            raise _UnfitError
        before = self._written.setdefault((selector, invoke), [])
        in_place, turn, is_kept = node.in_place and all(before), len(before), info.rows is Rows.KEPT
        before.append(node.in_place)
        self.writes.append(WriteAt(slot, selector, is_kept, in_place, turn))
        self.write_places.append((invoke, columns))
        self.key.append(("write", selector, is_kept, invoke, slot, in_place, turn))

    def _is_plain(self, node: Read | Write, info: SiteInfo, leaf: Leaf) -> bool:
        """Whether the site's rows are simply rows, all of each on this rank."""
        is_of_rows = leaf.row_dim == 1 and leaf.num_columns is None and not (leaf.of_pairs or leaf.is_attended)
        is_of_rows = is_of_rows and info.rows is not Rows.DECODER and node.site.port not in (Port.HEAD_OUT, Port.TOKEN)
        return is_of_rows and (not self._is_split or leaf.sharded_view_dim is None)

    def _shape(self, node_id: NodeId) -> tuple[tuple[int, ...], str]:
        known = self._program.facts[node_id]
        if known is None:
            raise _UnfitError
        return known.shape, known.dtype

    def _make(self, node_id: NodeId) -> int:
        slot = self._slots[node_id] = len(self._nodes)
        self._nodes.append(node_id)
        return slot

    def _use(self, node_id: NodeId) -> int:
        """The slot of an operand; one from outside gets one."""
        slot = self._slots.get(node_id)
        if slot is None:
            self.key.append(("outside", *self._shape(node_id)))
            self.outside.append(node_id)
            slot = self._make(node_id)
        return slot

    def _outlined(self, parts: Iterable[Operand]) -> tuple[Hashable, ...]:
        """Operands as parts of a key: slots are numbers there, static ones say what they are."""
        found: list[Hashable] = []
        for part in parts:
            kind = type(part)
            if isinstance(part, Ref):
                found.append(self._use(part.node))
            elif kind is float:
                found.append((kind, repr(part)))
            elif isinstance(part, slice):
                bounds = () if part == _EVERY else self._outlined((part.start, part.stop, part.step))
                found.append((kind, *bounds))
            elif isinstance(part, (tuple, list)):
                found.append((kind, *self._outlined(part)))
            else:
                found.append((kind, part))
        return tuple(found)

    def _slotted(self, operand: Operand) -> Any:
        """An operand with slots in the place of values."""
        if isinstance(operand, Ref):
            return Slot(self._slots[operand.node])
        if isinstance(operand, tuple):
            return tuple([self._slotted(part) for part in operand])
        if isinstance(operand, list):
            return [self._slotted(part) for part in operand]
        if isinstance(operand, slice):
            return slice(*[self._slotted(part) for part in (operand.start, operand.stop, operand.step)])
        return operand
