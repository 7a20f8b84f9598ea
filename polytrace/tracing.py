"""A trace: the block in which a program is recorded, and what becomes of its values when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from dataclasses import replace
from functools import partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from polytrace import hints
from polytrace.asked_shapes import AskedShapes
from polytrace.backend import Result
from polytrace.caching import Cache, CacheRequest
from polytrace.certificate import Certificate, Receipt, ValueShape
from polytrace.chat import conversations_in
from polytrace.collector import young_only
from polytrace.edits.open_shapes import BY_STEP, opened
from polytrace.errors import GraphError
from polytrace.generation import num_steps
from polytrace.given import given_names
from polytrace.grammar import nearest
from polytrace.graph import (
    Constant,
    Graph,
    Invoke,
    Mask,
    Node,
    NodeId,
    Options,
    Parameter,
    Port,
    Read,
    Request,
    Save,
    Site,
    name_at,
)
from polytrace.handing import hand_out
from polytrace.image_prompts import images_among, with_images
from polytrace.images import PIXELS
from polytrace.jobs import Job, Running, begin, in_thread
from polytrace.lines import user_line
from polytrace.logs import Log, LogPrinter, add_log
from polytrace.loops import Position
from polytrace.peeking import Peeks
from polytrace.pricing import PricedError
from polytrace.progress import Hear, Tell, hear_nothing, showing_progress
from polytrace.prompts import PromptBook
from polytrace.recording import Recording
from polytrace.saving import save_members
from polytrace.scanning import Checking, probing_nodes, unused_values
from polytrace.storage import State, is_recorded
from polytrace.tokenizer import token_texts
from polytrace.tree import NoSuchNameError
from polytrace.wire import MAX_EDITS, encode_request

if TYPE_CHECKING:
    from polytrace.edits.sets import EditSet
    from polytrace.kinds import Shapes
    from polytrace.model import Model
    from polytrace.modules import Module

_open: ContextVar[Tracer | None] = ContextVar("polytrace_open_trace", default=None)


def open_trace() -> Tracer | None:
    """The trace whose block this code is in; every thread and task has its own."""
    return _open.get()


class Tracer:
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
        self.model = model
        self.options = options
        self.recording: Recording = home.recording if home is not None else Recording(model.description, self)
        self.recording.gradients.detaching.is_off = model.kind.is_grad_off
        self.wrap: Callable[[State], Any] = model.kind.make  # the Python object for a value
        self._receipt: Receipt | None = None
        self.request: Request | None = None  # what was sent, once the block has ended
        self.where = user_line()
        self._is_run = is_run
        self._home = home
        self._edits = edits
        for edit in edits:
            for call in edit.calls:
                self.check_call(call.module, call.where)
        self._chat = chat or {}
        self._prompts: PromptBook = (
            home._prompts if home is not None else PromptBook(model.description, lambda: model.tokenizer)
        )
        self._invokes: list[Invoke] = home._invokes if home is not None else []
        self._groups: list[tuple[int, ...]] = home._groups if home is not None else []  # members of each empty invoke
        if home is None and is_peeking:
            self.recording.peeks = Peeks(self.recording, self._invokes, options, model.backend.run)
        self._invoke: int | None = None  # whose block this is
        self._has_own_prompts = prompts is not None
        self._token: Token[Tracer | None] | None = None
        self._shapes: dict[bool, Shapes] = {}
        self.checking = Checking.NONE
        self.is_blocking = True  # whether the end of the block waits for the result
        self._job: Job | None = None
        self.certificate: Certificate | None = None  # what it would cost, once a scan or `validate=True` has asked
        # that polytrace.save was given; what later traces of a session put into one is saved too
        self.containers: list[Any] = home.containers if home is not None else []
        self.caches: list[CacheRequest] = []  # of the invokes that are open, whose reads stand at their end
        # what tracer.log was given; with data once it is there
        self.logs: list[Log] = home.logs if home is not None else []
        if prompts is not None:
            self._invoke = self._add_invoke(prompts, chat, pixel_values)

    # what a user calls

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
        finally:
            young_only.__exit__(kind, error, traceback)

    async def __aenter__(self) -> Self:
        """`async with model.trace(...)`: other tasks go on while it runs."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._leave(error)
        finally:
            young_only.__exit__(kind, error, traceback)
        with suppress(PricedError):
            await self._end_async(error)

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

    def _end(self, error: BaseException | None) -> None:
        """Sends and runs what was recorded, if the block ended well."""
        if (names := self._sent(error)) is None:
            return
        with self._failing():
            if not self.is_blocking:
                assert self.request is not None
                self._begun(begin(self.model.backend, self.request), names)
                return
            printer = self._log_printer(names)
            with showing_progress(self.model.description.name) as tell:
                result = self._run(tell, printer.hear if self.logs else hear_nothing)
            self._land(names, printer, result)

    async def _end_async(self, error: BaseException | None) -> None:
        """As `_end`, and meanwhile the event loop goes on. A task that is cancelled cancels the request."""
        if (names := self._sent(error)) is None:
            return
        with self._failing():
            assert self.request is not None
            if not self.is_blocking:
                self._begun(await in_thread(begin, self.model.backend, self.request), names)
                return
            self._land(names, self._log_printer(names), await self._awaited())

    def _sent(self, error: BaseException | None) -> tuple[str, ...] | None:
        """Makes the request, if the block ended well and wants one run: the names that its values come back under."""
        if error is not None:
            self.recording.closed = f"the trace of this value ended with {type(error).__name__}, so nothing was sent"
            return None
        if self.checking is Checking.SCAN:
            self._scan()
            return None
        if self.recording.has_looked_only:
            self.recording.closed = "this trace saved nothing, so nothing but its looks ran: call .save() in its block"
            return None
        with self._failing():
            self.request, names = self._make_request()
            if self.checking is Checking.VALIDATE:
                self.certificate = self.model.backend.validate(self.request)
            if not self._is_run:
                self.recording.closed = (
                    "this trace was recorded with run=False: nothing ran, so its values have no data"
                )
                return None
            return names

    def _begun(self, running: Running, names: tuple[str, ...]) -> None:
        """It runs, and nobody waits."""
        self._job = Job(running, partial(self._land, names, self._log_printer(names)))
        self.recording.closed = f"job {running.id} makes this value: it has data once tracer.job.result() has returned"

    def _land(self, names: tuple[str, ...], printer: LogPrinter, result: Result) -> Result:
        """The request has ended, and values become what they are: the result with these, which have its tensors now."""
        self._receipt = result.receipt
        printer.hear(result.values)
        self._hand_out(names, dict(result.values))
        if self.recording.leaving:
            from polytrace.keeping import land

            land(self.model, self.recording.leaving, result.receipt.request)
        self.recording.closed = "this value was not saved, so it did not come back: call .save() on it inside the trace"
        values = {name: value for name, (_, value, _) in zip(names, self.recording.saved, strict=True)}
        return Result(values=values, receipt=result.receipt)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What values say for whose trace the code inside fails."""
        try:
            yield
        except BaseException as error:
            is_priced = isinstance(error, PricedError)
            self.recording.closed = str(error) if is_priced else "the trace of this value failed, so it has no data"
            raise

    def _run(self, tell: Tell, hear: Hear) -> Result:
        assert self.request is not None
        return self.model.backend.run(self.request, tell, hear)

    async def _awaited(self) -> Result:
        """The result, while other tasks go on."""
        assert self.request is not None
        return await Job(await in_thread(begin, self.model.backend, self.request, is_interactive=True)).collected()

    def _scan(self) -> None:
        """Has everything checked; values keep their shapes and get no data."""
        try:
            unused = {node: self.shape_of(node) for node in unused_values(self.recording)}
            saved = {self.recording.node_of(state) for state, _, _ in self.recording.saved}
            if not unused.keys() <= saved:
                probe = self._request_of(probing_nodes(self.recording, unused))
                self.certificate = self.model.backend.validate(probe)
            if saved:
                self.request = self._make_request()[0]
                self.certificate = self.model.backend.validate(self.request)
        except BaseException:
            self.recording.closed = "the scan of this value failed"
            raise
        self.recording.keeps_shapes = True
        self.recording.closed = "this trace was scanned: nothing ran, so its values have shapes and no data"

    def _log_printer(self, names: tuple[str, ...]) -> LogPrinter:
        recording = self.recording
        full = {
            id(value): name if when is None else name_at(name, when.step)
            for (_, value, _), name, when in zip(recording.saved, names, recording.saved_steps, strict=True)
        }
        return LogPrinter(self.logs, {number: full[id(log.value)] for number, log in enumerate(self.logs)})

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

    def save_request(self, path: str | PathLike[str]) -> None:
        """Writes what would be sent to a file, constants and all: `polytrace validate FILE` says what it would cost.

        Inside the block, or behind one with `run=False`, or one that ran. A kept value goes by its name alone.
        """
        parts = encode_request(self.built_request())
        with open(path, "wb") as file:
            file.writelines(parts)

    def built_request(self) -> Request:
        """What would be sent if the block ended here, or was when it ended."""
        if self.request is not None:
            return self.request
        if self.recording.closed is not None:
            raise GraphError(self.recording.closed, where=user_line())
        return self._make_request()[0]

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
            edit.replay(self.recording, index, self.lengths_of(index))
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

    def _make_request(self) -> tuple[Request, tuple[str, ...]]:
        nodes, names = self.recording.finish()
        return self._request_of(nodes), names

    def _request_of(self, nodes: tuple[Node, ...]) -> Request:
        used = {node.name for node in nodes if isinstance(node, Constant)}
        used.update(name for invoke in self._invokes for name in given_names(invoke.inputs))
        saved = {node.name for node in nodes if isinstance(node, Save)}
        constants = {name: raw for name, raw in self.recording.constants.tensors.items() if name in used}
        if len(self.recording.labels) > MAX_EDITS:
            told = f"this program starts from {len(self.recording.labels)} edits; {MAX_EDITS} is the most"
            raise GraphError(told, where=self.where)
        return Request(
            graph=Graph(nodes=nodes),
            invokes=tuple(self._invokes),
            constants=constants,
            options=replace(self.options, edits=tuple(self.recording.labels)),
            keeps=tuple(left.keep for left in self.recording.leaving if left.keep.save in saved),
        )

    def _hand_out(self, names: tuple[str, ...], results: dict[str, Any]) -> None:
        """Every saved value becomes its result."""
        hand_out(self.recording, names, results, self.model.kind)
        self.recording.gradients.leaves.deliver()

    def _check_open(self) -> None:
        if _open.get() is not self:
            raise GraphError("this trace's block is not open here", where=user_line())


class InvokeBlock:
    """`with tracer.invoke(prompts) as invoke`."""

    def __init__(self, tracer: Tracer, index: int) -> None:
        self._tracer = tracer
        self._index = index
        self._around: int | None = None  # the trace's own prompts, which an empty invoke stands in
        self._position = Position()  # in its generation

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt."""
        return self._tracer.lengths_of(self._index)

    def __enter__(self) -> InvokeBlock:
        self._around = self._tracer._invoke
        if self._around is not None and not self._tracer._has_own_prompts:
            raise GraphError("an invoke is open already: one ends before the next begins", where=user_line())
        self._tracer._invoke = self._index
        self._swap_positions()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self._tracer._close()
        finally:
            self._tracer._invoke = self._around
            self._swap_positions()

    def _swap_positions(self) -> None:
        """Each invoke has its own: what `next()` says in one is nothing to the others."""
        if not self._tracer.recording.goes_on:
            return
        loops = self._tracer.recording.loops
        self._position, loops.position = loops.position, self._position
