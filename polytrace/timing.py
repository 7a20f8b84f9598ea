"""When a node of a generation acts: at which step, at each of several, at none in particular, or behind the last one.

Ops have no step of their own: one belongs to the latest step of its operands. Known from the nodes alone, so the client
and whoever decodes a request agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from polytrace.errors import GraphError
from polytrace.graph import Last, Mask, Node, NodeId, Op, Read, Save, Stop, Write, operands
from polytrace.ops import OPS


class When(NamedTuple):
    """The steps at which a node acts."""

    step: int
    num_steps: int = 1

    @property
    def last(self) -> int:
        return self.step + self.num_steps - 1

    @property
    def is_loop(self) -> bool:
        """Whether it was recorded once for several steps."""
        return self.num_steps > 1

    def __str__(self) -> str:
        if self == ENDING:
            return "the end of the generation"
        return f"steps {self.step}-{self.last}" if self.is_loop else f"step {max(0, self.step)}"


FIRST = When(0)  # of the prompts
TIMELESS = When(-1)  # of constants, parameters and what is made of them alone
ENDING = When(1 << 31)  # of what is made of `Last` nodes


def time_of(node: Node, known: Callable[[NodeId], When]) -> When:
    """When a node acts; `known` says it of its operands. Raises GraphError for values that cannot meet."""
    if isinstance(node, Last):
        return ENDING
    if isinstance(node, Read):
        return When(node.step, node.num_steps)
    values = joined(map(known, operands(node)), node.where)
    if isinstance(node, Mask) or (values == TIMELESS and isinstance(node, Op) and is_random(node.name)):
        return FIRST  # of the prompts; and what is drawn from nothing is drawn once
    if isinstance(node, Save) and node.step is None:
        return values
    if isinstance(node, (Write, Stop, Save)):
        own = When(node.step or 0, node.num_steps)
        check_in_time(values, own, type(node).__name__.lower(), node.where)
        return own
    return values


def is_random(name: str) -> bool:
    """Whether an op of the table draws."""
    return name in OPS and OPS[name].is_random


def joined(whens: Iterable[When], where: str) -> When:
    """When a value is there that is made of others."""
    latest, loop = TIMELESS, None
    for when in whens:
        if when.is_loop:
            if loop is not None and loop != when:
                raise GraphError(
                    f"values of {loop} and of {when}, each recorded once for all of its steps, do not meet at any one "
                    "step: write `for step in tracer.iter[...]`, whose body is recorded for each step",
                    where=where,
                )
            loop = when
        if when.step > latest.step:
            latest = when
    if loop is None:
        return latest
    if latest.step > loop.step:
        raise GraphError(
            f"a value of {latest} meets one that was recorded once for {loop}: write `for step in tracer.iter[...]`, "
            "whose body is recorded for each step",
            where=where,
        )
    return loop


def check_in_time(value: When, own: When, what: str, where: str) -> None:
    """Raises GraphError when a value comes only behind the step that needs it."""
    if value.is_loop and value != own:
        raise GraphError(f"a value of {value} cannot be used by a {what} at {own}", where=where)
    if value.step > own.step:
        raise GraphError(
            f"this {what} is at {own}, and its value is there only at {value}: {what} it at that step, or later",
            where=where,
        )
