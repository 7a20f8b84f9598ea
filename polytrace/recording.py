"""A program while it is written: nodes and constants in the order the user wrote them, and what of them is sent.

Knows nothing of torch (`polytrace.tensor_values`) and nothing of modules (`polytrace.modules`). What in-place code
means is `polytrace.in_place`'s, what follows from nodes alone `polytrace.node_facts`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from polytrace.certificate import ValueShape
from polytrace.closings import Closings
from polytrace.constants import Constants, requires_gradients
from polytrace.description import ModelDescription, PassLayout
from polytrace.edit_steps import encoder_nodes, steps_of_edit
from polytrace.errors import GraphError
from polytrace.gradients import Gradients
from polytrace.grammar import nearest, returns_several, unknown_op
from polytrace.graph import (
    Call,
    Constant,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    Parameter,
    Read,
    Ref,
    Save,
    Site,
    Write,
    refs,
)
from polytrace.graph import operands as node_operands
from polytrace.group_views import GroupViews
from polytrace.in_place import InPlace
from polytrace.lines import user_line
from polytrace.literals import is_basic
from polytrace.loops import OF_ALL_PROMPTS, Loops
from polytrace.merging import merged
from polytrace.node_facts import NodeFacts
from polytrace.operands import operand_of
from polytrace.ops import OPS
from polytrace.peeking import Peeks
from polytrace.positions import with_positions
from polytrace.pruning import cone, moved, renumber, with_grad_writes
from polytrace.step_saves import SaveNames
from polytrace.storage import Place, Several, State, Step, Storage, is_recorded, state_of
from polytrace.tensors import RawTensor
from polytrace.timing import FIRST, When

if TYPE_CHECKING:
    from polytrace.keeping import Leaving


class Session(Protocol):
    """What values ask of the trace that they belong to."""

    def wrap(self, state: State) -> Any:
        """The Python object for a value."""

    def shape_of(self, node: NodeId) -> ValueShape:
        """Shape and dtype of a node's value."""

    def lengths_of(self, invoke: int) -> tuple[int, ...] | None:
        """Tokens of each prompt of an invoke, or of a group's members one after another; None when the prompts are
        those of later traces.
        """

    def members_of(self, invoke: int) -> Sequence[int]:
        """The invoke itself; of a group, whose number is below 0, those that it is made of."""

    def num_steps(self, invoke: int) -> int:
        """Steps that an invoke may have: 1, or as many as it has new tokens."""

    @property
    def told(self) -> str:
        """Why a value has no data yet."""

    def num_columns(self, site: Site) -> int | None:
        """Of a site's view, where that does not depend on the prompts."""

    def row_dim(self, site: Site) -> int:
        """The dimension of a site's view that its tokens are in."""

    @property
    def hint(self) -> str:
        """How it could have some: the end of a refusal."""


