"""The oracle: generations by plain Hugging Face, a sequence and a step at a time, with hooks and a cache of its own.

Tokens are drawn with `engine.sampling`, which `test_sampling` holds against transformers' processors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from families import Place
from generation_programs import (
    Add,
    Block,
    Favour,
    Fill,
    Flood,
    Keep,
    Lens,
    Look,
    Mix,
    Program,
    See,
    SeeToken,
    Shift,
    Slot,
    Statement,
    StopAt,
    Take,
)
from programs import vector
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from engine.sampling import Drawing, draw_tokens
from polytrace.graph import name_at


class _AbsentError(Exception):
    """A value of a step that did not come."""


@dataclass
class _Sequence:
    """One sequence as far as it has come."""

    tokens: list[int]
    cache: DynamicCache
    new: list[int] = field(default_factory=list)
    finish: str | None = None


@dataclass
class ByHand:
    """What a program saves and how its sequences go on."""

    values: dict[str, Tensor]
    generated: dict[tuple[int, int], tuple[tuple[int, ...], str]]


def run_by_hand(model: PreTrainedModel, program: Program, *, without_edits: bool = False) -> ByHand:
    return _Run(model, program, without_edits).run()


class _Run:
    def __init__(self, model: PreTrainedModel, program: Program, without_edits: bool) -> None:
        self.model, self.program, self.without_edits = model, program, without_edits
        self.values: dict[str, Tensor] = {}
        self.taken: dict[Slot, Tensor] = {}
        self.mixes = {one.slot: one for block in program.blocks for one in block.statements if isinstance(one, Mix)}
        self.sequences = [
            [_Sequence(list(prompt), DynamicCache(config=model.config)) for prompt in invoke.sequences]
            for invoke in program.invokes
        ]

    def run(self) -> ByHand:
        for step in range(self.program.num_steps):
            if not any(self._goes(invoke, step) for invoke in range(len(self.program.invokes))):
                break
            for invoke in range(len(self.program.invokes)):
                if self._goes(invoke, step):
                    self._step(invoke, step)
            for block in self._blocks(step):  # what saves a value of another invoke, behind all of them
                for one in block.statements:
                    if isinstance(one, (Keep, Lens)):
                        seen = self._slot if isinstance(one, Keep) else self._logits
                        self._save(name_at(one.name, step), lambda seen=seen, one=one: seen(one.slot))
        for ending in self.program.endings:
            came = []
            for slot in ending.slots:
                try:
                    came.append(self._slot(slot))
                except _AbsentError:
                    continue
            if came:
                self.values[ending.name] = torch.stack(came) if ending.is_stack else came[-1]
        told = {
            (invoke, place): (tuple(one.new), one.finish or "length")
            for invoke, each in enumerate(self.sequences)
            for place, one in enumerate(each)
            if self.program.invokes[invoke].generation is not None
        }
        return ByHand(self.values, told)

    def _blocks(self, step: int, invoke: int | None = None) -> list[Block]:
        return [
            block
            for block in self.program.blocks
            if block.step <= step < block.step + block.num_steps and invoke in (None, block.invoke)
        ]

    def _goes(self, invoke: int, step: int) -> bool:
        generation = self.program.invokes[invoke].generation
        if step == 0:
            return True
        return generation is not None and any(one.finish is None for one in self.sequences[invoke])

    def _slot(self, slot: Slot) -> Tensor:
        mix = self.mixes.get(slot)
        if mix is not None:
            first, second = (self._slot(part) for part in mix.parts)
            return (first + second) * 0.5
        if slot not in self.taken:
            raise _AbsentError
        return self.taken[slot]

    def _logits(self, slot: Slot) -> Tensor:
        norm, head = map(self.model.get_submodule, (self.program.family.norm, "lm_head"))
        with torch.no_grad():
            logits: Tensor = head(norm(self._slot(slot)[None]))
        return logits

    def _save(self, name: str, value: Callable[[], Tensor]) -> None:
        with suppress(_AbsentError):
            self.values[name] = value()

    def _step(self, invoke: int, step: int) -> None:
        """One forward of every sequence that goes on."""
        statements = [one for block in self._blocks(step, invoke) for one in block.statements]
        rows: dict[int, dict[int, Tensor]] = {}  # statement -> sequence -> what it saw
        going = [(place, one) for place, one in enumerate(self.sequences[invoke]) if one.finish is None]
        for place, one in going:
            seen = _Forward(self, statements, is_alone=len(self.sequences[invoke]) == 1).run(one, step)
            for number, row in seen.items():
                rows.setdefault(number, {})[place] = row
            self._draw(invoke, place, one, step, statements, rows)
        count = len(self.sequences[invoke])
        for number, found in rows.items():
            statement = statements[number]
            if isinstance(statement, See):
                found = _padded(found)
            some = next(iter(found.values()))
            whole = torch.stack([found.get(place, torch.zeros_like(some)) for place in range(count)])
            if isinstance(statement, Take):
                self.taken[statement.slot] = whole.mean(0)
            elif isinstance(statement, (Look, See, SeeToken)):
                self.values[name_at(statement.name, step)] = whole

    def _draw(
        self,
        invoke: int,
        place: int,
        one: _Sequence,
        step: int,
        statements: list[Statement],
        rows: dict[int, dict[int, Tensor]],
    ) -> None:
        generation = self.program.invokes[invoke].generation
        if generation is None:
            return
        drawing = Drawing(sampling=generation.sampling, places=(place,), step=step, histories=(one.tokens,))
        token = int(draw_tokens(self.logits[None], [drawing]))
        is_stopped = False
        for number, statement in enumerate(statements):
            if isinstance(statement, SeeToken):
                rows.setdefault(number, {})[place] = torch.tensor(token)
            elif isinstance(statement, Shift) and not self.without_edits:
                token = (token + statement.by) % 96
            elif isinstance(statement, StopAt):
                is_stopped |= token % 7 == statement.remainder
        one.tokens.append(token)
        one.new.append(token)
        if token in generation.eos:
            one.finish = "eos"
        elif is_stopped:
            one.finish = "stop"
        elif len(one.new) == generation.max_new_tokens:
            one.finish = "length"


class _Forward:
    """One forward of one sequence through the plain model, with a hook for each place that somebody names."""

    def __init__(self, run: _Run, statements: list[Statement], *, is_alone: bool) -> None:
        self.of, self.statements, self.is_alone = run, statements, is_alone
        self.seen: dict[int, Tensor] = {}

    def run(self, one: _Sequence, step: int) -> dict[int, Tensor]:
        """What statements saw, by their number."""
        todo: dict[tuple[str, str], list[int]] = {}
        for number, statement in enumerate(self.statements):
            place = _place(statement)
            if place is not None:
                todo.setdefault(place, []).append(number)
        tokens = one.tokens if step == 0 else one.tokens[-1:]
        with ExitStack() as stack, torch.no_grad():
            for (path, port), numbers in todo.items():
                module = self.of.model.get_submodule(path)
                if port == "output":
                    handle = module.register_forward_hook(lambda m, a, out, numbers=numbers: self._act(numbers, out))
                else:
                    handle = module.register_forward_pre_hook(self._before(numbers), with_kwargs=True)
                stack.callback(handle.remove)
            out = self.of.model(input_ids=torch.tensor([tokens]), past_key_values=one.cache, use_cache=True)
        self.of.logits = out.logits[0, -1]
        return self.seen

    def _before(self, numbers: list[int]) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._act(numbers, args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: self._act(numbers, kwargs[first])}

        return hook

    def _act(self, numbers: list[int], value: Any) -> Any:
        for number in numbers:
            statement = self.statements[number]
            tensor = value[0] if isinstance(value, tuple) else value
            if isinstance(statement, See):
                self.seen[number] = tensor[0].clone()
            elif isinstance(statement, (Take, Look)):
                self.seen[number] = tensor[0, -1].clone()
                if isinstance(statement, Take) and self.is_alone:
                    self.of.taken[statement.slot] = self.seen[number]
            elif self.of.without_edits:
                continue
            elif isinstance(statement, Add):
                self._add(statement, tensor)
            elif isinstance(statement, Flood):
                tensor += vector(statement.seed, statement.place.width, tensor.dtype)
            elif isinstance(statement, Fill):
                tensor[:, -1, slice(*statement.features)] = 0.0
            elif isinstance(statement, Favour):
                tensor[:, -1, statement.token] += 9.0
            else:
                value = value * 1.25
        return value

    def _add(self, statement: Add, tensor: Tensor) -> None:
        if statement.source is None:
            tensor[:, -1] += vector(statement.seed, statement.place.width, tensor.dtype)
            return
        with suppress(_AbsentError):  # a write of what did not come does not fire
            tensor[:, -1] += self.of._slot(statement.source)


def _padded(found: dict[int, Tensor]) -> dict[int, Tensor]:
    """All as long as the longest, with zeros before."""
    longest = max(map(len, found.values()))
    return {place: torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for place, row in found.items()}


def _place(statement: Statement) -> tuple[str, str] | None:
    if isinstance(statement, Favour):
        return "lm_head", "output"
    place: Place | None = getattr(statement, "place", None)
    return None if place is None else (place.module, place.port)
