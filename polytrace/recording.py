"""A program while it is written: nodes, constants, and what in-place code means for them.

Owns the rules that turn Python's mutable tensors into functional nodes. Knows nothing of torch
(`polytrace.tensor_values`) and nothing of modules (`polytrace.modules`).

In-place code makes a new root node of its storage and raises the storage's version; values that share the storage
follow when they are used next. A storage that was read from a site hands every new root back to the model by a `Write`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from polytrace.certificate import ValueShape
from polytrace.closings import Closings
from polytrace.constants import Constants
from polytrace.derived import Derived
from polytrace.description import ModelDescription
from polytrace.errors import GraphError
from polytrace.grammar import nearest, returns_several, unknown_op
from polytrace.graph import (
    LOG,
    Call,
    Constant,
    DType,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    Parameter,
    Port,
    Read,
    Ref,
    Save,
    Site,
    Write,
    refs,
)
from polytrace.graph import operands as node_operands
from polytrace.groups import GroupPlace, index_from_the_end, parts_of
from polytrace.lines import user_line
from polytrace.literals import dtype_name, is_basic, scalar
from polytrace.ops import OPS
from polytrace.peeking import Peeks
from polytrace.positions import with_positions
from polytrace.pruning import cone, effects, moved, needed, renumber
from polytrace.storage import Place, Several, State, Step, Storage, is_recorded, state_of
from polytrace.tensors import VALUE_DTYPES, RawTensor

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

    @property
    def told(self) -> str:
        """Why a value has no data yet."""

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
        self.logged: list[State] = []  # of these, those that are told while the request runs
        self.leaving: list[Leaving] = []  # what stays on the service when the trace has ended
        self.closed: str | None = None  # why its values cannot be used any more
        self.over: set[int] = set()  # invokes whose trace has ended: in-place code does not reach the model
        self.peeks: Peeks | None = None  # where values may be looked at while they are recorded
        self.labels: dict[str, None] = {}  # of edits that its invokes started from
        self._draws = 0  # by random ops so far: what each draws does not depend on which nodes are left of the others
        self.keeps_shapes = False  # also when it is closed: it was scanned
        self.closings = Closings(description)  # sites behind a stop, or inside of skipped modules
        self._shared: dict[tuple[type, str | int], NodeId] = {}  # constants, parameters and masks, each once
        self._places: dict[tuple[Site, int], Place] = {}
        self._groups: dict[tuple[Site, int], GroupPlace] = {}
        self._edited: list[Storage] = []  # those without a place
        self._dtypes = Derived(self._dtype_parts, self._find_dtype)  # as far as the nodes tell
        self._invokes = Derived(self._row_parts, self._find_invoke)  # whose rows it has, if one's
        self._branch: int | None = None  # nodes before the body of a choice that is being recorded
        self._pairs = Derived(self._operation_parts, self._find_pairs)  # whether it is made of scores or patterns

    # what a graph begins with

    def read(self, site: Site, invoke: int, dtype: str, where: str | None = None) -> State:
        """A fresh snapshot of a site."""
        where = where or user_line()
        if invoke < 0:
            return self._read_group(site, invoke, dtype, where)
        self.closings.use(site, invoke, "read", where)
        node = self._add(Read(site=site, invoke=invoke, where=where))
        self._dtypes.known[node] = dtype
        state = self._fresh(node, where)
        state.storage.place = place = self._place(site, invoke)
        state.storage.writes_seen = place.writes
        return state

    def mask(self, invoke: int) -> State:
        """Where the invoke's view has tokens."""
        where = user_line()
        if invoke < 0:
            masks = [self.mask(member).node for member in self.session.members_of(invoke)]
            return self._fresh(self._left_pad(masks, invoke, (1,), where), where)
        return self._fresh(self._once(Mask(invoke=invoke, where=where), invoke), where)

    def parameter(self, path: str) -> State:
        """A parameter or buffer of the model."""
        where = user_line()
        return self._fresh(self._once(Parameter(path=path, where=where), path), where)

    def constant(self, value: Any) -> State:
        """A tensor of the user's own, or what the service has kept."""
        where = user_line()
        operand = self.operand(value, where)
        if not isinstance(operand, Ref):
            raise GraphError(f"a {type(value).__name__} is no tensor", where=where)
        return self._fresh(operand.node, where)

    # computing

    def call(self, module: str, args: Sequence[Any]) -> State:
        """A module of the model called on values."""
        where = user_line()
        operands = tuple([self.operand(arg, where) for arg in args])
        return self._fresh(self._add(Call(module=module, args=operands, where=where)), where)

    def op(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], count: int = 2) -> State | Several:
        """A call of the op table on values as the user wrote them. `count`: members of an op that returns several."""
        where = user_line()
        self.check_kwargs(name, kwargs, where)
        operands = tuple([self.operand(arg, where) for arg in args])
        named = {key: self.operand(value, where) for key, value in kwargs.items()}
        if OPS[name].is_random:
            named.setdefault("draw", self._draws)
            self._draws += 1
        call = Op(name=name, args=operands, kwargs=named, where=where)
        node = self._of_members(call) or self._add(call)
        way: tuple[Step, ...] = ()
        base = state_of(args[0]) if OPS[name].is_view and args and is_recorded(args[0]) else None
        if base is not None and (name != "getitem" or is_basic(operands[1])):
            way = (Step(name, operands[1:], tuple(named.items())),)
        if not returns_several(call):
            return self._view(base, way, node, where) if base and way else self._fresh(node, where)
        items = []
        for position in range(count):
            item = self._add(Op(name="item", args=(Ref(node), position), where=where))
            if base and way:
                items.append(self._view(base, (*way, Step("item", (position,))), item, where))
            else:
                items.append(self._fresh(item, where))
        return Several(name, tuple(items))

    def at(self, base: State, index: Any) -> State:
        """Rows by their place in each prompt: a view to in-place code, also where the index is lists."""
        where = user_line()
        operand = self.operand(index, where)
        node = self._add(Op(name="getitem", args=(Ref(self.node_of(base)), operand), where=where))
        return self._view(base, (Step("getitem", (operand,), (), is_basic(operand)),), node, where)

    def alias(self, base: State) -> State:
        """Another name for the same value."""
        return self._view(base, (), self.node_of(base), base.where)

    # writing

    def write_edge(self, site: Site, invoke: int, value: Any, *, in_place: bool = False) -> None:
        """`site = value`; `in_place`: for everyone in the model who holds the tensor."""
        where = user_line()
        for member in self.session.members_of(invoke):
            self.closings.use(site, member, "written", where)
        place = self._place(site, invoke)
        self._check_branch(True, where)
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
        self._hand_back(place, operand.node, in_place=in_place, where=where)
        place.note(where, None)

    def set_item(self, base: State, index: Any, value: Any) -> None:
        """`base[index] = value`; the index Ellipsis is the whole value."""
        where = user_line()
        operand = self.operand(index, where)
        way = base.steps
        if not (way and operand is Ellipsis):
            way = (*way, Step("getitem", (operand,), (), is_basic(operand)))
        if is_recorded(value) and state_of(value).storage is base.storage and state_of(value).steps == way:
            return  # `h[i] += v` is getitem, iadd, setitem: the iadd has changed the place, and this hands it back
        self._edit(base.storage, way, self.operand(value, where), where)

    def replace(self, state: State, computed: State) -> None:
        """In-place code gave a value its new content; its shape and dtype stay."""
        where = user_line()
        old, new = self.node_of(state), self.node_of(computed)
        if state.steps:
            self._edit(state.storage, state.steps, Ref(new), where)
            return
        self._check_fresh(state.storage, where)
        dtype = self._dtypes.of(old)
        self._check_kind(dtype, new, where)
        if state.storage.place is None or dtype is None or dtype != self._dtypes.of(new):
            new = self._add(Op(name="setitem", args=(Ref(old), Ellipsis, Ref(new)), where=where))
        self._new_root(state.storage, new, where)

    def save(self, state: State, value: Any) -> None:
        """Marks a value to be returned; in-place code after this still changes it, as it would a tensor."""
        self.node_of(state)
        if not state.is_saved:
            state.is_saved = True
            self.saved.append((state, value, user_line()))

    def snapshot(self, state: State) -> State:
        """The value as it is now, whatever in-place code does to it later."""
        return self._fresh(self.node_of(state), user_line())

    def log(self, state: State, value: Any) -> None:
        """Saves a value that is told as soon as it is there."""
        self.save(state, value)
        self.logged.append(state)

    @contextmanager
    def branch(self) -> Iterator[None]:
        """The body of one side of a choice: it may change what it made itself, and nothing else."""
        outer, self._branch = self._branch, len(self.nodes) if self._branch is None else self._branch
        try:
            yield
        finally:
            self._branch = outer

    def replay(
        self, nodes: Sequence[Node], constants: Mapping[str, RawTensor], invoke: int, lengths: Sequence[int]
    ) -> None:
        """Adds an edit's nodes, which were recorded for nobody's prompts yet, for the prompts of an invoke."""
        places: dict[NodeId, NodeId] = {}
        for position, node in enumerate(nodes):
            made = with_positions(moved(node, places), lengths)
            if isinstance(made, Constant):
                name = self.constants.take(constants[made.name])
                place = self._once(Constant(name=name, where=made.where), name)
            elif isinstance(made, Parameter):
                place = self._once(made, made.path)
            elif isinstance(made, Mask):
                place = self._once(replace(made, invoke=invoke), invoke)
            elif isinstance(made, Op) and OPS[made.name].is_random:
                place = self._add(replace(made, kwargs={**made.kwargs, "draw": self._draws}))
                self._draws += 1
            else:
                place = self._add(replace(made, invoke=invoke) if isinstance(made, (Read, Write)) else made)
            if isinstance(made, Write):
                self._place(made.site, invoke).note(made.where, None)
            places[NodeId(position)] = place

    # finishing

    @property
    def has_looked_only(self) -> bool:
        """Whether all that was wanted of it has been seen (`peek=True`): it has nothing to give back."""
        return self.peeks is not None and bool(self.peeks.receipts) and not self.saved and not self.leaving

    def finish(self) -> tuple[tuple[Node, ...], tuple[str, ...]]:
        """The graph without what nothing needs, and for each of `saved` the name that its value comes back under.

        Raises GraphError when nothing is saved, or when in-place code changed a value that nothing uses.
        """
        if not self.saved and not self.leaving and not self.is_edit:
            raise GraphError(
                "this trace saves nothing, so it would return nothing: call .save() on the values to keep",
                where=user_line(),
            )
        self.constants.check()
        targets = [self.node_of(state) for state, _, _ in self.saved]
        logged = {self.node_of(state) for state in self.logged}
        nodes = list(self.nodes)
        names: dict[NodeId, str] = {}
        for node, (_, _, where) in zip(targets, self.saved, strict=True):
            if node not in names:
                names[node] = f"{LOG if node in logged else ''}{len(names)}"
                nodes.append(Save(name=names[node], value=Ref(node), where=where))
        for left in self.leaving:
            nodes.append(Save(name=left.keep.save, value=Ref(self.node_of(left.state)), where=left.where))
        live = needed(nodes, effects(nodes))
        for storage in self._edited:
            if not any(live[node] for node, _ in storage.edits):
                raise GraphError(_lost(self.nodes, storage.edits[0][0]), where=storage.edits[0][1])
        kept = (NodeId(position) for position, is_live in enumerate(live) if is_live)
        return renumber(nodes, kept)[0], tuple(names[node] for node in targets)

    def part(self, node: NodeId) -> tuple[tuple[Node, ...], dict[NodeId, NodeId]]:
        """A graph that saves one node's value, and the places in it of the nodes that it has."""
        nodes, places = renumber(self.nodes, cone(self.nodes, node))
        return (*nodes, Save(name="0", value=Ref(places[node]), where=self.nodes[node].where)), places

    # operands

    def operand(self, value: Any, where: str) -> Operand:
        """The operand that a Python value is: recorded values become references, tensors and arrays constants."""
        kind = type(value)
        if kind in _PLAIN:
            return value  # type: ignore[no-any-return]
        if kind is int:
            return self._integer(value, where)
        if kind is tuple:
            return tuple([self.operand(part, where) for part in value])
        if kind is slice and value.start is None and value.stop is None and value.step is None:
            return value  # type: ignore[no-any-return]
        if is_recorded(value):
            return Ref(self._own(state_of(value), where))
        if isinstance(value, tuple):
            return tuple([self.operand(part, where) for part in value])
        if isinstance(value, (list, range)):
            return [self.operand(part, where) for part in value]
        if isinstance(value, slice):
            return slice(*[self.operand(part, where) for part in (value.start, value.stop, value.step)])
        if (number := scalar(value)) is not None:
            return self._integer(number, where) if isinstance(number, int) else number
        if (dtype := dtype_name(value)) is not None:
            if dtype not in VALUE_DTYPES:
                raise GraphError(f"polytrace has no dtype {dtype!r}{nearest(dtype, VALUE_DTYPES)}", where=where)
            return DType(dtype)
        name = self.constants.add(value, where)
        return Ref(self._once(Constant(name=name, where=where), name))

    def _integer(self, number: int, where: str) -> int:
        if not -(1 << 63) <= number < 1 << 63:
            raise GraphError(f"{number} does not fit into 64 bits", where=where)
        return number

    def node_of(self, state: State) -> NodeId:
        """The node of a value as it is now: in-place code may have changed its storage since it was made."""
        if self.closed is not None:
            raise GraphError(f"{self.closed}; it was made at {state.where}", where=user_line())
        if state.version != state.storage.version:
            node = state.storage.node
            for step in state.steps:
                node = self._apply(node, step, state.where)
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
        return place.invoke if place is not None else self._invokes.of(state.node)

    def is_of_pairs(self, state: State) -> bool:
        """Whether a value is made of scores, patterns or others whose tokens are in other dimensions than elsewhere."""
        place = state.storage.place
        return self._is_of_pairs(place.site) if place is not None else self._pairs.of(state.node)

    def _is_of_pairs(self, site: Site) -> bool:
        return site.port.is_of_pairs or self.session.row_dim(site) != 1

    # what follows from the nodes alone, without asking anyone

    def _operation_parts(self, position: NodeId) -> Iterable[NodeId]:
        node = self.nodes[position]
        return refs(node.args) if isinstance(node, Op) else ()

    def _find_pairs(self, position: NodeId) -> bool:
        node = self.nodes[position]
        if isinstance(node, Read):
            return self._is_of_pairs(node.site)
        return any(self._pairs.known[part] for part in self._operation_parts(position))

    def _dtype_parts(self, position: NodeId) -> Iterable[NodeId]:
        node = self.nodes[position]
        if not isinstance(node, Op):
            return ()
        if node.name in _KEEPS_DTYPE:
            return refs(node.args[0])
        return refs(node.args) if node.name in _AGREES_ON_DTYPE else ()

    def _find_dtype(self, position: NodeId) -> str | None:
        node = self.nodes[position]
        if isinstance(node, Constant):
            return self.constants.tensors[node.name].dtype
        if isinstance(node, Parameter):
            return self.session.shape_of(position).dtype
        if not isinstance(node, Op) or not isinstance(node.args[0], Ref):
            return None
        if node.name in _MAKES:
            return _MAKES[node.name]
        kinds = {self._dtypes.known[part] for part in self._dtype_parts(position)}
        if node.name in _KEEPS_DTYPE:
            return kinds.pop()
        if node.name in _AGREES_ON_DTYPE:
            is_plain = all(isinstance(arg, (Ref, bool, int, float)) for arg in node.args)
            dtype = kinds.pop() if len(kinds) == 1 and is_plain else None
            return dtype if dtype is not None and "float" in dtype else None
        return None

    def _row_parts(self, position: NodeId) -> Iterable[NodeId]:
        node = self.nodes[position]
        if isinstance(node, Op) and node.name in ("setitem", "set_view"):
            return refs(node.args[0])  # what changes a part has its rows from the whole
        return node_operands(node)

    def _find_invoke(self, position: NodeId) -> int | None:
        node = self.nodes[position]
        if isinstance(node, (Read, Mask)):
            return node.invoke
        found = {self._invokes.known[part] for part in self._row_parts(position)} - {None}
        return found.pop() if len(found) == 1 else None

    # the mechanics of in-place code

    def _edit(self, storage: Storage, way: tuple[Step, ...], part: Operand, where: str) -> None:
        """The part of a storage that `way` leads to gets new content."""
        self._check_fresh(storage, where)
        self._new_root(storage, self._put(storage.node, way, part, where), where)

    def _put(self, root: NodeId, way: tuple[Step, ...], part: Operand, where: str) -> NodeId:
        """`root` with the part at the end of `way` replaced."""
        if len(way) == 1 and way[0].name == "getitem":
            return self._add(Op(name="setitem", args=(Ref(root), way[0].args[0], part), where=where))
        copy = next((position for position, step in enumerate(way) if not step.is_view), None)
        if copy is None:
            steps = tuple((step.name, step.args, step.kwargs) for step in way)
            return self._add(Op(name="set_view", args=(Ref(root), steps, part), where=where))
        # an index that copies stands in the way: change what it gave, then put that back
        cut = copy if copy == len(way) - 1 else copy + 1
        inner = root
        for step in way[:cut]:
            inner = self._apply(inner, step, where)
        return self._put(root, way[:cut], Ref(self._put(inner, way[cut:], part, where)), where)

    def _apply(self, node: NodeId, step: Step, where: str) -> NodeId:
        return self._add(Op(name=step.name, args=(Ref(node), *step.args), kwargs=dict(step.kwargs), where=where))

    def _check_branch(self, is_outside: bool, where: str) -> None:
        if self._branch is not None and is_outside:
            raise GraphError(
                "in-place code in a side of polytrace.cond would act whichever side is taken: return the new value "
                "from both sides, and write what polytrace.cond returns",
                where=where,
            )

    def _new_root(self, storage: Storage, node: NodeId, where: str) -> None:
        self._check_branch(storage.place is not None or storage.node < (self._branch or 0), where)
        storage.node = node
        storage.version += 1
        if storage.place is None or storage.place.invoke in self.over:
            if not storage.edits:
                self._edited.append(storage)
            storage.edits.append((node, where))
            return
        place = storage.place
        self._hand_back(place, node, in_place=True, where=where)
        place.note(where, storage)
        storage.writes_seen = place.writes

    def _hand_back(self, place: Place | GroupPlace, node: NodeId, *, in_place: bool, where: str) -> None:
        """Writes a value to its site; of a group, each member its part."""
        if in_place and place.in_place_refusal is not None:
            raise GraphError(f"{place.site} cannot be changed in place: {place.in_place_refusal}", where=where)
        if isinstance(place, Place):
            self._add(Write(site=place.site, invoke=place.invoke, value=Ref(node), in_place=in_place, where=where))
            return
        lengths, shape = self._known_lengths(place.invoke), self.session.shape_of(node).shape
        dims = self._token_dims(place.site)
        sizes = [shape[dim : dim + 1] for dim in dims]
        if shape[:1] != (len(lengths),) or any(size != (max(lengths),) for size in sizes):
            raise GraphError(
                f"{place.site} of all {len(lengths)} prompts is {max(lengths)} tokens wide, and the value written to "
                f"it has shape {list(shape)}; a write needs the exact shape",
                where=where,
            )
        for part in place.parts:
            index = part.index(dims)
            own = self._add(Op(name="getitem", args=(Ref(node), index), where=where))
            member = part.place.invoke
            self._add(Write(site=place.site, invoke=member, value=Ref(own), in_place=in_place, where=where))

    def _read_group(self, site: Site, invoke: int, dtype: str, where: str) -> State:
        """One view over what every member reads."""
        members = [self.read(site, member, dtype, where).node for member in self.session.members_of(invoke)]
        unseen: dict[str, Operand] = {}
        if site.port is Port.SCORES:  # -inf at what is no token
            lengths = self._known_lengths(invoke)
            unseen["unseen"] = tuple(max(lengths) - length for length in lengths)
        node = self._left_pad(members, invoke, self._token_dims(site), where, **unseen)
        self._dtypes.known[node] = dtype
        state = self._fresh(node, where)
        state.storage.place = place = self._place(site, invoke)
        state.storage.writes_seen = place.writes
        return state

    def _known_lengths(self, invoke: int) -> tuple[int, ...]:
        lengths = self.session.lengths_of(invoke)
        assert lengths is not None, "groups are of prompts that are there"
        return lengths

    def _token_dims(self, site: Site) -> tuple[int, ...]:
        """The dimensions of a site's view that run over tokens."""
        return (2, 3) if site.port.is_of_pairs else (self.session.row_dim(site),)

    def _of_members(self, call: Op) -> NodeId | None:
        """What an index takes of a group's view, taken of each member's: nobody needs the other columns then."""
        base = call.args[0]
        whole = self.nodes[base.node] if call.name == "getitem" and isinstance(base, Ref) else None
        if not isinstance(whole, Op) or whole.name != "left_pad" or whole.args[1] != (1,):
            return None
        assert isinstance(base, Ref) and isinstance(whole.args[0], list)
        invoke = self._invokes.known[base.node]
        widths = [max(self._known_lengths(member)) for member in self.session.members_of(invoke or 0)]
        index = index_from_the_end(call.args[1], min(widths), max(widths))
        if index is None:
            return None
        parts = [self._add(Op(name="getitem", args=(part, index), where=call.where)) for part in whole.args[0]]
        args: tuple[Operand, ...] = ([Ref(part) for part in parts], 0)
        node = self._add(Op(name="cat", args=args, where=call.where))
        self._invokes.known[node] = invoke
        return node

    def _left_pad(
        self, members: list[NodeId], invoke: int, dims: tuple[int, ...], where: str, **unseen: Operand
    ) -> NodeId:
        args: tuple[Operand, ...] = ([Ref(member) for member in members], dims)
        node = self._add(Op(name="left_pad", args=args, kwargs=unseen, where=where))
        self._invokes.known[node] = invoke
        return node

    def _check_fresh(self, storage: Storage, where: str) -> None:
        """Handing back a value that lacks another line's write would silently undo that write."""
        place = storage.place
        if place is not None and place.writes != storage.writes_seen and place.invoke not in self.over:
            raise GraphError(
                f"this value was read before {place.line} changed {place.site}, and changing it now would undo that: "
                f"read {place.site} again",
                where=where,
            )

    def _check_kind(self, dtype: str | None, new: NodeId, where: str) -> None:
        """In-place code does not make whole numbers of others, as in torch."""
        if dtype is None or "float" in dtype:
            return
        made = self._dtypes.of(new) or self.session.shape_of(new).dtype
        if "float" in made or (dtype == "bool" and made != "bool"):
            raise GraphError(
                f"in-place code would put {made} into a value of {dtype}: write `value = value / 2` without in-place, "
                f"or value.float() first",
                where=where,
            )

    def _place(self, site: Site, invoke: int) -> Place | GroupPlace:
        if invoke < 0:
            members = self.session.members_of(invoke)
            lengths = [self._known_lengths(member) for member in members]
            parts = parts_of([self._own_place(site, member) for member in members], lengths)
            return self._groups.setdefault((site, invoke), GroupPlace(site, invoke, parts))
        return self._own_place(site, invoke)

    def _own_place(self, site: Site, invoke: int) -> Place:
        place = self._places.get((site, invoke))
        if place is None:
            place = self._places[site, invoke] = Place(site, invoke)
        return place

    def _view(self, base: State, way: tuple[Step, ...], node: NodeId, where: str) -> State:
        return State(self, base.storage, base.steps + way, node, base.storage.version, where)

    def _fresh(self, node: NodeId, where: str) -> State:
        return State(self, Storage(node), (), node, 0, where)

    def _own(self, state: State, where: str) -> NodeId:
        if state.recording is not self:
            raise GraphError(
                state.recording.closed or "this value belongs to another trace: save it there first", where=where
            )
        return self.node_of(state)

    def _once(self, node: Node, key: str | int) -> NodeId:
        if (type(node), key) not in self._shared:
            self._shared[type(node), key] = self._add(node)
        return self._shared[type(node), key]

    def _add(self, node: Node) -> NodeId:
        if self.closed is not None:
            raise GraphError(self.closed, where=node.where)
        if self.peeks is not None and isinstance(node, Write):
            self.peeks.note(NodeId(len(self.nodes)), node)
        self.nodes.append(node)
        return NodeId(len(self.nodes) - 1)


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


# types of Python values that stand in a graph as they are
_PLAIN = frozenset({type(None), type(Ellipsis), bool, float, str, DType})

# ops whose result has one dtype, whatever they are given
_MAKES = dict.fromkeys(("argmax", "argmin", "argsort", "count_nonzero", "long", "one_hot"), "int64") | dict.fromkeys(
    ("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite"), "bool"
)

# ops whose result has the dtype of their first argument
_KEEPS_DTYPE = frozenset(
    {
        *("setitem", "set_view", "getitem", "transpose", "permute", "squeeze", "unsqueeze", "select", "narrow"),
        *("movedim", "t", "unflatten", "reshape", "flatten", "expand", "repeat", "roll", "flip"),
        *("clone", "detach", "contiguous", "masked_fill", "tril", "triu"),
    }
)
# ops whose result has the dtype of their tensors where these agree on a float
_AGREES_ON_DTYPE = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "rdiv", "pow", "matmul", "rmatmul", "maximum", "minimum", "clamp"),
        *("neg", "abs", "relu", "tanh", "sigmoid", "exp", "log", "sqrt", "rsqrt"),
    }
)
