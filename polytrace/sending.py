"""The end of a trace's block: what was recorded becomes a request, runs, and its saved values get their data.

Each step is a method of its own, for other kinds of traces to add to. Recording itself is `polytrace.tracing`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from polytrace.backend import Result
from polytrace.certificate import Certificate, Receipt, ValueShape
from polytrace.errors import GraphError
from polytrace.given import given_names
from polytrace.graph import Constant, Graph, Invoke, Node, NodeId, Options, Request, Save, name_at
from polytrace.handing import hand_out
from polytrace.jobs import Job, Running, begin, in_thread
from polytrace.lines import user_line
from polytrace.logs import Log, LogPrinter
from polytrace.pricing import PricedError
from polytrace.progress import Hear, Tell, hear_nothing, showing_progress
from polytrace.recording import Recording
from polytrace.scanning import Checking, probing_nodes, unused_values
from polytrace.wire import MAX_EDITS, encode_request

if TYPE_CHECKING:
    from polytrace.model import Model


class Sending(ABC):
    """What a trace does when its block has ended."""

    def __init__(self, model: Model, options: Options, recording: Recording, *, is_run: bool) -> None:
        self.model = model
        self.options = options
        self.recording = recording
        self.where = user_line()
        self.checking = Checking.NONE
        self.is_blocking = True  # whether the end of the block waits for the result
        self.request: Request | None = None  # what was sent, once the block has ended
        self.certificate: Certificate | None = None  # what it would cost, once a scan or `validate=True` has asked
        self.logs: list[Log] = []  # what tracer.log was given; with data once it is there
        self._invokes: list[Invoke] = []
        self._is_run = is_run
        self._receipt: Receipt | None = None
        self._job: Job | None = None

    @abstractmethod
    def shape_of(self, node: NodeId) -> ValueShape:
        """Of a value that was recorded."""

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
