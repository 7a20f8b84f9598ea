"""Token positions as a user counts them, in each prompt, turned into columns of the left-padded view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from polytrace.errors import GraphError
from polytrace.graph import Node, Op
from polytrace.lines import user_line
from polytrace.literals import scalar


def position_index(lengths: Sequence[int], position: Any) -> tuple[Any, ...]:
    """The index of the rows at `position` in every prompt: slices where the columns agree, else lists."""
    if not isinstance(position, (list, tuple, range)):
        columns = [_column(lengths, prompt, position) for prompt in range(len(lengths))]
        if len(set(columns)) == 1:
            return (slice(None), columns[0])
        return (list(range(len(lengths))), columns)
    table = [[_column(lengths, prompt, one) for one in position] for prompt in range(len(lengths))]
    if all(row == table[0] for row in table):
        return (slice(None), table[0])
    return ([[prompt] for prompt in range(len(lengths))], table)


def prompt_index(lengths: Sequence[int], prompts: Any, positions: Any = None) -> tuple[Any, ...]:
    """The index of chosen prompts' rows: all, or each prompt's at its own of as many positions, or at one for all."""
    chosen = [_prompt(lengths, prompt) for prompt in _several(prompts)]
    if positions is None:
        return (chosen,)
    places = _several(positions)
    if len(chosen) > 1 < len(places) != len(chosen):
        raise GraphError(
            f"{len(places)} positions do not go with {len(chosen)} prompts: give one, or one for each prompt",
            where=user_line(),
        )
    count = max(len(chosen), len(places))
    chosen, places = (own * count if len(own) == 1 else own for own in (chosen, places))
    return (chosen, [_column(lengths, prompt, place) for prompt, place in zip(chosen, places, strict=True)])


OPEN = "at"  # an index (OPEN, position) stands for the rows of a position in prompts that are not known yet


def with_positions(node: Node, lengths: Sequence[int]) -> Node:
    """The node with the columns of its prompts where it has positions that were open."""
    if not isinstance(node, Op) or not has_positions(node):
        return node
    base, index, *rest = node.args
    assert isinstance(index, tuple)
    return replace(node, args=(base, position_index(lengths, index[1]), *rest))


def has_positions(node: Node) -> bool:
    """Whether a node has positions that are open."""
    if not isinstance(node, Op) or node.name not in ("getitem", "setitem"):
        return False
    index = node.args[1]
    return isinstance(index, tuple) and len(index) == 2 and isinstance(index[0], str) and index[0] == OPEN


def _several(numbers: Any) -> list[Any]:
    return list(numbers) if isinstance(numbers, (list, tuple, range)) else [numbers]


def _prompt(lengths: Sequence[int], prompt: Any) -> int:
    number = scalar(prompt)
    if not isinstance(number, int) or isinstance(number, bool) or not -len(lengths) <= number < len(lengths):
        raise GraphError(f"there is no prompt {prompt!r}; there are {len(lengths)}", where=user_line())
    return number % len(lengths)


def _column(lengths: Sequence[int], prompt: int, position: Any) -> int:
    number = scalar(position)
    if not isinstance(number, int) or isinstance(number, bool):
        raise GraphError(f"a position is an integer, not {type(position).__name__}", where=user_line())
    length = lengths[prompt]
    if not -length <= number < length:
        told = f"prompt {prompt}" if len(lengths) > 1 else "this prompt"
        raise GraphError(
            f"there is no position {number} in {told}, which has {length} tokens (0-{length - 1})",
            where=user_line(),
        )
    pads = max(lengths) - length
    return pads + (number if number >= 0 else length + number)
