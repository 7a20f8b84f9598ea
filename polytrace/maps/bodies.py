"""The body of a map, recorded once with one prompt: a graph that stands for any prompt.

A graph has no shapes in it: a read says which site, not how many tokens. So what was recorded with one prompt is right
for all, unless the body asked how long its prompt is (`.shape`, `len`, `.at(...)`); then it is recorded once for each
number of tokens. This file owns when that is, and what is found out of a recorded body: what depends on the prompt,
the shape of each value, a digest of all that results depend on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from polytrace.certificate import ValueShape
from polytrace.contents import identity
from polytrace.errors import GraphError
from polytrace.graph import (
    Backward,
    Call,
    Constant,
    Graph,
    Invoke,
    Node,
    NodeId,
    Op,
    Options,
    Parameter,
    Ref,
    Request,
    Save,
    operands,
)
from polytrace.maps.combining import Combined
from polytrace.maps.rowwise import prompt_dims
from polytrace.ops import OPS
from polytrace.positions import has_positions
from polytrace.pruning import renumber
from polytrace.storage import is_recorded, state_of
from polytrace.tensors import RawTensor, itemsize
from polytrace.tracing import Tracer

if TYPE_CHECKING:
    from polytrace.model import Model

Body = Callable[[], Mapping[str, Any]]

_KEPT = 256  # recorded bodies that are kept, one a number of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One value that the body returned."""

    node: NodeId
    combined: Combined | None  # how it is combined; None: each prompt's own rows
    where: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """A body's graph for one prompt (invoke 0), without saves."""

    nodes: tuple[Node, ...]
    is_shared: tuple[bool, ...]  # per node, whether it has nothing of the prompt: once a request is enough
    outputs: Mapping[str, Output]
    constants: Mapping[str, RawTensor]  # named by their content
    digest: str  # of all that the results depend on; not of lines
    asks_length: bool  # the body asked how long its prompt is
    draws: bool  # it has a random operation


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The shapes that a body's outputs have for one prompt."""

    tokens: int  # of the prompt that the shapes are of
    shapes: Mapping[str, ValueShape]
    grown: Mapping[str, tuple[int, ...]]  # dimensions that grow with the number of tokens

    def row_bytes(self, name: str, tokens: int) -> int:
        """About how many bytes a prompt of so many tokens gives."""
        size = itemsize(self.shapes[name].dtype)
        for dim, length in enumerate(self.shapes[name].shape):
            size *= max(1, round(length * tokens / self.tokens)) if dim in self.grown[name] else length
        return size


class Bodies:
    """The body of one map, for prompts of any length."""

    def __init__(self, model: Model, body: Body, options: Options) -> None:
        self._model = model
        self._body = body
        self._options = options
        self._of_all: Recorded | None = None  # where it does not ask for lengths
        self._of_length: dict[int, Recorded] = {}

    def of(self, sequence: tuple[int, ...]) -> Recorded:
        """The body for a prompt. Raises GraphError with the user's line where it mixes prompts or cannot be."""
        found = self._of_all or self._of_length.get(len(sequence))
        if found is None:
            found = record(self._model, self._body, [sequence], self._options)
            if found.asks_length:
                if len(self._of_length) >= _KEPT:
                    self._of_length.pop(next(iter(self._of_length)))
                self._check_rows(found, sequence)
                self._of_length[len(sequence)] = found
            else:
                try:
                    self._check_rows(found, self._other(sequence))  # two tokens or more tell tokens from prompts
                except GraphError:  # a size written as a number fits this many tokens only
                    self._check_rows(found, sequence)
                self._of_all = found
        return found

    def measured(self, sequence: tuple[int, ...]) -> Measured:
        """Shapes for the prompt and for one that is a token longer (shorter at the limit), which tell what grows."""
        other = self._other(sequence)
        own = output_shapes(self._model, self.of(sequence), sequence, self._options)
        try:
            longer = output_shapes(self._model, self.of(other), other, self._options)
        except GraphError:  # the body takes prompts of this many tokens only
            longer = own
        grown: dict[str, tuple[int, ...]] = {}
        for name, shape in own.items():
            pairs = zip(shape.shape, longer[name].shape, strict=False)
            grown[name] = tuple(dim for dim, (size, more) in enumerate(pairs) if size != more)
        return Measured(tokens=len(sequence), shapes=own, grown=grown)

    def _other(self, sequence: tuple[int, ...]) -> tuple[int, ...]:
        limit = self._model.description.limits.max_sequence_tokens
        return (*sequence, sequence[-1]) if len(sequence) < limit else sequence[1:] or sequence

    def _check_rows(self, recorded: Recorded, sequence: tuple[int, ...]) -> None:
        """Raises MixesPromptsError where an op runs over prompts, GraphError where an output has no row a prompt."""
        dims = prompt_dims(recorded.nodes, node_shapes(self._model, recorded, [sequence], self._options))
        for name, output in recorded.outputs.items():
            dim = dims[output.node]
            if dim is None:
                raise GraphError(
                    f"{name!r} has nothing of the prompt, so it is the same for all: read it in a trace of its own",
                    where=output.where,
                )
            if dim != 0:
                raise GraphError(
                    f"{name!r} has its prompts in dimension {dim}; a value of a map has them first: "
                    f"return value.movedim({dim}, 0)",
                    where=output.where,
                )


