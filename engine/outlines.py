"""What a fragment does apart from its values: equal outlines of several requests run as one table of rows.

An outline has the nodes of a fragment in order, how they are wired, their static arguments, and shapes and dtypes of
all values. Not in it: which rows are read, and what comes from outside: constants, parameters, values made before. An
outline is worked out from its own request alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from dataclasses import dataclass
from typing import Any

from engine.arguments import Selector
from engine.ops import TORCH_DTYPES
from engine.row_ops import Own, Run, Slot, compiled
from polytrace.description import Leaf, Rows, SiteInfo
from polytrace.graph import LEAVES, NodeId, Op, Operand, Port, Read, Ref, Save, Site, Write
from scheduling.plan import Fragment, Program

_MAX_BYTES = 1 << 22  # of a member's values: larger ones keep a kernel busy by themselves
_MAX_OUTSIDE = 1 << 20  # of one value from outside


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

    num_slots: int
    owns: tuple[Own, ...]  # a member's own values, by slot
    outside: tuple[tuple[int, Own], ...]  # slots of values that are stacked
    is_steady: tuple[bool, ...]  # of these: whether they are the same at every run of the program
    reads: tuple[ReadAt, ...]
    steps: tuple[tuple[int, Run], ...]  # which slot each makes
    writes: tuple[WriteAt, ...]
    saves: tuple[int | None, ...]  # slots of what is saved, None of what was made before
    stays: tuple[int, ...]  # slots of values that are needed after the visit
    own_bytes: int  # of a member's values


Place = tuple[int, tuple[int, ...] | None]  # an invoke and columns of its view, None for all


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

    def bind(self, program: Program, fragment: Fragment, steady: Container[NodeId]) -> Bound | None:
        """The fragment as a row of tables, None when it has to run alone. `steady`: values that never change."""
        found = _Fragment(program, fragment, self._site, self._is_split)
        if not found.look():
            return None
        is_steady = tuple([node in steady for node in found.outside])
        key = (tuple(found.key), tuple([slot for slot, _ in found.stays]), is_steady)
        if key not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[key] = found.outline(is_steady, is_cpu=self._is_cpu)
        outline = self._known[key]
        if outline is None:
            return None
        return Bound(
            outline=outline,
            outside=tuple(found.outside),
            reads=tuple(found.read_places),
            writes=tuple(found.write_places),
            saves=tuple(found.saves),
            stays=tuple([node for _, node in found.stays]),
            fired=tuple(found.fired),
            drops=tuple([node for node in fragment.drops if node in found.outside]),
        )


_MAX_KNOWN = 1024


class _Fragment:
    """One look at a fragment, in program order."""

    def __init__(
        self,
        program: Program,
        fragment: Fragment,
        site: Callable[[Site], tuple[SiteInfo, Leaf]],
        is_split: bool,
    ) -> None:
        self.program, self.fragment, self._site, self._is_split = program, fragment, site, is_split
        self.key: list[Hashable] = []
        self.slots: dict[NodeId, int] = {}
        self.owns: list[Own] = []
        self.num_bytes = 0
        self.outside: list[NodeId] = []
        self.outside_slots: list[int] = []
        self.reads: list[ReadAt] = []
        self.read_places: list[Place] = []
        self.ops: list[tuple[int, Op]] = []
        self.writes: list[WriteAt] = []
        self.write_places: list[Place] = []
        self.saves: list[NodeId] = []
        self.save_slots: list[int | None] = []
        self.fired: list[NodeId] = []
        self.stays: list[tuple[int, NodeId]] = []
        self._read_slots: dict[tuple[Selector, int, tuple[int, ...] | None], int] = {}
        self._written: dict[tuple[Selector, int], list[bool]] = {}  # in place or not, in turn

    def look(self) -> bool:
        """Whether all nodes have a form for tables; as far as is known without compiling them."""
        nodes, below = self.program.graph.nodes, self.program.below
        for node_id in self.fragment.nodes:
            node = nodes[node_id]
            if node_id in below:
                return False
            if isinstance(node, Op):
                is_ours = self._look_at_op(node_id, node)
            elif isinstance(node, Read):
                is_ours = self._look_at_read(node_id, node)
            elif isinstance(node, Write):
                is_ours = self._look_at_write(node_id, node)
            elif isinstance(node, Save):
                is_ours = True
                self.saves.append(node_id)
                self.save_slots.append(self.slots.get(node.value.node))
                self.key.append(("save", self.save_slots[-1]))
                self.fired.append(node_id)
            else:
                return False
            if not is_ours:
                return False
        gone = {*self.fragment.drops, *self.outside}
        self.stays = [(slot, node) for node, slot in self.slots.items() if node not in gone]
        return self.num_bytes <= _MAX_BYTES

    def outline(self, is_steady: tuple[bool, ...], *, is_cpu: bool) -> Outline | None:
        """What runs for it; None when an op has no form for tables."""
        steps: list[tuple[int, Run]] = []
        for slot, op in self.ops:
            args = tuple([self._slotted(part) for part in op.args])
            kwargs = {name: self._slotted(part) for name, part in op.kwargs.items()}
            made = compiled(op.name, args, kwargs, self.owns, self.owns[slot], is_cpu=is_cpu)
            if made is None:
                return None
            run, layout = made
            self.owns[slot] = Own(self.owns[slot].shape, self.owns[slot].dtype, layout)
            steps.append((slot, run))
        return Outline(
            num_slots=len(self.owns),
            owns=tuple(self.owns),
            outside=tuple([(slot, self.owns[slot]) for slot in self.outside_slots]),
            is_steady=is_steady,
            reads=tuple(self.reads),
            steps=tuple(steps),
            writes=tuple(self.writes),
            saves=tuple(self.save_slots),
            stays=tuple([slot for slot, _ in self.stays]),
            own_bytes=max(self.num_bytes, 1),
        )

    def _look_at_op(self, node_id: NodeId, node: Op) -> bool:
        if "draw" in node.kwargs:
            return False
        args = self._outlined(node.args)
        kwargs = tuple([(name, self._outlined(part)) for name, part in node.kwargs.items()]) if node.kwargs else ()
        slot = self._make(node_id)
        if args is None or None in [part for _, part in kwargs] or slot is None:
            return False
        self.ops.append((slot, node))
        self.key.append((node.name, args, kwargs, self.owns[slot].shape, self.owns[slot].dtype))
        return True

    def _look_at_read(self, node_id: NodeId, node: Read) -> bool:
        selector, columns = node.site.selector, self.program.narrowed.get(node_id)
        info, leaf = self._site(node.site)
        is_kept = info.rows is Rows.KEPT
        if not self._is_plain(node, leaf) or (selector, node.invoke) in self._written:
            return False
        self.fired.append(node_id)
        known = self._read_slots.get((selector, node.invoke, columns))
        if known is not None:
            self.slots[node_id] = known
            self.key.append(("again", known))
            return True
        slot = self._make(node_id)
        if slot is None or self.owns[slot].shape != self._shape(node_id, node, leaf):
            return False
        self._read_slots[selector, node.invoke, columns] = slot
        self.reads.append(ReadAt(slot, selector, self.owns[slot].shape, selector in ((), (0,)), is_kept))
        self.read_places.append((node.invoke, columns))
        self.key.append(("read", selector, is_kept, node.invoke, self.owns[slot].shape, self.owns[slot].dtype))
        return True

    def _look_at_write(self, node_id: NodeId, node: Write) -> bool:
        info, leaf = self._site(node.site)
        slot, selector, is_kept = self._use(node.value.node), node.site.selector, info.rows is Rows.KEPT
        if not self._is_plain(node, leaf) or slot is None or self.owns[slot].shape != self._shape(node_id, node, leaf):
            return False
        before = self._written.setdefault((selector, node.invoke), [])
        in_place = node.in_place and all(before)
        self.writes.append(WriteAt(slot, selector, is_kept, in_place, len(before)))
        before.append(node.in_place)
        self.write_places.append((node.invoke, self.program.narrowed.get(node_id)))
        self.key.append(("write", selector, is_kept, node.invoke, slot, in_place, len(before)))
        self.fired.append(node_id)
        return True

    def _is_plain(self, node: Read | Write, leaf: Leaf) -> bool:
        """Whether the site's rows are simply rows, all of each on this rank."""
        is_whole = leaf.sharded_view_dim is None or not self._is_split
        is_of_rows = leaf.row_dim == 1 and not leaf.of_pairs and node.site.port is not Port.HEAD_OUT
        return is_of_rows and is_whole

    def _shape(self, node_id: NodeId, node: Read | Write, leaf: Leaf) -> tuple[int, ...]:
        invoke, columns = self.program.invokes[node.invoke], self.program.narrowed.get(node_id)
        return leaf.view_shape(len(invoke.sequences), invoke.longest, None if columns is None else len(columns))

    def _make(self, node_id: NodeId) -> int | None:
        """A slot for a value of known shape."""
        known = self.program.facts[node_id]
        dtype = None if known is None else TORCH_DTYPES.get(known.dtype)
        if known is None or dtype is None:
            return None
        self.num_bytes += known.num_bytes
        self.slots[node_id] = len(self.owns)
        self.owns.append(Own(known.shape, dtype))
        return self.slots[node_id]

    def _use(self, node_id: NodeId) -> int | None:
        """The slot of an operand; one from outside gets one."""
        slot = self.slots.get(node_id)
        if slot is not None:
            return slot
        slot = self._make(node_id)
        known = self.program.facts[node_id]
        if slot is None or known is None or known.num_bytes > _MAX_OUTSIDE:
            return None
        self.outside.append(node_id)
        self.outside_slots.append(slot)
        self.key.append(("outside", slot, known.shape, known.dtype))
        return slot

    def _outlined(self, operand: Operand) -> Hashable | None:
        """An operand as part of a key; None when it has no form."""
        kind = type(operand)
        if isinstance(operand, Ref):
            slot = self._use(operand.node)
            return None if slot is None else ("slot", slot)
        if kind in LEAVES:
            return (kind, repr(operand))
        if isinstance(operand, slice):
            parts: Any = (operand.start, operand.stop, operand.step)
        else:
            parts = operand
        found = tuple([self._outlined(part) for part in parts])
        return None if None in found else (kind, *found)

    def _slotted(self, operand: Operand) -> Any:
        """An operand with slots in the place of values."""
        if isinstance(operand, Ref):
            return Slot(self.slots[operand.node])
        if isinstance(operand, tuple):
            return tuple([self._slotted(part) for part in operand])
        if isinstance(operand, list):
            return [self._slotted(part) for part in operand]
        if isinstance(operand, slice):
            parts = [self._slotted(part) for part in (operand.start, operand.stop, operand.step)]
            return slice(*parts)
        return operand
