"""At which steps of a generation an edit acts: at all, unless it names places in the prompt, which only step 0 has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from polytrace.graph import Mask, Node, Op, Operand, Read, Ref
from polytrace.positions import has_positions
from polytrace.timing import FIRST, When


def steps_of_edit(
    nodes: Sequence[Node], lengths: Sequence[int], num_steps: int
) -> Iterator[tuple[When, Sequence[int]]]:
    """The steps for which an edit's nodes are added, each with the tokens of every sequence there."""
    if num_steps == 1 or any(_is_of_prompt(node, nodes) for node in nodes):
        yield FIRST, lengths
    elif any(map(has_positions, nodes)):  # the last token's column, which is another one behind the prompts
        yield FIRST, lengths
        yield When(1, num_steps - 1), (1,) * len(lengths)
    else:
        yield When(0, num_steps), lengths


def _is_of_prompt(node: Node, nodes: Sequence[Node]) -> bool:
    """Whether a node means certain tokens of a prompt, other than its last."""
    if isinstance(node, Mask):
        return True
    if isinstance(node, Read):
        return node.site.port.has_earlier
    if not isinstance(node, Op) or node.name not in ("getitem", "setitem"):
        return False
    index = node.args[1]
    if has_positions(node):
        assert isinstance(index, tuple)
        return index[1] not in (-1, (-1,), [-1])
    base = node.args[0]
    if not isinstance(base, Ref) or not isinstance(nodes[base.node], Read) or not isinstance(index, tuple):
        return False
    return len(index) > 1 and index[0] is not Ellipsis and not _is_any_step(index[1])


def _is_any_step(columns: Operand) -> bool:
    """Whether an index of tokens means the same at every step: all, or the last."""
    if isinstance(columns, slice):
        return columns in (slice(None), slice(-1, None))
    return columns == -1 or columns is Ellipsis or columns is None