def node_shapes(
    model: Model, recorded: Recorded, prompts: Sequence[tuple[int, ...]], options: Options
) -> tuple[ValueShape | None, ...]:
    """The shape of each node's value for these prompts, as the model's own checks work it out. Nothing runs."""
    saves = tuple(
        Save(name=str(place), value=Ref(output.node), where=output.where)
        for place, output in enumerate(recorded.outputs.values())
    )
    request = Request(
        graph=Graph(nodes=(*recorded.nodes, *saves)),
        invokes=(Invoke(sequences=tuple(prompts)),),
        constants=recorded.constants,
        options=options,
    )
    return model.backend.validate(request).nodes[: len(recorded.nodes)]


def output_shapes(
    model: Model, recorded: Recorded, sequence: tuple[int, ...], options: Options
) -> dict[str, ValueShape]:
    """Shape and dtype of what the body returned, for one prompt."""
    shapes = node_shapes(model, recorded, [sequence], options)
    return {name: _known(shapes, output.node) for name, output in recorded.outputs.items()}


def record(model: Model, body: Callable[..., Any], prompts: Any, options: Options, *given: Any) -> Recorded:
    """Calls the body once, in a trace that is not run."""
    edits = model.edits_of_traces
    tracer = _BodyTracer(model, [list(sequence) for sequence in prompts], options, False, edits=edits)
    tracer.asks_length = any(has_positions(node) for edit in edits for node in edit.nodes)
    where = tracer.where
    with tracer:
        returned = _named_values(body(*given), where)
        outputs = []
        for name, value in returned.items():
            kept = value.value if isinstance(value, Combined) else value
            state = state_of(kept)
            tracer.recording.save(state, kept)
            outputs.append((name, value, state))
    request = tracer.request
    assert request is not None
    _check_kept(tracer, request)
    if backward := next((node for node in request.graph.nodes if isinstance(node, Backward)), None):
        told = (
            "a map's prompts share its loss, so no gradient is one prompt's: use model.trace, with an invoke for each"
        )
        raise GraphError(told, where=backward.where)
    saves = {save.name: save.value.node for save in request.graph.nodes if isinstance(save, Save)}
    names = tracer.save_names
    if extra := [state.where for state, _, _ in tracer.recording.saved if all(state is not own for *_, own in outputs)]:
        raise GraphError("a map returns what its body returns: return this value under a name", where=extra[0])
    named = _by_content(request.constants)
    nodes = [
        replace(node, name=named[node.name]) if isinstance(node, Constant) else node for node in request.graph.nodes
    ]
    kept_nodes, places = renumber(nodes, (NodeId(p) for p, node in enumerate(nodes) if not isinstance(node, Save)))
    made: dict[str, Output] = {}
    for name, value, state in outputs:
        save_where = next(line for own, _, line in tracer.recording.saved if own is state)
        combined = value if isinstance(value, Combined) else None
        made[name] = Output(
            node=places[saves[names[id(state)]]],
            combined=combined,
            where=combined.where if combined else save_where,
        )
    constants = {named[name]: raw for name, raw in request.constants.items()}
    return Recorded(
        nodes=kept_nodes,
        is_shared=_shared(kept_nodes),
        outputs=made,
        constants=constants,
        digest=_digest(kept_nodes, made, constants),
        asks_length=tracer.asks_length,
        draws=any(isinstance(node, Op) and OPS[node.name].is_random for node in kept_nodes),
    )


