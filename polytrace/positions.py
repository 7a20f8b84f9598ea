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


OPEN = "at"  # an index (OPEN, position) stands for the rows of a position in prompts that are not known yet


def has_open_positions(node: Node) -> bool:
    """Whether the node's columns follow from its prompts' lengths."""
    if not isinstance(node, Op) or node.name not in ("getitem", "setitem"):
        return False
    index = node.args[1]
    return isinstance(index, tuple) and len(index) == 2 and index[0] == OPEN


def with_positions(node: Node, lengths: Sequence[int]) -> Node:
    """The node with the columns of its prompts where it has positions that were open."""
    if not isinstance(node, Op) or not has_open_positions(node):
        return node
    base, index, *rest = node.args
    assert isinstance(index, tuple)
    return replace(node, args=(base, position_index(lengths, index[1]), *rest))


def _column(lengths: Sequence[int], prompt: int, position: Any) -> int:
    number = scalar(position)
    if not isinstance(number, int) or isinstance(number, bool):
        raise GraphError(f"a position is an integer, not {type(position).__name__}", where=user_line())
    length = lengths[prompt]
    if not -length <= number < length:
        raise GraphError(
            f"there is no position {number} in prompt {prompt}, which has {length} tokens (0-{length - 1})",
            where=user_line(),
        )
    pads = max(lengths) - length
    return pads + (number if number >= 0 else length + number)
