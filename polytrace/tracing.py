"""A trace: the block in which a program is recorded, and what becomes of its values when it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import TYPE_CHECKING, Any

from polytrace import hints
from polytrace.asked_shapes import AskedShapes
from polytrace.certificate import Receipt, ValueShape
from polytrace.collector import young_only
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Constant, Graph, Invoke, Mask, Node, NodeId, Options, Parameter, Read, Request
from polytrace.lines import user_line
from polytrace.progress import showing_progress
from polytrace.prompts import PromptBook
from polytrace.recording import Recording
from polytrace.storage import State
from polytrace.tokenizer import token_texts
from polytrace.tree import NoSuchNameError

if TYPE_CHECKING:
    from polytrace.model import Model

_open: ContextVar[Tracer | None] = ContextVar("polytrace_open_trace", default=None)


def open_trace() -> Tracer | None:
    """The trace whose block this code is in; every thread and task has its own."""
    return _open.get()


class Tracer:
    """`with model.trace(...) as tracer`."""

    def __init__(self, model: Model, prompts: Any, options: Options, is_run: bool) -> None:
        self.model = model
        self.options = options
        self.recording = Recording(model.description, self)
        self.wrap: Callable[[State], Any] = model.kind.make  # the Python object for a value
        self._receipt: Receipt | None = None
        self.request: Request | None = None  # what was sent, once the block has ended
        self.where = user_line()
        self._is_run = is_run
        self._prompts = PromptBook(model.description, lambda: model.tokenizer)
        self._invokes: list[Invoke] = []
        self._invoke: int | None = None  # whose block this is
        self._has_own_prompts = prompts is not None
        self._token: Token[Tracer | None] | None = None
        self._shapes: Any = None
        if prompts is not None:
            self._invoke = self._add_invoke(prompts)

    # what a user calls

    def invoke(self, prompts: Any) -> InvokeBlock:
        """`with tracer.invoke(prompts)`: one of several sets of prompts, whose values may flow between them."""
        if self._has_own_prompts:
            raise GraphError(
                "this trace has its prompts: write model.trace() without any to invoke several", where=user_line()
            )
        self._check_open()
        return InvokeBlock(self, self._add_invoke(prompts))

    @property
    def receipt(self) -> Receipt:
        """What the run did cost and touch. Raises GraphError before it ran."""
        if self._receipt is None:
            closed = self.recording.closed
            raise GraphError(
                f"there is no receipt{f': {closed}' if closed else ' yet: the trace runs when its block ends'}",
                where=user_line(),
            )
        return self._receipt

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        known = [known for known in dir(type(self)) if not known.startswith("_")]
        told = f": {words}" if (words := hints.of_tracer(name)) else nearest(name, known)
        raise NoSuchNameError(f"a trace has no {name!r}{told}", where=user_line())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt of this invoke; outside of one, of all invokes in order."""
        return tuple(len(sequence) for sequence in self._sequences())

    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]:
        """The tokens of each prompt as text, special ones included; of this invoke, outside of one of all in order."""
        return tuple(token_texts(self.model.tokenizer, sequence) for sequence in self._sequences())

    @property
    def mask(self) -> Any:
        """`[sequences, longest]`, True where the left-padded view has a token."""
        return self.wrap(self.recording.mask(self.invoke_index("the mask")))

    def __enter__(self) -> Tracer:
        other = _open.get()
        if other is not None:
            raise GraphError(
                f"a trace is open already, since {other.where}: one ends before the next begins", where=user_line()
            )
        if self.recording.closed is not None or self._token is not None:
            raise GraphError("this trace has been used: begin another with model.trace(...)", where=user_line())
        self._token = _open.set(self)
        young_only.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        _open.reset(self._token)
        try:
            self._end(error)
        finally:
            young_only.__exit__(kind, error, traceback)

    def _end(self, error: BaseException | None) -> None:
        """Sends and runs what was recorded, if the block ended well."""
        if error is not None:
            self.recording.closed = f"the trace of this value ended with {type(error).__name__}, so nothing was sent"
            return
        try:
            self.request, names = self._make_request()
            if self._is_run:
                with showing_progress(self.model.description.name) as tell:
                    result = self.model.backend.run(self.request, tell)
                self._receipt = result.receipt
                self._hand_out(names, dict(result.values))
        except BaseException:
            self.recording.closed = "the trace of this value failed, so it has no data"
            raise
        self.recording.closed = (
            "this value was not saved, so it did not come back: call .save() on it inside the trace"
            if self._is_run
            else "this trace was recorded with run=False: nothing ran, so its values have no data"
        )

    # what values and modules call

    def shape_of(self, node: NodeId) -> ValueShape:
        if self._shapes is None:
            asked = AskedShapes(self.recording, self.leaf_shape, self._invokes, self.model.backend, self.model.answers)
            self._shapes = self.model.kind.shapes(self.recording, self.leaf_shape, asked)
        shape = self._shapes.of(node)
        assert isinstance(shape, ValueShape)
        return shape

    def lengths_of(self, invoke: int) -> tuple[int, ...]:
        return tuple(len(sequence) for sequence in self._invokes[invoke].sequences)

    def leaf_shape(self, node: Node) -> ValueShape | None:
        """What the model's description says of a node; None when it takes more than that."""
        if isinstance(node, Read):
            leaf = self.model._index.leaves[node.site]
            invoke = self._invokes[node.invoke]
            return ValueShape(shape=leaf.view_shape(len(invoke.sequences), invoke.longest), dtype=leaf.dtype)
        if isinstance(node, Constant):
            raw = self.recording.constants.tensors[node.name]
            return ValueShape(shape=raw.shape, dtype=raw.dtype)
        if isinstance(node, Parameter):
            info = self.model._index.parameters[node.path]
            return ValueShape(shape=info.shape, dtype=info.dtype)
        if isinstance(node, Mask):
            invoke = self._invokes[node.invoke]
            return ValueShape(shape=(len(invoke.sequences), invoke.longest), dtype="bool")
        return None

    def invoke_index(self, what: object) -> int:
        """The invoke whose block this is. Raises GraphError outside of any."""
        self._check_open()
        if self._invoke is None:
            raise GraphError(
                f"{what} belongs to prompts: use it inside `with tracer.invoke(prompts):`, "
                "or give the prompts to model.trace(prompts)",
                where=user_line(),
            )
        return self._invoke

    def built_request(self) -> Request:
        """What would be sent if the block ended here, or was when it ended."""
        if self.request is not None:
            return self.request
        if self.recording.closed is not None:
            raise GraphError(self.recording.closed, where=user_line())
        return self._make_request()[0]

    def _add_invoke(self, prompts: Any) -> int:
        self._invokes.append(self._prompts.invoke(prompts))
        return len(self._invokes) - 1

    def _sequences(self) -> tuple[tuple[int, ...], ...]:
        chosen = self._invokes if self._invoke is None else [self._invokes[self._invoke]]
        return tuple(sequence for invoke in chosen for sequence in invoke.sequences)

    def _make_request(self) -> tuple[Request, tuple[str, ...]]:
        nodes, names = self.recording.finish()
        used = {node.name for node in nodes if isinstance(node, Constant)}
        constants = {name: raw for name, raw in self.recording.constants.tensors.items() if name in used}
        request = Request(
            graph=Graph(nodes=nodes), invokes=tuple(self._invokes), constants=constants, options=self.options
        )
        return request, names

    def _hand_out(self, names: tuple[str, ...], results: dict[str, Any]) -> None:
        """Every saved value becomes its result."""
        kind, own, given = self.model.kind, [], set[str]()
        for name in names:
            own.append(kind.another(results[name]) if name in given else results[name])
            given.add(name)
        for (_, value, _), result in zip(self.recording.saved, own, strict=True):
            kind.become(value, result)

    def _check_open(self) -> None:
        if _open.get() is not self:
            raise GraphError("this trace's block is not open here", where=user_line())


class InvokeBlock:
    """`with tracer.invoke(prompts) as invoke`."""

    def __init__(self, tracer: Tracer, index: int) -> None:
        self._tracer = tracer
        self._index = index

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return self._tracer.lengths_of(self._index)

    def __enter__(self) -> InvokeBlock:
        if self._tracer._invoke is not None:
            raise GraphError("an invoke is open already: one ends before the next begins", where=user_line())
        self._tracer._invoke = self._index
        return self

    def __exit__(self, *error: object) -> None:
        self._tracer._invoke = None
