"""The nearest smaller request: the same with fewer prompts, fewer new tokens or a shorter prompt, or smaller saves.

For refusals that say what would fit. Each way gives whole requests, which the caller works out like any other: so a
number that is told was tried. Knows nothing of limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from polytrace.graph import (
    GradWrite,
    Graph,
    Invoke,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    Read,
    Ref,
    Request,
    Save,
    Stop,
    Write,
    operands,
)
from polytrace.pruning import renumber
from scheduling.plan import SaveSlot

_LISTS = frozenset({"stack", "cat", "hstack", "vstack", "dstack"})  # that lose what is not there


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way in which a request may be smaller, in steps."""

    told: Callable[[int], str]  # what so many steps are, for people
    total: int  # steps that it has now
    counts: Sequence[int]  # of steps, fewer than it has, ascending
    take: Callable[[int], Request]  # the request of so many


def ways(request: Request) -> Iterator[Way]:
    """Those that the request has, the likeliest to be meant first."""
    invokes = request.invokes
    if len(invokes) > 1:
        word = "prompts" if all(len(one.sequences) == 1 for one in invokes) else "invokes"
        closed = [count for count in range(1, len(invokes)) if _first_invokes(request, count) is not None]
        yield Way(
            told=lambda count: f"{count} of these {len(invokes)} {word} would fit",
            total=len(invokes),
            counts=closed,
            take=lambda count: _first_invokes(request, count) or request,
        )
        return
    if not invokes or invokes[0].inputs is not None:
        return
    only = invokes[0]
    if (count := len(only.sequences)) > 1:
        yield Way(
            told=lambda some: f"{some} of these {count} prompts would fit",
            total=count,
            counts=range(1, count),
            take=lambda some: _with_invoke(request, replace(only, sequences=only.sequences[:some])),
        )
    if (going := only.generation) is not None and going.max_new_tokens > 1:
        yield Way(
            told=lambda some: f"max_new_tokens={some} would fit instead of {going.max_new_tokens}",
            total=going.max_new_tokens,
            counts=range(1, going.max_new_tokens),
            take=lambda some: _with_invoke(request, replace(only, generation=replace(going, max_new_tokens=some))),
        )
    if count == 1 and (length := len(only.sequences[0])) > 1:
        yield Way(
            told=lambda some: f"the first {some} of its {length} tokens would fit",
            total=length,
            counts=range(1, length),
            take=lambda some: _with_invoke(request, replace(only, sequences=(only.sequences[0][:some],))),
        )


def smaller_save(slots: Iterable[SaveSlot], excess: int, where: Callable[[SaveSlot], str]) -> str | None:
    """How much of the last dimension of the largest save may be saved when all saves are so many bytes too many."""
    largest = max(slots, key=lambda slot: slot.facts.num_bytes, default=None)
    if largest is None or not largest.facts.shape:
        return None
    size = largest.facts.shape[-1]
    column = largest.facts.num_bytes // max(1, size)
    kept = size - -(-excess // max(1, column))
    if kept < 1:
        return None
    shape = list(largest.facts.shape)
    return f"{largest.name!r} of {where(largest)} is {shape}; save [..., :{kept}] of it"


def most(counts: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of these counts that fits, None where the smallest does not. What more needs, more still needs."""
    low, high = -1, len(counts)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(counts[middle]) else (low, middle)
    return counts[low] if low >= 0 else None


def _with_invoke(request: Request, invoke: Invoke) -> Request:
    return replace(request, invokes=(invoke,))


def _first_invokes(request: Request, count: int) -> Request | None:
    """The first invokes alone, with what depends on no other; lists of values lose those of others.

    None where an effect on one of the first needs another one: that would be another program.
    """
    nodes: list[Node] = list(request.graph.nodes)
    gone = bytearray(len(nodes))
    for place, node in enumerate(nodes):
        if isinstance(node, (Read, Write, Mask, Stop)) and node.invoke >= count:
            gone[place] = 1
        elif any(gone[part] for part in operands(node)):
            if isinstance(node, Op) and node.name in _LISTS and (fewer := _without(node, gone)) is not None:
                nodes[place] = fewer
            elif isinstance(node, (Write, Stop, GradWrite)):
                return None
            else:
                gone[place] = 1
    kept = [NodeId(place) for place in range(len(nodes)) if not gone[place]]
    if not any(isinstance(nodes[place], Save) for place in kept):
        return None
    left = {node.name for place in kept if isinstance(node := nodes[place], Save)}
    return replace(
        request,
        graph=Graph(nodes=renumber(nodes, kept)[0]),
        invokes=request.invokes[:count],
        keeps=tuple(keep for keep in request.keeps if keep.save in left),
    )


def _without(op: Op, gone: bytearray) -> Op | None:
    """A list's op without the values that are gone; None when that leaves nothing, or they are not of a list."""
    first = op.args[0] if op.args else None
    if not isinstance(first, (tuple, list)):
        return None
    parts: list[Operand] = [part for part in first if not (isinstance(part, Ref) and gone[part.node])]
    others = replace(op, args=(None, *op.args[1:]))
    if not parts or any(gone[part] for part in operands(others)):
        return None
    return replace(op, args=(tuple(parts), *op.args[1:]))
