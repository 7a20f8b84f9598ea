"""A trace: the block in which a program is recorded. What becomes of it when the block ends is `polytrace.sending`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar, Token
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from polytrace import hints
from polytrace.asked_shapes import AskedShapes
from polytrace.caching import Cache, CacheRequest
from polytrace.certificate import Receipt, ValueShape
from polytrace.chat import conversations_in
from polytrace.collector import young_only
from polytrace.edits.open_shapes import BY_STEP, opened
from polytrace.errors import GraphError, PolytraceError
from polytrace.generation import num_steps
from polytrace.grammar import nearest
from polytrace.graph import Constant, Invoke, Mask, Node, NodeId, Options, Parameter, Port, Read, Site
from polytrace.image_prompts import images_among, with_images
from polytrace.images import PIXELS
from polytrace.invoke_block import InvokeBlock
from polytrace.jobs import Job
from polytrace.lines import user_line
from polytrace.logs import add_log
from polytrace.peeking import Peeks
from polytrace.pricing import PricedError
from polytrace.prompts import PromptBook
from polytrace.recording import Recording
from polytrace.saving import save_members
from polytrace.sending import Sending
from polytrace.storage import State, is_recorded
from polytrace.tokenizer import token_texts
from polytrace.tracebacks import edge, shorten
from polytrace.tree import NoSuchNameError

if TYPE_CHECKING:
    from polytrace.edits.sets import EditSet
    from polytrace.kinds import Shapes
    from polytrace.model import Model
    from polytrace.modules import Module

_open: ContextVar[Tracer | None] = ContextVar("polytrace_open_trace", default=None)


def open_trace() -> Tracer | None:
    """The trace whose block this code is in; every thread and task has its own."""
    return _open.get()


class Tracer(Sending):
    """`with model.trace(...) as tracer`."""

    def __init__(
        self,
        model: Model,
        prompts: Any,
        options: Options,
        is_run: bool,
        *,
        chat: Mapping[str, Any] | None = None,
        home: Tracer | None = None,
        edits: Sequence[EditSet] = (),
        is_peeking: bool = False,
        pixel_values: Any = None,
    ) -> None:
        """`home`: the session that this trace is part of, which has the program. `edits`: where each prompt starts."""
        recording = home.recording if home is not None else Recording(model.description, self)
        super().__init__(model, options, recording, is_run=is_run)
        self.recording.gradients.detaching.is_off = model.kind.is_grad_off
        self.wrap: Callable[[State], Any] = model.kind.make  # the Python object for a value
        self._home = home
        self._edits = edits
        for edit in edits:
            for call in edit.calls:
                self.check_call(call.module, call.where)
        self._chat = chat or {}
        self._prompts: PromptBook = (
            home._prompts if home is not None else PromptBook(model.description, lambda: model.tokenizer)
        )
        if home is not None:
            self._invokes, self.logs = home._invokes, home.logs
        self._groups: list[tuple[int, ...]] = home._groups if home is not None else []  # members of each empty invoke
        if home is None and is_peeking:
            self.recording.peeks = Peeks(self.recording, self._invokes, options, model.backend.run)
        self._invoke: int | None = None  # whose block this is
        self._has_own_prompts = prompts is not None
        self._token: Token[Tracer | None] | None = None
        self._shapes: dict[bool, Shapes] = {}
        # that polytrace.save was given; what later traces of a session put into one is saved too
        self.containers: list[Any] = home.containers if home is not None else []
        self.caches: list[CacheRequest] = []  # of the invokes that are open, whose reads stand at their end
        if prompts is not None:
            self._invoke = self._add_invoke(prompts, chat, pixel_values)

    # what a user calls

    @edge
    def invoke(
        self, prompts: Any = None, *, chat: Mapping[str, Any] | None = None, pixel_values: Any = None
    ) -> InvokeBlock:
        """`with tracer.invoke(prompts)`: one of several sets of prompts, whose values may flow between them.

        Without prompts: all of the trace so far, as one left-padded view (`polytrace.groups`). What the invokes before
        have changed is seen there, and what is written there reaches them.
        `pixel_values`: the images that stand in the prompts (`polytrace.images`).
        """
        if prompts is None:
            self._check_open()
            return InvokeBlock(self, self._group())
        if self._has_own_prompts:
            raise GraphError(
                "this trace has its prompts: write model.trace() without any to invoke several", where=user_line()
            )
        self._check_open()
        return InvokeBlock(self, self._add_invoke(prompts, chat, pixel_values))

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
    def job(self) -> Job:
        """The request of a trace with `blocking=False`, once its block has ended."""
        if self._job is None:
            told = "a trace has a job when it is made with blocking=False, and its block has ended"
            raise GraphError(told, where=user_line())
        return self._job

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

    def value(self, tensor: Any) -> Any:
        """A tensor or array of yours, or what is kept on the service, as a value of this trace: one that has a `.grad`.

        Each call gives a value of its own, also of the same tensor.
        """
        self._check_open()
        return tensor if is_recorded(tensor) else self.wrap(self.recording.brought(tensor))

    @property
    def peeks(self) -> tuple[Receipt, ...]:
        """What looking at values while recording did cost (`peek=True`): a receipt for each that was asked for."""
        return () if self.recording.peeks is None else tuple(self.recording.peeks.receipts)

    @property
    def told(self) -> str:
        """Why a value has no data yet."""
        return "a recorded value has no data yet"

    @property
    def hint(self) -> str:
        """How it could have some: the end of a refusal."""
        return ", or use trace(..., peek=True)"

    @property
    def result(self) -> Any:
        """What the model itself returns: `model.output`."""
        return self.model.output

    def stop(self) -> None:
        """The run ends behind the last site that this invoke has used so far; outside of one, that each has.

        Nothing runs behind the last value that is needed anyway: this only has later code refused that wants more.
        """
        self._check_open()
        chosen = self._own_invokes() if self._invoke is None else self.members_of(self._invoke)
        self.recording.closings.stop(chosen, user_line())

    def move_on(self, module: str | None, count: int) -> None:
        """What `module.next()` says to a generation."""
        raise GraphError(f"next() goes on by a step, {hints.STEPS}", where=user_line())

    def cache(
        self,
        modules: Iterable[Module | str] | None = None,
        *,
        include_output: bool = True,
        include_inputs: bool = False,
        select: Callable[[Any], Any] | None = None,
        reduce: Callable[[Any], Any] | str | None = None,
        dtype: Any = None,
        device: Any = None,
        detach: bool = True,
    ) -> Cache:
        """Outputs of all modules, or of some, as they are when every change of this invoke has been made.

        `select` takes a part of each (`lambda h: h[:, -1]`), `reduce` works that out further: a function, or "mean",
        "sum", "max" over the tokens of each prompt; both run on the service. Entries are there when the block has
        ended; of all modules, those that cannot be read are told in `.refused`. `device` and `detach` mean nothing.
        """
        request = CacheRequest(
            self,
            modules,
            include_output=include_output,
            include_inputs=include_inputs,
            select=select,
            reduce=reduce,
            dtype=dtype,
        )
        self.caches.append(request)
        return request.cache

    def barrier(self, participants: int) -> Callable[[], None]:
        """Does nothing when it is called: values flow between invokes in any order without waiting for each other."""
        if not isinstance(participants, int) or participants < 1:
            raise GraphError(f"a barrier is for a number of invokes, not for {participants!r}", where=user_line())
        return lambda: None

    def log(self, first: Any, second: Any = None) -> None:
        """`log(value, "name")` or `log("name", value)`: printed when the pass that makes the value has ended.

        Kept in `logs`, with the bits that `.save()` gives. Raises TooLargeError for more than 16,384 bytes.
        """
        self._check_open()
        add_log(self, first, second)

    def __enter__(self) -> Self:
        other = _open.get()
        if other is not self._home:
            if other is None:
                raise GraphError("this trace was made in a session whose block has ended", where=user_line())
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
        try:
            self._leave(error)
            with suppress(PricedError):
                self._end(error)
        except PolytraceError as failure:
            shorten(failure)
            raise
        finally:
            young_only.__exit__(kind, error, traceback)
        if isinstance(error, PolytraceError):  # of the block, which goes on from here
            shorten(error)

    async def __aenter__(self) -> Self:
        """`async with model.trace(...)`: other tasks go on while it runs."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            try:
                self._leave(error)
            finally:
                young_only.__exit__(kind, error, traceback)
            with suppress(PricedError):
                await self._end_async(error)
        except PolytraceError as failure:
            shorten(failure)
            raise
        if isinstance(error, PolytraceError):
            shorten(error)

    def _leave(self, error: BaseException | None) -> None:
        """The block ends: nothing is recorded from now on."""
        assert self._token is not None
        try:
            if error is None:
                self._close()
        except BaseException:
            self.recording.closed = "the trace of this value failed, so it has no data"
            raise
        finally:
            _open.reset(self._token)

    def _close(self) -> None:
        """What the end of a block says: what caches are of is read, what stands in saved containers by now is saved."""
        waiting, self.caches = self.caches, []
        for cache in waiting:
            cache.fill()
        for container in self.containers:
            save_members(container)

    # what values and modules call

    def shape_of(self, node: NodeId) -> ValueShape:
        shape = self._shapes_as(is_late=False).of(node)
        if self.recording.loops.are_used and (when := self.recording.facts.times.of(node)).is_loop and not when.step:
            later = self._shapes_as(is_late=True).of(node)
            return ValueShape(shape=opened(shape.shape, later.shape, BY_STEP), dtype=shape.dtype)
        return shape

    def _shapes_as(self, *, is_late: bool) -> Shapes:
        """Shapes of all nodes; `is_late`: of those that are at step 0 and later ones, as they are later."""
        if is_late not in self._shapes:
            leaf = partial(self.leaf_shape, is_late=is_late)
            backend, answers = self.model.backend, self.model.answers
            asked = AskedShapes(self.recording, leaf, self._invokes, backend, answers, is_late=is_late)
            self._shapes[is_late] = self.model.kind.shapes(self.recording, leaf, asked)
        return self._shapes[is_late]

    def lengths_of(self, invoke: int) -> tuple[int, ...]:
        return tuple(len(sequence) for one in self.members_of(invoke) for sequence in self._invokes[one].sequences)

    @property
    def view_lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt as values have them where the code is: one behind the prompt."""
        lengths = self.lengths
        return lengths if self.recording.loops.position.of().step == 0 else (1,) * len(lengths)

    def num_steps(self, invoke: int) -> int:
        return num_steps(self._invokes[invoke]) if invoke >= 0 else 1

    def members_of(self, invoke: int) -> Sequence[int]:
        return (invoke,) if invoke >= 0 else self._groups[-1 - invoke]

    def num_columns(self, site: Site) -> int | None:
        """Of a site's view, where that does not depend on the prompts."""
        return None if site.port is Port.TOKEN else self.model._index.leaves[site].num_columns

    def row_dim(self, site: Site) -> int:
        """The dimension of a site's view that its tokens are in."""
        return 1 if site.port is Port.TOKEN else self.model._index.leaves[site].row_dim

    def leaf_shape(self, node: Node, *, is_late: bool = False) -> ValueShape | None:
        """What the model's description says of a node; None when it takes more than that.

        `is_late`: of one that is at step 0 and later ones, as it is later.
        """
        if isinstance(node, Read):
            invoke = self._invokes[node.invoke]
            is_column = node.step > 0 or (is_late and node.num_steps > 1)
            longest = 1 if is_column else invoke.longest  # behind the prompt it is one token a sequence
            if node.site.port is Port.TOKEN and node.site not in self.model._index.leaves:
                return ValueShape(shape=(len(invoke.sequences), longest), dtype="int64")
            leaf = self.model._index.leaves[node.site]
            before = invoke.longest + node.step - 1 if is_column else 0
            shape = leaf.view_shape(len(invoke.sequences), longest, before=before)
            return ValueShape(shape=shape, dtype=leaf.dtype)
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

    def check_call(self, module: str, where: str) -> None:
        """Raises GraphError for a call of a module whose weights an adapter of this trace changes."""
        for edit in self._edits:
            edit.check_call(module, where)

    def _add_invoke(self, prompts: Any, chat: Mapping[str, Any] | None = None, pixel_values: Any = None) -> int:
        if chat and conversations_in(prompts) is None:
            raise GraphError("chat= is for conversations: lists of {'role', 'content'} messages", where=user_line())
        images = images_among(prompts) if pixel_values is None else {PIXELS: pixel_values}
        invoke = self._prompts.invoke(prompts, self._chat if chat is None else chat, has_images=True)
        if images.get(PIXELS) is not None:
            invoke = with_images(invoke, images, self.model.description, self.recording.constants, user_line())
        self._invokes.append(self._goes_on(invoke))
        index = len(self._invokes) - 1
        for edit in self._edits:
            self.recording.replay(edit.nodes, edit.constants, index, self.lengths_of(index))
            self.recording.labels.setdefault(edit.label)
        return index

    def _goes_on(self, invoke: Invoke) -> Invoke:
        """The invoke as it goes on behind its prompts: in a trace it does not."""
        return invoke

    def _own_invokes(self) -> Sequence[int]:
        """The invokes of this trace."""
        return range(len(self._invokes))

    def _group(self) -> int:
        """The number of the group of all invokes so far; of a single one, its own."""
        members = self._own_invokes()
        if not members:
            raise GraphError(
                "tracer.invoke() without prompts means all prompts so far, and there are none yet", where=user_line()
            )
        if len(members) == 1:
            return members[0]
        self._groups.append(tuple(members))
        return -len(self._groups)

    def _sequences(self) -> tuple[tuple[int, ...], ...]:
        chosen = self._own_invokes() if self._invoke is None else self.members_of(self._invoke)
        return tuple(sequence for invoke in chosen for sequence in self._invokes[invoke].sequences)

    def _check_open(self) -> None:
        if _open.get() is not self:
            raise GraphError("this trace's block is not open here", where=user_line())
