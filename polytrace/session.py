"""Several traces as one request: what an earlier one gave is used in later ones and never leaves the service.

Owns what a trace in a session may be, and `repeat`, the bounded loop. There is one program: each trace adds its prompts
and its nodes to the session's. Traces that exchange nothing run in one pass; where a value is needed at an earlier
layer than it comes from, a later pass of the same request begins. A loop's body is recorded anew in every step, so
Python variables carry values from step to step; steps that are equal are written once when the request is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from polytrace.backend import Result
from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import Options, Request, Sharing
from polytrace.invoke_block import InvokeBlock
from polytrace.lines import user_line
from polytrace.logs import LogPrinter
from polytrace.scanning import Checking
from polytrace.tracing import Tracer, open_trace

if TYPE_CHECKING:
    from polytrace.edits.sets import EditSet
    from polytrace.model import Model


class Session(Tracer):
    """`with model.session() as session`: the traces inside are one request, sent when this block ends."""

    def __init__(self, model: Model, options: Options, is_run: bool, *, is_peeking: bool) -> None:
        super().__init__(model, None, options, is_run, is_peeking=is_peeking)
        self.traces: list[SessionTrace] = []
        self.broken: str | None = None  # why it cannot be sent any more

    @property
    def told(self) -> str:
        return "this session sends when its block ends, so until then a recorded value has no data"

    @property
    def hint(self) -> str:
        return ", or use session(..., peek=True)"

    def invoke(
        self, prompts: Any = None, *, chat: Mapping[str, Any] | None = None, pixel_values: Any = None
    ) -> InvokeBlock:
        raise GraphError(
            "a session has traces, and these have prompts: write `with model.trace(prompts):` inside", where=user_line()
        )

    def add_trace(
        self,
        prompts: Any,
        *,
        seed: int | None,
        sharing: Sharing | None,
        run: bool,
        validate: bool,
        edits: Sequence[EditSet],
        peek: bool,
        chat: Mapping[str, Any] | None,
        pixel_values: Any,
    ) -> SessionTrace:
        """What `model.trace(...)` is in the session. Raises GraphError for options that are not the session's."""
        own = self.options
        given: list[tuple[str, Any, Any]] = [
            ("seed", own.seed if seed is None else seed, own.seed),
            ("sharing", own.sharing.value if sharing is None else sharing.value, own.sharing.value),
            ("run", run, True),
            ("validate", validate or self.checking is Checking.VALIDATE, self.checking is Checking.VALIDATE),
            ("peek", peek or self.recording.peeks is not None, self.recording.peeks is not None),
        ]
        for name, wanted, has in given:
            if wanted != has:
                raise GraphError(
                    f"a session is one request, so {name} is the same for all of its traces: give it to the session, "
                    f"as in model.session({name}={wanted!r})",
                    where=user_line(),
                )
        made = SessionTrace(self, prompts, edits, chat, pixel_values)
        self.traces.append(made)
        return made

    def repeat(self, n: int, data: Iterable[Any] | None = None) -> Iterator[Any]:
        """A loop: `for step in session.repeat(n)`, or `for step, batch in session.repeat(n, data=batches)`.

        `data`: prompts, or whatever a step needs (`(prompts, tensors)`), one for each step; when there are fewer they
        are taken in turn again. Variables of the body carry recorded values from step to step. Raises TooLargeError
        when so many steps have more nodes than the model takes in one request.
        """
        where = user_line()
        limit = self.model.description.limits.max_nodes
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise GraphError(f"a loop has a number of steps, 1 or more, not {n!r}", where=where)
        if n > limit:
            raise TooLargeError(f"{n} steps are more than the {limit} nodes of one request", where=where)
        batches = None if data is None else list(islice(data, n))
        if batches is not None and not batches:
            raise GraphError("the data of this loop is empty", where=where)
        return self._steps(n, batches, limit, where)

    def _steps(self, n: int, batches: list[Any] | None, limit: int, where: str) -> Iterator[Any]:
        nodes = self.recording.nodes
        for step in range(n):
            if open_trace() is not self:
                raise GraphError("each step of a loop begins between two traces of its session", where=user_line())
            before = len(nodes)
            yield step if batches is None else (step, batches[step % len(batches)])
            own = len(nodes) - before
            if own and len(nodes) + (n - step - 1) * own > limit:
                raise TooLargeError(
                    f"{n} steps of {own} nodes are more than the {limit} that one request may have: "
                    f"at most {step + 1 + max(0, limit - len(nodes)) // own} steps fit",
                    where=where,
                )

    def _sent(self, error: BaseException | None) -> tuple[str, ...] | None:
        if error is None and self.broken is not None:
            self.recording.closed = self.broken
            raise GraphError(self.broken, where=user_line())
        names = super()._sent(error)
        for trace in self.traces:
            trace.request = self.request
        return names

    def _land(self, names: tuple[str, ...], printer: LogPrinter, result: Result) -> Result:
        landed = super()._land(names, printer, result)
        for trace in self.traces:
            trace._receipt = self._receipt
        return landed


class SessionTrace(Tracer):
    """`with model.trace(...)` in a session. Its receipt, once the session has ended, is that of the session."""

    def __init__(
        self,
        session: Session,
        prompts: Any,
        edits: Sequence[EditSet],
        chat: Mapping[str, Any] | None,
        pixel_values: Any,
    ) -> None:
        self._session = session
        self._own: list[int] = []  # its invokes
        super().__init__(
            session.model,
            prompts,
            session.options,
            True,
            chat=chat,
            home=session,
            edits=edits,
            pixel_values=pixel_values,
        )

    def built_request(self) -> Request:
        if self.request is None:
            raise GraphError(
                "a trace in a session is part of the session's request: write model.validate(session)",
                where=user_line(),
            )
        return self.request

    def _add_invoke(self, prompts: Any, chat: Mapping[str, Any] | None = None, pixel_values: Any = None) -> int:
        self._own.append(super()._add_invoke(prompts, chat, pixel_values))
        return self._own[-1]

    def _own_invokes(self) -> Sequence[int]:
        return self._own

    def _sent(self, error: BaseException | None) -> None:
        """Nothing is sent: the session goes on, and what it has of this trace is no part of the model any more."""
        self.recording.over.update(self._own)
        if error is not None:
            self._session.broken = (
                f"the trace that began at {self.where} ended with {type(error).__name__}; a session is sent whole, so "
                "nothing of it was"
            )
