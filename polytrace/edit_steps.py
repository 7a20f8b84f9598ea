"""At which steps of a generation an edit acts: at all, unless it names places in the prompt, which only step 0 has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from polytrace.description import ModelDescription, Rows
from polytrace.graph import Mask, Node, NodeId, Op, Operand, Read, Ref, Write, operands
from polytrace.positions import has_positions
from polytrace.sources import Sources
from polytrace.timing import FIRST, When


def steps_of_edit(
    nodes: Sequence[Node], lengths: Sequence[int], num_steps: int, encoder: frozenset[NodeId]
) -> Iterator[tuple[When, Sequence[int]]]:
    """The steps for which an edit's nodes are added, each with the tokens of every sequence there.

    `encoder`: those of `encoder_nodes`, which are added at step 0 alone and stay what they are.
    """
    decoder = [node for place, node in enumerate(nodes) if place not in encoder]
    is_of_prompt = any(_is_of_prompt(node, nodes) for node in decoder)
    if num_steps == 1 or is_of_prompt or (encoder and not any(isinstance(node, (Read, Write)) for node in decoder)):
        yield FIRST, lengths
    elif encoder or any(has_positions(node) or isinstance(node, Mask) for node in decoder):  # other ones later
        yield FIRST, lengths
        yield When(1, num_steps - 1), (1,) * len(lengths)
    else:
        yield When(0, num_steps), lengths


def encoder_nodes(nodes: Sequence[Node], description: ModelDescription) -> frozenset[NodeId]:
    """Those at sites of an encoder, which reads the prompt at step 0 alone, and what is made of these values alone."""
    rows = {(info.module, info.port): info.rows for info in description.sites}
    if Rows.DECODER not in rows.values():
        return frozenset()
    sources = Sources(description)
    found: set[NodeId] = set()
    of_decoder: set[NodeId] = set()
    for place, node in enumerate(nodes):
        own = NodeId(place)
        if isinstance(node, (Read, Write)):
            at = rows.get((node.site.module, node.site.port))
            if at is None and (info := sources.site(node.site.module, node.site.port)) is not None:
                at = info.rows
            (of_decoder if at is Rows.DECODER else found).add(own)
        else:
            needed = {*operands(node)}
            if needed & of_decoder:
                of_decoder.add(own)
            elif needed & found:
                found.add(own)
    return frozenset(found)


def _is_of_prompt(node: Node, nodes: Sequence[Node]) -> bool:
    """Whether a node means certain tokens of a prompt, other than its last."""
    if isinstance(node, Read):
        return node.site.port.has_earlier
    if not isinstance(node, Op) or node.name not in ("getitem", "setitem"):
        return False
    index = node.args[1]
    if has_positions(node):
        assert isinstance(index, tuple)
        return index[1] not in (-1, (-1,), [-1])
    base = node.args[0]
    if not isinstance(base, Ref) or not isinstance(nodes[base.node], (Read, Mask)) or not isinstance(index, tuple):
        return False
    return len(index) > 1 and index[0] is not Ellipsis and not _is_any_step(index[1])


def _is_any_step(columns: Operand) -> bool:
    """Whether an index of tokens means the same at every step: all, or the last."""
    if isinstance(columns, slice):
        return columns in (slice(None), slice(-1, None))
    return columns == -1 or columns is Ellipsis or columns is None
