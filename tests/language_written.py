"""Random programs as a user writes them, on a model of polytrace."""

from __future__ import annotations

from typing import Any

from language_meanings import change, compute, given_to, instead, made, tokens_first
from language_programs import Apply, Call, Edit, Mask, Program, Read, Skip, Statement, Weigh
from programs import find


def record(model: Any, program: Program, **options: Any) -> Any:
    """The trace; its saves in the order of `language_by_hand`."""
    with model.trace(**options) as tracer:
        values: dict[str, Any] = {}
        for number, block in enumerate(program.blocks):
            with tracer.invoke([list(prompt) for prompt in block.prompts]) if block.prompts else tracer.invoke():
                lengths = [len(prompt) for prompt in program.prompts_of(number)]
                for statement in block.statements:
                    _write(model, tracer, statement, values, lengths)
                for name in block.saved:
                    values[name].save()
    return tracer


def _write(model: Any, tracer: Any, statement: Statement, values: dict[str, Any], lengths: list[int]) -> None:
    match statement:
        case Read(name, spot):
            values[name] = spot.get(model)
        case Weigh(name, owner, weight, row):
            values[name] = getattr(find(model, owner) if owner else model, weight)[row : row + 1]
        case Mask(name):
            values[name] = tracer.mask
        case Apply(name, _, operands, _):
            values[name] = compute(statement, [values[each] for each in operands], lengths)
        case Call(name, path, operand, shape):
            given = values[operand]
            values[name] = find(model, path)(given_to(given, shape))
        case Edit(spot, how, operand, numbers, assigns):
            value, view = values[operand] if operand else None, spot.get(model)
            if assigns:
                new = made(how, tokens_first(view, spot), value, numbers, min(lengths))
                spot.put(model, tokens_first(new, spot))
            else:
                change(how, tokens_first(view, spot), value, numbers, min(lengths))
        case Skip(path, operand):
            module = find(model, path)
            module.skip(instead(module.input, values[operand] if operand else None))