def _check_kept(tracer: Tracer, request: Request) -> None:
    """Raises GraphError where a body would change what is on the service, or read what others may change meanwhile."""
    if left := tracer.recording.leaving:
        raise GraphError(
            "a map's body stands for many prompts, so it leaves nothing on the service, and this would leave "
            f"{left[0].keep.name!r}: return the value, and keep what you make of it in a trace of its own",
            where=left[0].where,
        )
    for node in request.graph.nodes:
        state = request.constants[node.name].state if isinstance(node, Constant) else None
        if state is not None:
            raise GraphError(
                f"a map is many requests, and the state {state!r} may change between them: use what its .fetch() gives",
                where=node.where,
            )


class _BodyTracer(Tracer):
    """Notes whether anyone asked for something that follows from the number of tokens."""

    asks_length = False

    @property
    def save_names(self) -> dict[int, str]:
        """By the id of a saved value's state: the name that it is saved under."""
        return {id(state): name for (state, _, _), name in zip(self.recording.saved, self._names, strict=True)}

    def shape_of(self, node: NodeId) -> ValueShape:
        if not isinstance(self.recording.nodes[node], (Parameter, Constant)):
            self.asks_length = True
        return super().shape_of(node)

    def lengths_of(self, invoke: int) -> tuple[int, ...]:
        self.asks_length = True
        return super().lengths_of(invoke)

    def _sequences(self) -> tuple[tuple[int, ...], ...]:
        self.asks_length = True
        return super()._sequences()

    def _make_request(self) -> tuple[Request, tuple[str, ...]]:
        request, self._names = super()._make_request()
        return request, self._names


def _named_values(returned: Any, where: str) -> dict[str, Any]:
    if not isinstance(returned, Mapping) or not returned:
        raise GraphError(
            f'the body of a map returns a dict of its values, as in return {{"resid": value}}, '
            f"not a {type(returned).__name__}",
            where=where,
        )
    for name, value in returned.items():
        if not isinstance(name, str) or not name or ":" in name or name.startswith("_"):
            raise GraphError(
                f"a value's name is a string without ':' that begins with no '_', not {name!r}", where=where
            )
        if not isinstance(value, Combined) and not is_recorded(value):
            raise GraphError(
                f"{name!r} is a {type(value).__name__}: the body returns values of the trace, or polytrace.mean(value) "
                "and the like",
                where=where,
            )
    return dict(returned)


def _shared(nodes: tuple[Node, ...]) -> tuple[bool, ...]:
    """What depends on no invoke, draws nothing and has a value."""
    found: list[bool] = []
    for node in nodes:
        is_own = isinstance(node, (Constant, Parameter, Call, Op)) and all(found[part] for part in operands(node))
        found.append(is_own and not (isinstance(node, Op) and OPS[node.name].is_random))
    return tuple(found)


def _by_content(constants: Mapping[str, RawTensor]) -> dict[str, str]:
    """Names that are the same for the same content, whichever recording it is of."""
    return {name: f"c{hashlib.sha256(identity(raw).encode()).hexdigest()[:32]}" for name, raw in constants.items()}


def _digest(nodes: tuple[Node, ...], outputs: Mapping[str, Output], constants: Mapping[str, RawTensor]) -> str:
    own = [repr(replace(node, where="")) for node in nodes]
    told = [
        (name, output.node, output.combined.described() if output.combined else None)
        for name, output in outputs.items()
    ]
    return hashlib.sha256(repr((own, told, sorted(constants))).encode()).hexdigest()


def _known(shapes: tuple[ValueShape | None, ...], node: NodeId) -> ValueShape:
    shape = shapes[node]
    assert shape is not None, "what is saved is one value"
    return shape
