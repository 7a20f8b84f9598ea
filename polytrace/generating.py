"""`with model.generate(...)`: a trace of prompts that go on, step by step. Code in it acts at step 0, the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.backend import Result
from polytrace.caching import Cache
from polytrace.certificate import Token
from polytrace.continuations import Continuation, Continuations
from polytrace.errors import GraphError
from polytrace.generate_options import Ways, is_source
from polytrace.generation import check_stop_texts
from polytrace.graph import Invoke, Op, Operand, Options, Port, Ref, Site, Stop
from polytrace.images import plain_tokens
from polytrace.invoke_block import InvokeBlock
from polytrace.iterating import StepBlock, StepIndex
from polytrace.jobs import in_thread
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.loops import Position
from polytrace.progress import Hear, Tell, hear_nothing, tell_nobody
from polytrace.step_values import came
from polytrace.streaming import Piece, Pieces
from polytrace.timing import FIRST
from polytrace.tracing import Tracer

if TYPE_CHECKING:
    from polytrace.edits.sets import EditSet
    from polytrace.model import Model

TOKEN = Site(module="", port=Port.TOKEN)
Listener = Callable[[Piece], Any]


class GenerateTracer(Tracer):
    """`with model.generate(prompts, max_new_tokens=...) as tracer`."""

    def __init__(
        self,
        model: Model,
        prompts: Any,
        options: Options,
        is_run: bool,
        given: Mapping[str, Any],
        *,
        chat: Mapping[str, Any] | None = None,
        edits: Sequence[EditSet] = (),
        listener: Listener | bool | None = None,
        pixel_values: Any = None,
    ) -> None:
        """`given`: the keywords of `polytrace.generate_options`. `listener`: hears tokens; True prints their text."""
        self._ways = Ways(model.description, given, options.seed)
        self._own_way: Mapping[str, Any] = {}  # keywords of the invoke that is being made
        if not (listener is None or isinstance(listener, bool) or callable(listener)):
            raise GraphError(f"stream is a function or True, not {listener!r}", where=user_line())
        self._listener: Listener | None = _print if listener is True else listener or None
        self._results: dict[int | None, Continuations] = {}
        super().__init__(model, prompts, options, is_run, chat=chat, edits=edits, pixel_values=pixel_values)
        self.recording.goes_on = True

    def invoke(
        self, prompts: Any = None, *, chat: Mapping[str, Any] | None = None, pixel_values: Any = None, **own: Any
    ) -> InvokeBlock:
        """`with tracer.invoke(prompts, max_new_tokens=..., seed=...)`: keywords of `model.generate` for these prompts.

        `generate=False`, or `max_new_tokens=0`: they do not go on; their values are there for the others.
        """
        if (loop := self.recording.loops.position.loop) is not None:
            raise GraphError(f"prompts are given before the loop over steps at {loop.where} begins", where=user_line())
        self._own_way = own
        try:
            return super().invoke(prompts, chat=chat, pixel_values=pixel_values)
        finally:
            self._own_way = {}

    @property
    def hint(self) -> str:
        """Nothing can be looked at: a step's values are there when those before it have run."""
        return ""

    @property
    def iter(self) -> StepIndex:
        """`for step in tracer.iter[...]`, `with tracer.iter[...]`: code for an int, a slice or a list of steps."""
        return StepIndex(self)

    def all(self) -> StepBlock:
        """`with tracer.all()`: code for all steps, recorded once. `for step in tracer.all()` records it for each."""
        return self.iter[:]

    def next(self, step: int = 1) -> GenerateTracer:
        """Code behind this acts so many steps later."""
        self.move_on(None, step)
        return self

    def move_on(self, module: str | None, count: int) -> None:
        self.invoke_index("a step")
        number = scalar(count)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise GraphError(f"next() goes on by 1 step or more, not by {count!r}", where=user_line())
        self.recording.loops.are_used = True
        self.recording.loops.position.move(module, number)

    @property
    def token(self) -> Any:
        """The tokens that this step has drawn, `[sequences]`: read, and assigned to have others in their place."""
        invoke = self.invoke_index("a token")
        for member in self.members_of(invoke):
            if self._invokes[member].generation is None:
                raise GraphError("this prompt does not go on, so it has no next token", where=user_line())
        return self.wrap(self.recording.read(TOKEN, invoke, "int64"))[:, -1]

    @token.setter
    def token(self, ids: Any) -> None:
        self.token[...] = ids

    def stop(self, when: Any = None) -> None:
        """Ends sequences behind this step: all of this invoke, or those where `when` is true (not zero).

        `when`: a value of one number, or of one for each sequence.
        """
        where = user_line()
        invoke = self.invoke_index("tracer.stop()")
        step = self.recording.when(None, invoke, where)
        flag = scalar(True if when is None else when)
        if isinstance(flag, (bool, int, float)):
            operand: Operand = Ref(self.recording.own_constant("bool", (), bytes([bool(flag)]), where))
        else:
            operand = self.recording.operand(when, where)
        if not isinstance(operand, Ref):
            raise GraphError(f"stop takes a value of the trace or a truth, not {when!r}", where=where)
        for member, own in self._of_members(operand, invoke, where):
            self.recording.add(Stop(value=own, invoke=member, where=where, step=step.step, num_steps=step.num_steps))

    def _of_members(self, flag: Ref, invoke: int, where: str) -> Iterator[tuple[int, Ref]]:
        """Each member of an invoke with what it has of a value of one number, or of one for each sequence."""
        members = self.members_of(invoke)
        counts = [len(self._invokes[member].sequences) for member in members]
        shape = self.shape_of(flag.node).shape if len(members) > 1 else ()
        if math.prod(shape) == 1:
            yield from ((member, flag) for member in members)
            return
        if shape != (sum(counts), *(1,) * (len(shape) - 1)):
            told = f"one for each of the {sum(counts)} sequences of all prompts, not shape {list(shape)}"
            raise GraphError(f"tracer.stop(when=value) takes one value, or {told}", where=where)
        first = 0
        for member, count in zip(members, counts, strict=True):
            index = (slice(first, first + count),)
            yield member, Ref(self.recording.add(Op(name="getitem", args=(flag, index), where=where)))
            first += count

    @property
    def result(self) -> Continuations:
        """How the sequences of this invoke went on, outside of one those of all: there when the block has ended."""
        invoke = None if self._invoke is None or self._invoke < 0 else self._invoke
        if invoke not in self._results:
            self._results[invoke] = Continuations(lambda: self._continuations(invoke))
        return self._results[invoke]

    def cache(self, *modules: Any, **how: Any) -> Cache:
        """As of a trace: of step 0, the prompts."""
        position = self.recording.loops.position
        if position.loop is not None or position.of() != FIRST:
            raise GraphError(
                "a cache is of step 0, the prompts: write it before the loop, and save what you need of other steps",
                where=user_line(),
            )
        return super().cache(*modules, **how)

    def log(self, first: Any, second: Any = None) -> None:
        """As of a trace; in `for step in tracer.iter[...]` at each step."""
        loop = self.recording.loops.position.loop
        if loop is not None and loop.is_once:
            raise GraphError(
                f"a log is printed once, and the body at {loop.where} is recorded once for several steps: write "
                "`for step in tracer.iter[...]`",
                where=user_line(),
            )
        super().log(first, second)

    def _close(self) -> None:
        loops = self.recording.loops
        position, loops.position = loops.position, Position()  # caches are of the prompts
        try:
            super()._close()
        finally:
            loops.position = position

    def _hand_out(self, names: tuple[str, ...], results: dict[str, Any]) -> None:
        super()._hand_out(names, results)
        for container in self.containers:
            if isinstance(container, list):  # what was put in at a step that never came was never put in
                container[:] = came(container)

    def _continuations(self, invoke: int | None) -> list[Continuation]:
        tokenizer, info = self.model.tokenizer, self.model.description.images
        return [
            Continuation(plain_tokens(self._invokes[one.invoke].sequences[one.sequence], info), one, tokenizer)
            for one in self.receipt.generated
            if invoke is None or one.invoke == invoke
        ]

    def _goes_on(self, invoke: Invoke) -> Invoke:
        own = dict(self._own_way)
        if is_source(own):
            return invoke
        own.pop("generate", None)
        going = self._ways.of(invoke, own)
        check_stop_texts([going], lambda: self.model.tokenizer is not None, user_line())
        return going

    def _sent(self, error: BaseException | None) -> tuple[str, ...] | None:
        if self._listener is not None and not self.is_blocking:
            told = "stream= wants somebody who waits: leave out blocking=False, or ask tracer.job how far it is"
            raise GraphError(told, where=self.where)
        return super()._sent(error)

    async def _awaited(self) -> Result:
        return await (super()._awaited() if self._listener is None else in_thread(self._run, tell_nobody, hear_nothing))

    def _run(self, tell: Tell, hear: Hear) -> Result:
        assert self.request is not None
        if self._listener is None:
            return super()._run(tell, hear)
        listener, pieces = self._listener, Pieces(self.model.tokenizer, self._invokes)

        def hear_tokens(tokens: Iterable[Token]) -> None:
            for piece in pieces.of(tokens):
                listener(piece)

        return self.model.backend.run(self.request, tell, hear, hear_tokens)


def _print(piece: Piece) -> None:
    print(piece.text, end="" if piece.finish is None else "\n", flush=True)
