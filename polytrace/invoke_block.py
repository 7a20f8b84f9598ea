"""The block of one set of prompts in a trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytrace.errors import GraphError, PolytraceError
from polytrace.lines import user_line
from polytrace.loops import Position
from polytrace.tracebacks import shorten

if TYPE_CHECKING:
    from polytrace.tracing import Tracer


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
        except PolytraceError as failure:
            shorten(failure)
            raise
        finally:
            self._tracer._invoke = self._around
            self._swap_positions()

    def _swap_positions(self) -> None:
        """Each invoke has its own: what `next()` says in one is nothing to the others."""
        if not self._tracer.recording.goes_on:
            return
        loops = self._tracer.recording.loops
        self._position, loops.position = loops.position, self._position
