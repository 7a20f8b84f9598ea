"""Gradients while a program is recorded: `loss.backward()`, what `.grad` of a value is, and what changes it.

Inside `with loss.backward():` a value's `.grad` is that backward's, and what is assigned to it or changed in place
there goes on backwards in its place (a `GradWrite`). Outside it is what torch accumulates: the sum over all backwards
so far that the value can have come before, as a value of the program; what changes it there changes nothing else.

Owns which node a gradient is of: one tensor to torch is several nodes here, when it is read again or changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polytrace.detaching import AsShapes, Detaching
from polytrace.errors import GraphError
from polytrace.graph import (
    Backward,
    Constant,
    Grad,
    GradWrite,
    Node,
    NodeId,
    Op,
    Operand,
    Read,
    Ref,
    operands,
)
from polytrace.groups import GroupPlace
from polytrace.leaves import Leaf, Leaves
from polytrace.lineages import Lineage, Lineages
from polytrace.lines import user_line
from polytrace.no_gradients import NONE_YET, check_allowed, check_loss, check_value, why_not
from polytrace.pruning import cone
from polytrace.storage import Place, State, Storage, is_recorded, state_of

if TYPE_CHECKING:
    from polytrace.recording import Recording


@dataclass(frozen=True, slots=True)
class Target:
    """A node that a gradient is of, and where its part lies in the gradient of a view over several prompts."""

    node: NodeId
    index: Operand = None


@dataclass(frozen=True, slots=True, eq=False)
class GradPlace:
    """What in-place code on a gradient changes: in a block the gradients of these nodes, else what `.grad` is."""

    targets: tuple[Target, ...] = ()
    backward: NodeId | None = None
    note: Callable[[], None] | None = None  # outside of blocks: hears of a change


@dataclass(slots=True, eq=False)
class Sweep:
    """One backward, with the gradients that its block gave out or was given."""

    node: NodeId
    where: str
    inputs: frozenset[Hashable] | None = None  # `inputs=`: it accumulates for these alone
    held: dict[tuple[NodeId, ...], State] = field(default_factory=dict)  # by the nodes that they are of


@dataclass(slots=True, eq=False)
class _Given:
    """What the user has made of `.grad` of a value, outside of blocks."""

    value: State | None
    num_sweeps: int  # that came before


class Gradients:
    """Of one recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._sweeps: list[Sweep] = []  # that accumulate
        self._blocks: list[Sweep] = []  # that code stands in
        self._own: dict[Hashable, _Given] = {}  # by the tensor
        self._keys: dict[Storage, Hashable] = {}
        self._grads: dict[tuple[NodeId, NodeId], NodeId] = {}
        self._writes: dict[tuple[NodeId, NodeId], NodeId] = {}  # the newest of each value and backward
        self._is_used = False
        self.detaching = Detaching()
        self.lineages = Lineages(recording)
        self.leaves = Leaves(recording)

    # what a user calls

    def backward(self, state: State, gradient: Any = None, **options: Any) -> Sweep:
        """`loss.backward(...)`: it accumulates. Raises GraphError for a loss that has no gradients."""
        inputs = options.pop("inputs", None)
        sweep = self.sweep(state, gradient, **options)
        if inputs is not None:
            given = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
            sweep.inputs = frozenset([self._key_of(one) for one in given])
        self._sweeps.append(sweep)
        return sweep

    def sweep(self, state: State, gradient: Any = None, *, create_graph: bool = False) -> Sweep:
        """A backward that nothing accumulates."""
        where, recording = user_line(), self._recording
        check_allowed(recording, create_graph, where)
        loss = recording.own_node(state, where)
        found = recording.session.shape_of(loss)
        seed = None if gradient is None else recording.operand(gradient, where)
        if seed is not None and not isinstance(seed, Ref):
            told = f"gradient is a tensor of the loss's shape {list(found.shape)}, not a {type(gradient).__name__}"
            raise GraphError(told, where=where)
        check_loss(found, None if seed is None else recording.session.shape_of(seed.node), where)
        made = Sweep(recording.add(Backward(loss=Ref(loss), gradient=seed, where=where)), where)
        self._is_used = True
        return made

    def of(self, state: State) -> State | None:
        """`value.grad`. Raises GraphError when it has none; None where the user has set it to None."""
        where = user_line()
        check_value(self._recording, state, where)
        if self._blocks:
            found = self._of_sweep(state, self._blocks[-1], where)
            if found is None:
                raise GraphError(self._why_not(self._blocks[-1]), where=where)
            return found
        key = self._key(state)
        own = self._own.get(key)
        terms = [own.value] if own is not None and own.value is not None else []
        for sweep in self._sweeps[own.num_sweeps if own is not None else 0 :]:
            is_asked = sweep.inputs is None or key in sweep.inputs
            if is_asked and (found := self._of_sweep(state, sweep, where)) is not None:
                terms.append(found)
        if own is not None and (not terms or terms == [own.value]):
            return own.value
        if not terms:
            raise GraphError(self._why_not(self._sweeps[-1] if self._sweeps else None), where=where)
        total, count = self._sum(terms, where), len(self._sweeps)
        total.storage.gradient = GradPlace(note=lambda: self._own.update({key: _Given(total, count)}))
        return total

    def assign(self, state: State, value: Any) -> None:
        """`value.grad = new`."""
        where, key = user_line(), self._key(state)
        check_value(self._recording, state, where)
        sweep = self._blocks[-1] if self._blocks else None
        if value is None:
            if sweep is not None:
                told = "inside of a backward's block a gradient is a value: write value.grad[...] = 0 to stop it there"
                raise GraphError(told, where=where)
            self._own[key] = _Given(None, len(self._sweeps))
            return
        targets = self._found(state, sweep) if sweep is not None else None
        if sweep is not None and targets is None:
            raise GraphError(self._why_not(sweep), where=where)
        if is_recorded(value) and self._is_same(state_of(value), key, sweep, targets):
            return  # `value.grad *= 2` is get, imul, set: the imul has changed it, and the set hands it back
        operand = self._recording.operand(value, where)
        if not isinstance(operand, Ref):
            told = (
                f"a gradient is a tensor of the value's shape, not a {type(value).__name__}: write value.grad[...] = "
            )
            raise GraphError(told + "number to fill it with one", where=where)
        new = self._recording.fresh(operand.node, where)
        if sweep is None or targets is None:
            new.storage.gradient = GradPlace()
            self._own[key] = _Given(new, len(self._sweeps))
            return
        new.storage.gradient = GradPlace(targets, sweep.node)
        sweep.held[_nodes_of(targets)] = new
        self.write(new.storage.gradient, operand.node, where)

    def in_sweep(self, given: Any, sweep: Sweep) -> State | None:
        """`torch.autograd.grad`: the gradient of one backward with regard to a value or a tensor; None: it has none."""
        where = user_line()
        if is_recorded(given):
            check_value(self._recording, state_of(given), where)
            found = self._of_sweep(state_of(given), sweep, where)
            return None if found is None else self._sum([found], where)
        leaf = self.leaves.of(given)
        if leaf is None:
            raise GraphError(
                "gradients are with regard to values of this trace, and to tensors with requires_grad=True that it "
                "uses; this one is neither",
                where=where,
            )
        return self._sum_of(leaf, [sweep])

    def begin(self, sweep: Sweep) -> None:
        """`with loss.backward():` begins."""
        if self._recording.closed is not None:
            raise GraphError(self._recording.closed, where=user_line())
        self._blocks.append(sweep)

    def end(self) -> None:
        """It ends."""
        self._blocks.pop()

    # what the recording calls

    def write(self, place: GradPlace, node: NodeId, where: str) -> None:
        """A gradient is another from here on backwards, if it is one of a block."""
        if place.backward is None:
            if place.note is not None:
                place.note()
            return
        peeks = self._recording.peeks
        if peeks is not None and peeks.has_seen(place.backward):
            told = "a gradient of this backward was looked at, and this change would make it another: change it before"
            raise GraphError(told, where=where)
        if len(place.targets) > 1 and self._is_of_backward(node, place.backward):
            raise GraphError(
                "this is the gradient of several prompts as one view, and what one's becomes may not depend on the "
                "others': change it in the invoke of each, or give a tensor (`value.grad = new`)",
                where=where,
            )
        for target in place.targets:
            value = node
            if target.index is not None:
                value = self._recording.add(Op(name="getitem", args=(Ref(node), target.index), where=where))
            made = GradWrite(of=Ref(target.node), backward=Ref(place.backward), value=Ref(value), where=where)
            self._writes[target.node, place.backward] = self._recording.add(made)

    @property
    def writes(self) -> Iterable[NodeId]:
        """Changes of gradients, without those that another has followed."""
        return self._writes.values()

    def check_used(self, live: Sequence[bool]) -> None:
        """GraphError for a change of a gradient that no gradient that is used depends on."""
        for node in self._writes.values():
            if not live[node]:
                raise GraphError(
                    "this change of a gradient reaches nothing: no gradient of that backward is saved or used",
                    where=self._recording.nodes[node].where,
                )

    def land(self) -> None:
        """Saves the gradients that tensors of the user's are to have."""
        self.leaves.land(len(self._sweeps), lambda leaf, first: self._sum_of(leaf, self._sweeps[first:]))

    def as_shapes(self, nodes: list[Node]) -> Sequence[Node]:
        """The nodes for a question about shapes: a gradient is like what it is of."""
        return AsShapes(nodes) if self._is_used else nodes

    def _sum_of(self, leaf: Leaf, sweeps: Sequence[Sweep]) -> State | None:
        """The gradient of some backwards with regard to a tensor of the user's; None: they do not depend on it."""
        terms: list[State] = []
        for sweep in sweeps:
            if sweep.inputs is None or id(leaf.tensor) in sweep.inputs:
                used = [node for node in leaf.nodes if node in self._lineage(sweep).nodes]
                terms += [self._recording.fresh(self._now(node, sweep, sweep.where), sweep.where) for node in used]
        return self._sum(terms, terms[0].where) if terms else None

    # which nodes

    def _found(self, state: State, sweep: Sweep) -> tuple[Target, ...] | None:
        """What the gradient of a value is of in a backward; None where the loss does not depend on it."""
        place = state.storage.place
        if isinstance(place, GroupPlace) and not state.steps and not state.storage.version:
            whole = self._recording.nodes[state.node]
            dims = self._recording.groups.token_dims(place.site)
            parts = zip(operands(whole), place.parts, strict=True)
            targets = [Target(self._first(node, part.place), part.index(dims)) for node, part in parts]
        else:
            targets = [Target(self._node(state, sweep))]
        lineage = self._lineage(sweep)
        is_found = any(self.lineages.has(lineage, target.node) for target in targets)
        return tuple(targets) if is_found else None

    def _node(self, state: State, sweep: Sweep) -> NodeId:
        """The node that a value was when a backward came, which in-place code may have changed since."""
        storage = state.storage
        if state.steps:
            return self._recording.node_of(state)
        if isinstance(storage.place, Place):  # a site's writes act where they stand in the model, not in the program
            return self._first(storage.node, storage.place, storage.writes_seen)
        earlier = [node for node in (*storage.past, storage.node) if node < sweep.node]
        return earlier[-1] if earlier else [*storage.past, storage.node][0]

    def _first(self, node: NodeId, place: Place, writes: int | None = None) -> NodeId:
        """Where a site was read several times with nothing written between, the first read has all of the gradient."""
        if not isinstance(self._recording.nodes[node], Read):
            return node
        if writes is None:  # as many as there were when it was read
            return max((first for first in place.firsts.values() if first <= node), default=node)
        return place.firsts.get(writes, node)

    def _is_of_backward(self, node: NodeId, backward: NodeId) -> bool:
        """Whether a value is made of gradients of a backward."""
        nodes = self._recording.nodes
        made = [nodes[part] for part in cone(self.as_shapes(nodes), node)]
        return any(isinstance(one, Grad) and one.backward.node == backward for one in made)

    def _lineage(self, sweep: Sweep) -> Lineage:
        backward = self._recording.nodes[sweep.node]
        assert isinstance(backward, Backward)
        return self.lineages.of(backward.loss.node)

    def _why_not(self, sweep: Sweep | None) -> str:
        return NONE_YET if sweep is None else why_not(sweep.where, self._lineage(sweep))

    def _key(self, state: State) -> Hashable:
        """What tells one tensor from another, as torch sees them."""
        storage, place = state.storage, state.storage.place
        if state.steps:
            return state
        if isinstance(place, Place):
            return self._first(storage.node, place, storage.writes_seen)
        if isinstance(place, GroupPlace) and not storage.version:
            return (place, storage.writes_seen)
        is_brought = not storage.version and isinstance(self._recording.nodes[storage.node], Constant)
        return self._keys.setdefault(storage, storage.node if is_brought else storage)

    def _is_same(self, value: State, key: Hashable, sweep: Sweep | None, targets: tuple[Target, ...] | None) -> bool:
        """Whether a value is what a gradient is already."""
        if sweep is not None and targets is not None:
            held = sweep.held.get(_nodes_of(targets))
        else:
            own = self._own.get(key)
            held = None if own is None else own.value
        return held is not None and value.storage is held.storage and not value.steps

    def _key_of(self, given: Any) -> Hashable:
        return self._key(state_of(given)) if is_recorded(given) else id(given)

    # values

    def _of_sweep(self, state: State, sweep: Sweep, where: str) -> State | None:
        """The gradient of one backward, one value however often it is asked for; None: there is none."""
        targets = self._found(state, sweep)
        if targets is None:
            return None
        nodes = _nodes_of(targets)
        if nodes not in sweep.held:
            sweep.held[nodes] = self._given(state, targets, sweep, where)
        return sweep.held[nodes]

    def _given(self, state: State, targets: tuple[Target, ...], sweep: Sweep, where: str) -> State:
        """The gradient as a value; in-place code on it is a change of the backward's."""
        recording, place = self._recording, state.storage.place
        grads = [self._now(target.node, sweep, where) for target in targets]
        node = grads[0]
        if isinstance(place, GroupPlace) and len(grads) > 1:
            node = recording.groups.left_pad(grads, place.invoke, recording.groups.token_dims(place.site), where)
        made = recording.fresh(node, where)
        made.dims = state.dims
        made.storage.gradient = GradPlace(targets, sweep.node)
        return made

    def _now(self, of: NodeId, sweep: Sweep, where: str) -> NodeId:
        """The gradient of a node, or what a block has made of it."""
        key = (of, sweep.node)
        if key in self._writes:
            change = self._recording.nodes[self._writes[key]]
            assert isinstance(change, GradWrite)
            return change.value.node
        if key not in self._grads:
            self._grads[key] = self._recording.add(Grad(of=Ref(of), backward=Ref(sweep.node), where=where))
        return self._grads[key]

    def _sum(self, terms: Sequence[State], where: str) -> State:
        """A value of its own, which in-place code may change as it likes."""
        node = self._recording.node_of(terms[0])
        for term in terms[1:]:
            args = (Ref(node), Ref(self._recording.node_of(term)))
            node = self._recording.add(Op(name="add", args=args, where=where))
        total = self._recording.fresh(node, where)
        total.dims = terms[0].dims
        total.storage.gradient = GradPlace()
        return total


def _nodes_of(targets: Sequence[Target]) -> tuple[NodeId, ...]:
    return tuple([target.node for target in targets])
