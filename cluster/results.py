"""The layout of a result file: the room for its header, and in the end what is in it.

Of a generation every step has its place beforehand, and not all may come: the file ends behind the last value that
came, and what is empty before is told as bytes of no meaning, because readers of the format know no holes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from polytrace.graph import NodeId, Request
from polytrace.wire import HOLE, result_room
from scheduling.plan import Program, SaveSlot, ValueFacts
from scheduling.step_saves import all_slots

_HOLE_BYTES = 96  # of a hole's line in a header, at most
_LONGER_BYTES = 24  # a hole's line than that of a value whose place it is


def room_for(program: Program, request: Request, num_layers: int) -> int:
    """Bytes to keep free before the data of a request's result."""
    slots = [slot for slot in all_slots(program) if slot.keep is None]
    chain = program.chain
    if chain is None:
        return result_room(slots, program.graph, passes=len(program.waves), num_layers=num_layers)
    steps = (*chain.steps, *(() if chain.ending is None else (chain.ending,)))
    passes = len(program.waves) + sum(len(chain.parts[step.part].waves) for step in steps)
    room = result_room(slots, request.graph, passes=passes, num_layers=num_layers, invokes=request.invokes)
    return room + (-(-(_LONGER_BYTES * len(slots) + _HOLE_BYTES * (len(steps) + 1)) // 64) * 64 if slots else 0)


def without_holes(slots: Iterable[SaveSlot]) -> list[SaveSlot]:
    """The slots by their places, and one more wherever bytes lie between two of them."""
    filled: list[SaveSlot] = []
    end = 0
    for slot in sorted(slots, key=lambda slot: (slot.offset, slot.facts.num_bytes)):
        if (num_bytes := slot.offset - end) > 0:
            facts = ValueFacts(shape=(num_bytes,), dtype="uint8", num_bytes=num_bytes)
            filled.append(SaveSlot(name=f"{HOLE}{len(filled)}", node=NodeId(0), stage=0, facts=facts, offset=end))
        filled.append(slot)
        end = slot.offset + slot.facts.num_bytes
    return filled


def end_of(slots: Sequence[SaveSlot]) -> int:
    """Bytes of data up to the last value."""
    return max((slot.offset + slot.facts.num_bytes for slot in slots), default=0)


def with_files(program: Program, **files: object) -> Program:
    """The program, and those of its steps, with these fields and without constants of their own."""
    own = replace(program, constants={}, **files)  # type: ignore[arg-type]
    if program.chain is None:
        return own
    parts = tuple([replace(part, constants={}, **files) for part in program.chain.parts])  # type: ignore[arg-type]
    return replace(own, chain=replace(program.chain, parts=parts))