class Recording:
    """The nodes of one trace, in the order the user wrote them."""

    is_edit = False  # it has nothing to give back: its writes are what it is for

    def __init__(self, description: ModelDescription, session: Session) -> None:
        self.description = description
        self.session = session
        self.nodes: list[Node] = []
        self.constants = Constants()
        self.saved: list[tuple[State, Any, str]] = []  # with the Python object and the line of its `.save()`
        self.saved_steps: tuple[
            When | None, ...
        ] = ()  # of each, once the block has ended; None: it is of no step alone
        self.logged: list[State] = []  # of these, those that are told while the request runs
        self.leaving: list[Leaving] = []  # what stays on the service when the trace has ended
        self.goes_on = False  # it gives new tokens back, whatever is saved
        self.closed: str | None = None  # why its values cannot be used any more
        self.over: set[int] = set()  # invokes whose trace has ended: in-place code does not reach the model
        self.peeks: Peeks | None = None  # where values may be looked at while they are recorded
        self.labels: dict[str, None] = {}  # of edits that its invokes started from
        self.keeps_shapes = False  # also when it is closed: it was scanned
        self.closings = Closings(description)  # sites behind a stop, or inside of skipped modules
        self._shared: dict[tuple[type, str | int], NodeId] = {}  # constants, parameters and masks, each once
        self.loops = Loops(self)
        self.facts = NodeFacts(self)
        self.groups = GroupViews(self)
        self.gradients = Gradients(self)
        self.in_place = InPlace(self)

    # what a graph begins with

    def read(self, site: Site, invoke: int, dtype: str, where: str | None = None) -> State:
        """A fresh snapshot of a site."""
        where = where or user_line()
        if invoke < 0:
            self.when(site, invoke, where)
            return self.groups.read(site, invoke, dtype, where)
        when = self.when(site, invoke, where) if self.loops.are_used else FIRST
        self.closings.use(site, invoke, "read", where, when)
        node = self.add(Read(site=site, invoke=invoke, where=where, step=when.step, num_steps=when.num_steps))
        self.facts.dtypes.known[node] = dtype
        state = self.fresh(node, where)
        state.storage.place = place = self.in_place.place(site, invoke)
        state.storage.writes_seen = place.writes
        if isinstance(place, Place):
            place.firsts.setdefault(place.writes, node)
        return state

    def when(self, site: Site | None, invoke: int, where: str) -> When:
        """The steps at which a site of an invoke is used here. Raises GraphError where it has no such step."""
        when = self.loops.position.of(site)
        if when == FIRST:
            return when
        if invoke < 0:
            raise GraphError(OF_ALL_PROMPTS, where=where)
        limit = self.session.num_steps(invoke)
        if when.last >= limit:
            new = f"at most {limit} tokens are new" if limit > 1 else "this prompt does not go on"
            raise GraphError(f"there is no step {when.last} here: {new}, so steps are 0-{limit - 1}", where=where)
        if site is not None and site.port.has_earlier and when.last > 0:
            self._check_earlier(site, when, where)
        return when

    def _check_earlier(self, site: Site, when: When, where: str) -> None:
        """What has keys or values of all positions so far has another number of them at each step."""
        if when.is_loop:
            raise GraphError(
                f"{site} has another number of keys at each step: write `for step in tracer.iter[...]`, whose body is "
                "recorded for each step",
                where=where,
            )
        if self.description.layout is not PassLayout.PACKED:
            raise GraphError(f"{site} is there at step 0 alone in this model: edit `q`, `k`, `v` or `z`", where=where)

    def mask(self, invoke: int, where: str | None = None) -> State:
        """Where the invoke's view has tokens: behind step 0 everywhere."""
        where = where or user_line()
        if invoke < 0:
            masks = [self.mask(member).node for member in self.session.members_of(invoke)]
            return self.fresh(self.groups.left_pad(masks, invoke, (1,), where), where)
        when = self.when(None, invoke, where)
        if when.step == 0 and when.is_loop:
            raise GraphError(
                "this body is recorded once for step 0, whose mask is that of the prompts, and for later ones of one "
                "token each: write `for step in tracer.iter[...]`",
                where=where,
            )
        if when.step > 0:
            shape = (len(self.groups.lengths_of(invoke)), 1)
            return self.fresh(self.own_constant("bool", shape, bytes([True] * shape[0]), where), where)
        return self.fresh(self.once(Mask(invoke=invoke, where=where), invoke), where)

    def parameter(self, path: str) -> State:
        """A parameter or buffer of the model."""
        where = user_line()
        return self.fresh(self.once(Parameter(path=path, where=where), path), where)

    def own_constant(self, dtype: str, shape: tuple[int, ...], data: bytes, where: str) -> NodeId:
        """A tensor that the language itself needs."""
        name = self.constants.take(RawTensor(dtype=dtype, shape=shape, data=memoryview(data)))
        return self.once(Constant(name=name, where=where), name)

    def constant(self, value: Any) -> State:
        """A tensor of the user's own, or what the service has kept."""
        where = user_line()
        operand = self.operand(value, where)
        if not isinstance(operand, Ref):
            raise GraphError(f"a {type(value).__name__} is no tensor", where=where)
        return self.fresh(operand.node, where)

    def brought(self, value: Any) -> State:
        """The same as a value of its own: another of the same content has other gradients."""
        state = self.constant(value)
        node = self.nodes[state.node]
        if requires_gradients(value):
            return state
        return self.fresh(self.add(node), state.where)

    # computing

    def call(self, module: str, args: Sequence[Any]) -> State:
        """A module of the model called on values."""
        where = user_line()
        operands = tuple([self.operand(arg, where) for arg in args])
        return self.fresh(self.add(Call(module=module, args=operands, where=where)), where)

    def op(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], count: int = 2) -> State | Several:
        """A call of the op table on values as the user wrote them. `count`: members of an op that returns several."""
        where = user_line()
        self.check_kwargs(name, kwargs, where)
        operands = tuple([self.operand(arg, where) for arg in args])
        named = {key: self.operand(value, where) for key, value in kwargs.items()}
        if OPS[name].is_random:
            # what each draws does not depend on which nodes are left of the others
            named.setdefault("draw", self.loops.draw(refs((*operands, *named.values())), where))
        call = Op(name=name, args=operands, kwargs=named, where=where)
        node = self.groups.taken_of_members(call) or self.add(call)
        way: tuple[Step, ...] = ()
        base = state_of(args[0]) if OPS[name].is_view and args and is_recorded(args[0]) else None
        if base is not None and (name != "getitem" or is_basic(operands[1])):
            way = (Step(name, operands[1:], tuple(named.items())),)
        if not returns_several(call):
            return self._view(base, way, node, where) if base and way else self.fresh(node, where)
        items = []
        for position in range(count):
            item = self.add(Op(name="item", args=(Ref(node), position), where=where))
            if base and way:
                items.append(self._view(base, (*way, Step("item", (position,))), item, where))
            else:
                items.append(self.fresh(item, where))
        return Several(name, tuple(items))

    def at(self, base: State, index: Any) -> State:
        """Rows by their place in each prompt: a view to in-place code, also where the index is lists."""
        where = user_line()
        operand = self.operand(index, where)
        node = self.add(Op(name="getitem", args=(Ref(self.own_node(base, where)), operand), where=where))
        return self._view(base, (Step("getitem", (operand,), (), is_basic(operand)),), node, where)

    def alias(self, base: State) -> State:
        """Another name for the same value."""
        return self._view(base, (), self.node_of(base), base.where)

    def data(self, base: State) -> State:
        """The same numbers without gradients: in-place code on the value reaches them, none on them is recorded."""
        where = user_line()
        node = self.add(Op(name="detach", args=(Ref(self.own_node(base, where)),), where=where))
        return self._view(base, (Step("detach", ()),), node, where)

    # writing

    def write_edge(self, site: Site, invoke: int, value: Any, *, in_place: bool = False) -> None:
        """`site = value`; `in_place`: for everyone in the model who holds the tensor."""
        where = user_line()
        when = self.when(site, invoke, where) if self.loops.are_used else FIRST
        for member in self.session.members_of(invoke):
            self.closings.use(site, member, "written", where, when)
        place = self.in_place.place(site, invoke)
        self.in_place.check_branch(True, where)
        if is_recorded(value) and not state_of(value).steps and state_of(value).storage is place.writer:
            return  # `site += v` is get, iadd, set: the iadd has written, and the set only hands the same value back
        operand = self.operand(value, where)
        if not isinstance(operand, Ref):
            words = "write the tensor alone" if isinstance(value, (tuple, list, str)) or value is None else None
            raise GraphError(
                f"{site} takes a tensor of its own shape, not a {type(value).__name__}; "
                + (words or "write `site[...] = value` to fill it with one value"),
                where=where,
            )
        self.in_place.hand_back(place, operand.node, in_place=in_place, where=where)
        self.in_place.note(place, where, None)

    def set_item(self, base: State, index: Any, value: Any) -> None:
        """`base[index] = value`; the index Ellipsis is the whole value."""
        where = user_line()
        operand = self.operand(index, where)
        way = base.steps
        if not (way and operand is Ellipsis):
            way = (*way, Step("getitem", (operand,), (), is_basic(operand)))
        if is_recorded(value) and state_of(value).storage is base.storage and state_of(value).steps == way:
            return  # `h[i] += v` is getitem, iadd, setitem: the iadd has changed the place, and this hands it back
        self.in_place.edit(base.storage, way, self.operand(value, where), where)

    def replace(self, state: State, computed: State) -> None:
        """In-place code gave a value its new content; its shape and dtype stay."""
        where = user_line()
        old, new = self.node_of(state), self.node_of(computed)
        if state.steps:
            self.in_place.edit(state.storage, state.steps, Ref(new), where)
            return
        self.in_place.check_fresh(state.storage, where)
        dtype = self.facts.dtypes.of(old)
        self.in_place.check_kind(dtype, new, where)
        if state.storage.place is None or dtype is None or dtype != self.facts.dtypes.of(new):
            new = self.add(Op(name="setitem", args=(Ref(old), Ellipsis, Ref(new)), where=where))
        self.in_place.new_root(state.storage, new, where)

    def save(self, state: State, value: Any, *, is_member: bool = False) -> None:
        """Marks a value to be returned; in-place code after this still changes it, as it would a tensor.

        `is_member`: of a container, where each is meant for itself.
        """
        self.node_of(state)
        if not state.is_saved:
            state.is_saved = True
            state.is_member = is_member
            state.saved_at = self.loops.position.when if self.loops.position.loop is not None else None
            self.saved.append((state, value, user_line()))

    def snapshot(self, state: State) -> State:
        """The value as it is now, whatever in-place code does to it later."""
        return self.fresh(self.node_of(state), user_line())

    def log(self, state: State, value: Any) -> None:
        """Saves a value that is told as soon as it is there."""
        self.save(state, value)
        self.logged.append(state)

    def branch(self) -> AbstractContextManager[None]:
        """The body of one side of a choice: it may change what it made itself, and nothing else."""
        return self.in_place.branch()

    def replay(
        self, nodes: Sequence[Node], constants: Mapping[str, RawTensor], invoke: int, lengths: Sequence[int]
    ) -> None:
        """Adds an edit's nodes, which were recorded for nobody's prompts yet, for the prompts of an invoke.

        Where the invoke goes on they act at every step, unless they name places in the prompt.
        """
        position = self.loops.position
        num_steps = self.session.num_steps(invoke)
        encoder = encoder_nodes(nodes, self.description) if num_steps > 1 else frozenset()
        known: dict[NodeId, NodeId] = {}
        for when, own in steps_of_edit(nodes, lengths, num_steps, encoder):
            position.when = when
            self.loops.are_used |= when != FIRST
            places = self._replay(nodes, constants, invoke, own, when, known)
            known = {node: places[node] for node in encoder}
        position.when = FIRST

    def _replay(
        self,
        nodes: Sequence[Node],
        constants: Mapping[str, RawTensor],
        invoke: int,
        lengths: Sequence[int],
        when: When,
        known: Mapping[NodeId, NodeId],
    ) -> dict[NodeId, NodeId]:
        """`known`: nodes that stand in the graph already, and where. Returns where all of them do."""
        places = dict(known)
        for position, node in enumerate(nodes):
            if position in known:
                continue
            made = with_positions(moved(node, places), lengths)
            if isinstance(made, Constant):
                name = self.constants.take(constants[made.name])
                place = self.once(Constant(name=name, where=made.where), name)
            elif isinstance(made, Parameter):
                place = self.once(made, made.path)
            elif isinstance(made, Mask):
                place = self.mask(invoke, made.where).node
            elif isinstance(made, Op) and OPS[made.name].is_random:
                place = self.add(
                    replace(made, kwargs={**made.kwargs, "draw": self.loops.draw(node_operands(made), made.where)})
                )
            elif isinstance(made, (Read, Write)):
                place = self.add(replace(made, invoke=invoke, step=when.step, num_steps=when.num_steps))
            else:
                place = self.add(made)
            if isinstance(made, Write):
                self.in_place.note(self.in_place.place(made.site, invoke), made.where, None)
            places[NodeId(position)] = place
        return places

    # finishing

    @property
    def has_looked_only(self) -> bool:
        """Whether all that was wanted of it has been seen (`peek=True`): it has nothing to give back."""
        gives = self.saved or self.leaving or self.gradients.leaves
        return self.peeks is not None and bool(self.peeks.receipts) and not gives

    def finish(self) -> tuple[tuple[Node, ...], tuple[str, ...]]:
        """The graph without what nothing needs, and for each of `saved` the name that its value comes back under.

        Raises GraphError when nothing is saved, or when in-place code changed a value that nothing uses.
        """
        self.gradients.land()
        if not self.saved and not self.leaving and not self.is_edit and not self.goes_on:
            raise GraphError(
                "this trace saves nothing, so it would return nothing: call .save() on the values to keep",
                where=user_line(),
            )
        self.constants.check()
        targets = [self.node_of(state) for state, _, _ in self.saved]
        logged = {self.node_of(state) for state in self.logged}
        kept = [self.loops.used(self.node_of(left.state), left.where) for left in self.leaving]
        nodes, given, self.saved_steps = SaveNames(self).saves(targets, logged)
        for left, value in zip(self.leaving, kept, strict=True):
            nodes.append(Save(name=left.keep.save, value=Ref(value), where=left.where))
        live = with_grad_writes(nodes, self.gradients.writes)
        self.in_place.check_used(live)
        self.gradients.check_used(live)
        wanted = (NodeId(position) for position, is_live in enumerate(live) if is_live)
        own, places = renumber(nodes, wanted)
        return self.gradients.detaching.nodes(merged(own, self.loops.bodies(own, places)), places), given

    def part(self, node: NodeId) -> tuple[tuple[Node, ...], dict[NodeId, NodeId]]:
        """A graph that saves one node's value, and the places in it of the nodes that it has."""
        plain = self.gradients.as_shapes(self.nodes)
        nodes, places = renumber(plain, cone(plain, node))
        return (*nodes, Save(name="0", value=Ref(places[node]), where=self.nodes[node].where)), places

    # operands

    def operand(self, value: Any, where: str) -> Operand:
        """The operand that a Python value is."""
        return operand_of(self, value, where)

    def node_of(self, state: State) -> NodeId:
        """The node of a value as it is now: in-place code may have changed its storage since it was made."""
        if state.gone is not None:
            raise GraphError(state.gone, where=user_line())
        if self.closed is not None:
            raise GraphError(f"{self.closed}; it was made at {state.where}", where=user_line())
        if state.version != state.storage.version:
            node = state.storage.node
            for step in state.steps:
                node = self.in_place.apply(node, step, state.where)
            state.node, state.version = node, state.storage.version
        return state.node

    def check_kwargs(self, name: str, kwargs: Iterable[str], where: str) -> None:
        """Raises GraphError for an op or a keyword argument that the table does not have."""
        if name not in OPS:
            raise unknown_op(name, where)
        for key in kwargs:
            if key not in OPS[name].kwargs:
                raise GraphError(f"{name} takes no argument {key!r} here{nearest(key, OPS[name].kwargs)}", where=where)

    def invoke_of(self, state: State) -> int | None:
        """The invoke whose rows a value has; None when they are nobody's, or several's."""
        place = state.storage.place
        return place.invoke if place is not None else self.facts.invokes.of(state.node)

    def lengths_of(self, state: State, invoke: int) -> tuple[int, ...] | None:
        """Tokens of each prompt as a value of this invoke has them; None when the prompts are those of later traces."""
        if self.description.layout is PassLayout.WHOLE:
            told = "is called with arguments, not with prompts: index the dimension that you mean"
            raise GraphError(f"{self.description.class_name} {told}", where=user_line())
        lengths = self.session.lengths_of(invoke)
        if lengths is None or not self.loops.are_used:
            return lengths
        when = self.facts.times.of(self.node_of(state))
        if when.is_loop and when.step == 0 and max(lengths) > 1:
            raise GraphError(
                "this body is recorded once for step 0, the prompts, and for later ones of one token each, so "
                "positions are not the same at each: write value[:, -1], or `for step in tracer.iter[...]`",
                where=user_line(),
            )
        place = state.storage.place
        if place is not None and place.site.port.is_attended:
            return tuple([length + when.step for length in lengths])
        return (1,) * len(lengths) if when.step > 0 else lengths

    def is_of_pairs(self, state: State) -> bool:
        """Whether a value is made of scores, patterns or others whose tokens are in other dimensions than elsewhere."""
        place = state.storage.place
        return self.facts.is_site_of_pairs(place.site) if place is not None else self.facts.pairs.of(state.node)

    # nodes

    def _view(self, base: State, way: tuple[Step, ...], node: NodeId, where: str) -> State:
        return State(self, base.storage, base.steps + way, node, base.storage.version, where)

    def fresh(self, node: NodeId, where: str) -> State:
        return State(self, Storage(node), (), node, 0, where)

    def own_node(self, state: State, where: str, *, is_member: bool = False) -> NodeId:
        """The node of a value as code here means it; `is_member`: of a list."""
        if state.recording is not self:
            raise GraphError(
                state.recording.closed or "this value belongs to another trace: save it there first", where=where
            )
        return self.loops.used(self.node_of(state), where, is_member=is_member)

    def once(self, node: Node, key: str | int) -> NodeId:
        if (type(node), key) not in self._shared:
            self._shared[type(node), key] = self.add(node)
        return self._shared[type(node), key]

    def add(self, node: Node) -> NodeId:
        if self.closed is not None:
            raise GraphError(self.closed, where=node.where)
        if self.peeks is not None and isinstance(node, Write):
            self.peeks.note(NodeId(len(self.nodes)), node)
        self.nodes.append(node)
        place = NodeId(len(self.nodes) - 1)
        self.gradients.detaching.note(place)
        if self.loops.are_used:
            self.facts.times.of(place)  # raises where its values cannot meet
        return place
