"""In-place code, as functional nodes: what Python's mutable tensors mean in a program.

In-place code makes a new root node of its storage and raises the storage's version; values that share the storage
follow when they are used next. A storage that was read from a site hands every new root back to the model by a `Write`.

Owns which place of the model a storage is handed back to, and the refusals: a value that is older than another line's
write, a body of a choice that changes what it did not make, a change that reaches nothing, or goes through `.data`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from polytrace.errors import GraphError
from polytrace.graph import Mask, Node, NodeId, Op, Operand, Parameter, Ref, Site, Write
from polytrace.graph import operands as node_operands
from polytrace.groups import GroupPlace, parts_of
from polytrace.storage import Place, Step, Storage
from polytrace.timing import FIRST, When

if TYPE_CHECKING:
    from polytrace.recording import Recording

DATA_IS_READ_ONLY = (
    "in-place code through `.data` changes a tensor in torch and leaves its gradients as they were, which no trace "
    "does: write to the value itself (`value[...] = new`), or to a copy (`value.data.clone()`)"
)


class InPlace:
    """Of one recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._places: dict[tuple[Site, int, When], Place] = {}
        self._by_site: dict[tuple[Site, int], list[Place]] = {}
        self._groups: dict[tuple[Site, int], GroupPlace] = {}
        self._edited: list[Storage] = []  # those without a place
        self._branch: int | None = None  # nodes before the body of a choice that is being recorded

    def edit(self, storage: Storage, way: tuple[Step, ...], part: Operand, where: str) -> None:
        """The part of a storage that `way` leads to gets new content."""
        if any(step.name == "detach" for step in way):
            raise GraphError(DATA_IS_READ_ONLY, where=where)
        self.check_fresh(storage, where)
        self.new_root(storage, self._put(storage.node, way, part, where), where)

    def new_root(self, storage: Storage, node: NodeId, where: str) -> None:
        """A storage is another value from now on, in the model too where it was read from a site."""
        is_outside = storage.place is not None or storage.gradient is not None or storage.node < (self._branch or 0)
        self.check_branch(is_outside, where)
        self._recording.loops.check_change(storage.node, where)
        storage.past.append(storage.node)
        storage.node = node
        storage.version += 1
        if storage.gradient is not None:
            self._recording.gradients.write(storage.gradient, node, where)
            return
        if storage.place is None or self._is_past(storage.place):
            if not storage.edits:
                self._edited.append(storage)
            storage.edits.append((node, where))
            return
        place = storage.place
        self.hand_back(place, node, in_place=True, where=where)
        self.note(place, where, storage)
        storage.writes_seen = place.writes
        if isinstance(place, Place):
            place.firsts[place.writes] = node

    def apply(self, node: NodeId, step: Step, where: str) -> NodeId:
        """A view taken again, of what its base is now."""
        return self._recording.add(
            Op(name=step.name, args=(Ref(node), *step.args), kwargs=dict(step.kwargs), where=where)
        )

    def hand_back(self, place: Place | GroupPlace, node: NodeId, *, in_place: bool, where: str) -> None:
        """Writes a value to its site; of a group, each member its part."""
        if in_place and place.in_place_refusal is not None:
            raise GraphError(f"{place.site} cannot be changed in place: {place.in_place_refusal}", where=where)
        if isinstance(place, Place):
            self._recording.add(
                Write(
                    site=place.site,
                    invoke=place.invoke,
                    value=Ref(node),
                    in_place=in_place,
                    where=where,
                    step=place.when.step,
                    num_steps=place.when.num_steps,
                )
            )
            return
        lengths = self._recording.groups.widths_of(place.site, place.invoke)
        shape, dims = self._recording.session.shape_of(node).shape, self._recording.groups.token_dims(place.site)
        sizes = [shape[dim : dim + 1] for dim in dims]
        if shape[:1] != (len(lengths),) or any(size != (max(lengths),) for size in sizes):
            raise GraphError(
                f"{place.site} of all {len(lengths)} prompts is {max(lengths)} tokens wide, and the value written to "
                f"it has shape {list(shape)}; a write needs the exact shape",
                where=where,
            )
        for part in place.parts:
            index = part.index(dims)
            own = self._recording.add(Op(name="getitem", args=(Ref(node), index), where=where))
            member = part.place.invoke
            self._recording.add(Write(site=place.site, invoke=member, value=Ref(own), in_place=in_place, where=where))

    def place(self, site: Site, invoke: int) -> Place | GroupPlace:
        """The one of a site and an invoke or a group."""
        if invoke < 0:
            members = self._recording.session.members_of(invoke)
            lengths = [self._recording.groups.widths_of(site, member) for member in members]
            parts = parts_of([self._own_place(site, member) for member in members], lengths)
            return self._groups.setdefault((site, invoke), GroupPlace(site, invoke, parts))
        return self._own_place(site, invoke)

    def note(self, place: Place | GroupPlace, where: str, writer: Storage | None) -> None:
        """Takes in a write; also to what the same site is at other steps that are among its own."""
        place.note(where, writer)
        if not self._recording.loops.are_used or isinstance(place, GroupPlace):
            return
        for other in self._by_site[place.site, place.invoke]:
            if other is not place and other.when.step <= place.when.last and place.when.step <= other.when.last:
                other.note(where, None)

    def _is_past(self, place: Place | GroupPlace) -> bool:
        """Whether what it was read from is no part of the model any more where the code is now."""
        if place.invoke in self._recording.over:
            return True
        loops = self._recording.loops
        return loops.are_used and isinstance(place, Place) and place.when != loops.position.of(place.site)

    @contextmanager
    def branch(self) -> Iterator[None]:
        """The body of one side of a choice: it may change what it made itself, and nothing else."""
        outer, self._branch = self._branch, len(self._recording.nodes) if self._branch is None else self._branch
        try:
            yield
        finally:
            self._branch = outer

    def check_used(self, live: Sequence[bool]) -> None:
        """GraphError when in-place code changed a value that nothing uses; `live` tells which nodes are needed."""
        for storage in self._edited:
            if not any(live[node] for node, _ in storage.edits):
                raise GraphError(_lost(self._recording.nodes, storage.edits[0][0]), where=storage.edits[0][1])

    def check_fresh(self, storage: Storage, where: str) -> None:
        """Handing back a value that lacks another line's write would silently undo that write."""
        place = storage.place
        if place is not None and place.writes != storage.writes_seen and not self._is_past(place):
            raise GraphError(
                f"this value was read before {place.line} changed {place.site}, and changing it now would undo that: "
                f"read {place.site} again",
                where=where,
            )

    def check_kind(self, dtype: str | None, new: NodeId, where: str) -> None:
        """In-place code does not make whole numbers of others, as in torch."""
        if dtype is None or "float" in dtype:
            return
        made = self._recording.facts.dtypes.of(new) or self._recording.session.shape_of(new).dtype
        if "float" in made or (dtype == "bool" and made != "bool"):
            raise GraphError(
                f"in-place code would put {made} into a value of {dtype}: write `value = value / 2` without in-place, "
                f"or value.float() first",
                where=where,
            )

    def check_branch(self, is_outside: bool, where: str) -> None:
        """A body of a choice changes nothing that was there before it."""
        if self._branch is not None and is_outside:
            raise GraphError(
                "in-place code in a side of polytrace.cond would act whichever side is taken: return the new value "
                "from both sides, and write what polytrace.cond returns",
                where=where,
            )

    def _put(self, root: NodeId, way: tuple[Step, ...], part: Operand, where: str) -> NodeId:
        """`root` with the part at the end of `way` replaced."""
        if len(way) == 1 and way[0].name == "getitem":
            return self._recording.add(Op(name="setitem", args=(Ref(root), way[0].args[0], part), where=where))
        copy = next((position for position, step in enumerate(way) if not step.is_view), None)
        if copy is None:
            steps = tuple((step.name, step.args, step.kwargs) for step in way)
            return self._recording.add(Op(name="set_view", args=(Ref(root), steps, part), where=where))
        # an index that copies stands in the way: change what it gave, then put that back
        cut = copy if copy == len(way) - 1 else copy + 1
        inner = root
        for step in way[:cut]:
            inner = self.apply(inner, step, where)
        return self._put(root, way[:cut], Ref(self._put(inner, way[cut:], part, where)), where)

    def _own_place(self, site: Site, invoke: int) -> Place:
        loops = self._recording.loops
        when = loops.position.of(site) if loops.are_used else FIRST
        place = self._places.get((site, invoke, when))
        if place is None:
            place = self._places[site, invoke, when] = Place(site, invoke, when)
            self._by_site.setdefault((site, invoke), []).append(place)
        return place


def _lost(nodes: Sequence[Node], edit: NodeId) -> str:
    """Why an in-place change reaches nothing."""
    first = next(iter(node_operands(nodes[edit])), None)
    changed = nodes[first] if first is not None else None
    if isinstance(changed, Parameter):
        return (
            f"this in-place change reaches nothing: {changed.path} is a copy here, and no trace changes the model's "
            "own weights. Change what the module gets or returns (`.input`, `.output`)"
        )
    below = next(iter(node_operands(changed)), None) if isinstance(changed, Op) else None
    if isinstance(changed, Mask) or (below is not None and isinstance(nodes[below], Mask)):
        return (
            "this in-place change reaches nothing: the mask tells tokens from pads, and rows attend to their own "
            "sequence's earlier tokens by construction. Edit `scores` or `pattern` of a layer to change who sees whom"
        )
    return (
        "this in-place change reaches nothing: the value is a copy, not a view of the model's tensor, "
        "and nothing uses it. Write to the site itself (`site[...] = value`), or save the value"
    )
