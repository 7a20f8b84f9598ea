"""How one request goes on behind its prompts: which step it is at, what was drawn, and who has ended.

Owns the walk along a `Chain`. Which program runs next follows from what has come: a step while any sequence goes on,
then the ending, then nothing. Knows nothing of passes (`scheduling.scheduler`) and of how a token is drawn
(`engine.sampling`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from polytrace.certificate import Generated, Token
from polytrace.graph import NodeId
from scheduling.absence import absent_nodes
from scheduling.caches import Caches, SequenceId, caches_of
from scheduling.plan import NO_ROWS, Chain, Drawn, Program, ShardResult, Step
from scheduling.stopping import EOS, STOP, Decode, Stopping


@dataclass(slots=True)
class _Sequence:
    """One sequence as far as it has come."""

    prompt: tuple[int, ...]
    stopping: Stopping
    tokens: list[int] = field(default_factory=list)  # new ones
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish: str | None = None  # as of `Generated`


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sequence's row of a step."""

    token: int
    position: int


class Generating:
    """A generation on its way."""

    def __init__(self, program: Program, decode: Decode | None = None, caches: Caches | None = None) -> None:
        """`decode`: as of `scheduling.stopping`. Without `caches` each has what it begins with."""
        assert program.chain is not None
        self.base = program
        self.chain: Chain = program.chain
        self.step = 0  # that runs, or runs next; behind the last one, the ending's number
        self.is_ending = False
        self.caches: Caches = caches_of(program) if caches is None else caches
        self.told: list[Token] = []  # since somebody took them
        self._sequences: dict[SequenceId, _Sequence] = {
            (index, place): _Sequence(tokens, Stopping(invoke.generation, decode, tokens))
            for index, invoke in enumerate(program.invokes)
            if invoke.generation is not None
            for place, tokens in enumerate(invoke.sequences)
        }
        self.num_rows = len(self._sequences)  # of a step
        self.over: frozenset[int] = frozenset()  # invokes whose sequences have all ended
        self._stopped: set[SequenceId] = set()  # by the graph, at this step
        self.rows_of_steps: list[int] = []  # sequences that each step behind the prompts had
        self._left: set[NodeId] = set()  # what earlier steps have left
        self.absent: frozenset[NodeId] = frozenset()  # nodes of the program that do not come

    @property
    def program(self) -> Program:
        """What runs now."""
        run = self.run
        return self.base if run is None else self.chain.parts[run.part]

    @property
    def run(self) -> Step | None:
        """The step that runs now; None for step 0."""
        if self.is_ending:
            return self.chain.ending
        return None if self.step == 0 else self.chain.steps[self.step - 1]

    @property
    def num_steps(self) -> int:
        """Steps that have run."""
        return self.step

    @property
    def lengths(self) -> dict[SequenceId, int]:
        """Positions of each sequence that has a row in the step, with that."""
        if self.is_ending or not self.step:
            return {}
        going = ((key, one) for key, one in self._sequences.items() if one.finish is None)
        return {key: len(one.prompt) + len(one.tokens) for key, one in going}

    def cached(self, sequence: SequenceId) -> tuple[int, ...]:
        """The tokens whose keys and values a sequence's cache has at the end: the last one has run nowhere."""
        one = self._sequences[sequence]
        return (*one.prompt, *one.tokens[:-1])

    def rows(self, invoke: int) -> list[Row | None]:
        """What an invoke's sequences have in this step, None for those that have ended."""
        found: list[Row | None] = []
        for place in range(len(self.base.invokes[invoke].sequences)):
            one = self._sequences[invoke, place]
            position = len(one.prompt) + len(one.tokens) - 1
            found.append(Row(token=one.tokens[-1], position=position) if one.finish is None else None)
        return found

    def take(self, results: Sequence[ShardResult]) -> None:
        """What a pass of this step has drawn, and whom it ends."""
        request = self.base.request
        for result in results:
            if result.rank != 0:
                continue
            for stopped in result.stopped.get(request, ()):
                self._stopped.update((stopped.invoke, place) for place, over in enumerate(stopped.is_over) if over)
            for drawn in result.drawn.get(request, ()):
                self._take(drawn)

    def _take(self, drawn: Drawn) -> None:
        for place, token in enumerate(drawn.tokens):
            one = self._sequences[drawn.invoke, place]
            if token == NO_ROWS:
                continue
            assert one.finish is None, "a sequence that has ended has no rows"
            one.tokens.append(token)
            if drawn.logprobs:
                one.logprobs.append(drawn.logprobs[place])
                one.likeliest.append(drawn.likeliest[place])

    def advance(self) -> bool:
        """Goes on behind a step whose passes have all ended; False when there is nothing left to run."""
        if self.is_ending:
            return False
        for (invoke, place), one in self._sequences.items():
            if one.finish is not None or len(one.tokens) <= self.step:
                continue
            one.finish = one.stopping.advance(one.tokens[-1])
            if one.finish != EOS and (invoke, place) in self._stopped:
                one.finish = STOP
            self.told.append(
                Token(
                    invoke=invoke,
                    sequence=place,
                    step=self.step,
                    id=one.tokens[-1],
                    logprob=one.logprobs[-1] if one.logprobs else None,
                    likeliest=one.likeliest[-1] if one.likeliest else (),
                    finish=one.finish,
                )
            )
        self._stopped.clear()
        run = self.run
        holds, drops = (self.chain.holds, ()) if run is None else (run.holds, run.drops)
        self._left.difference_update(drops)
        self._left.update(node for place, node in holds.items() if place not in self.absent)
        self.step += 1
        self._count()
        if not self.num_rows:
            self.is_ending = self.chain.ending is not None
            if not self.is_ending:
                return False
        else:
            self.rows_of_steps.append(self.num_rows)
        self.absent = self._find_absent()
        return True

    def _count(self) -> None:
        going = [invoke for (invoke, _), one in self._sequences.items() if one.finish is None]
        if len(going) < self.num_rows:
            self.num_rows = len(going)
            self.over = frozenset(invoke for invoke, _ in self._sequences).difference(going)

    def _find_absent(self) -> frozenset[NodeId]:
        run, over = self.run, self.over
        assert run is not None
        missing = [carried for carried, node in run.binds.items() if node not in self._left]
        return absent_nodes(self.program.graph, () if self.is_ending else over, missing)

    def generated(self) -> Iterator[Generated]:
        """All that was drawn."""
        for (invoke, place), one in self._sequences.items():
            yield Generated(
                invoke=invoke,
                sequence=place,
                ids=tuple(one.tokens),
                finish=one.finish or "length",
                logprobs=tuple(one.logprobs),
                likeliest=tuple(one.likeliest),
            )
