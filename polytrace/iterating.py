"""`tracer.iter[...]`: a block of code for some steps of a generation, as a `for` or as a `with`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from polytrace.errors import GraphError, TooLargeError
from polytrace.lines import user_frame, user_line
from polytrace.literals import scalar
from polytrace.loops import OF_ALL_PROMPTS, Loop
from polytrace.timing import When
from polytrace.variables import variables

if TYPE_CHECKING:
    from polytrace.generating import GenerateTracer


class StepIndex:
    """`tracer.iter`: an int, a slice or a list of ints chooses steps; by itself it is all of them."""

    def __init__(self, tracer: GenerateTracer) -> None:
        self._tracer = tracer

    def __getitem__(self, key: Any) -> StepBlock:
        return StepBlock(self._tracer, self._steps(key))

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def _steps(self, key: Any) -> list[int]:
        invoke = self._tracer.invoke_index("a loop over steps")
        if invoke < 0:
            raise GraphError(OF_ALL_PROMPTS, where=user_line())
        limit = self._tracer.num_steps(invoke)
        if isinstance(key, slice):
            return self._in_order([*range(limit)][key], key)
        several = key if isinstance(key, (list, tuple, range)) else [key]
        steps: list[int] = []
        for one in several:
            number = scalar(one)
            if not isinstance(number, int) or isinstance(number, bool):
                raise GraphError(f"steps are whole numbers, slices or lists of them, not {one!r}", where=user_line())
            if not -limit <= number < limit:
                raise GraphError(
                    f"there is no step {number}: with at most {limit} new tokens steps are 0-{limit - 1}",
                    where=user_line(),
                )
            steps.append(number % limit)
        return self._in_order(steps, key)

    @staticmethod
    def _in_order(steps: list[int], key: Any) -> list[int]:
        if steps != sorted(set(steps)):
            raise GraphError(f"steps come in their order, each once, not as {key!r}", where=user_line())
        return steps


class StepBlock:
    """`for step in tracer.iter[...]`: recorded for each step. `with tracer.iter[...]`: once for all of them."""

    def __init__(self, tracer: GenerateTracer, steps: list[int]) -> None:
        self._tracer = tracer
        self._loops = tracer.recording.loops
        self._steps = steps
        self._loop: Loop | None = None  # of the `with`
        self._before: Mapping[str, Any] = {}
        self._where = user_line()

    def __iter__(self) -> Iterator[int]:
        self._check()
        return self._bodies(Loop(self._where, is_once=False))

    def _bodies(self, loop: Loop) -> Iterator[int]:
        nodes, limit = self._tracer.recording.nodes, self._tracer.model.description.limits.max_nodes
        for number, step in enumerate(self._steps):
            self._loops.begin(loop, When(step))
            before = len(nodes)
            try:
                yield step
            finally:
                self._loops.end(loop)
            left, own = len(self._steps) - number - 1, len(nodes) - before
            if len(nodes) + left * own > limit:
                raise TooLargeError(
                    f"{len(self._steps)} steps of {own} nodes are more than the {limit} that one request may have",
                    where=self._where,
                )

    def __enter__(self) -> StepBlock:
        self._check()
        steps = self._steps
        if not steps:
            raise GraphError("there are no such steps, and the body of a `with` is always run", where=user_line())
        if steps != [*range(steps[0], steps[-1] + 1)]:
            raise GraphError(
                "a body that is recorded once is for steps one behind the other: write `for step in tracer.iter[...]`",
                where=user_line(),
            )
        self._before = variables(user_frame())
        self._loop = Loop(self._where, is_once=len(steps) > 1)
        self._loops.begin(self._loop, When(steps[0], len(steps)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._loop is not None
        self._loops.end(self._loop)
        if error is None and self._loop.is_once:
            self._loops.check_rebinding(self._loop, self._before, self._where)

    def _check(self) -> None:
        self._tracer.invoke_index("a loop over steps")
        if self._loops.position.loop is not None:
            told = f"a loop over steps is open already, since {self._loops.position.loop.where}"
            raise GraphError(told, where=user_line())

    def _refuse(self, *others: Any) -> NoReturn:
        raise GraphError(
            "the body of a `with` is recorded once for all of its steps, so there is no number: write "
            "`for step in tracer.iter[...]`",
            where=user_line(),
        )

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __index__ = __int__ = __float__ = __bool__ = __add__ = __sub__ = __mod__ = _refuse

    def __hash__(self) -> int:
        return id(self)
