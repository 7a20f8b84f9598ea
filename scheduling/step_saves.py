"""Where the saves of a generation's steps go, and under which names: all that may come, and what came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from polytrace.graph import name_at
from polytrace.tensors import num_bytes
from scheduling.plan import Program, RequestId, SaveSlot


def slot_at(slot: SaveSlot, step: int, offset: int, shape: tuple[int, ...] | None = None) -> SaveSlot:
    """A slot of a step's program as one of the whole result; with `shape` it came out smaller than planned."""
    facts = slot.facts
    if shape is not None:
        facts = replace(facts, shape=shape, num_bytes=num_bytes(facts.dtype, shape))
    name = name_at(slot.name, step) if slot.is_of_step else slot.name
    return replace(slot, name=name, offset=slot.offset if slot.keep is not None else slot.offset + offset, facts=facts)


def all_slots(program: Program) -> Iterator[SaveSlot]:
    """Those of a request, or of all steps of a generation, should all of them come."""
    for slot in program.saves:
        yield slot_at(slot, 0, 0)
    chain = program.chain
    if chain is None:
        return
    for number, step in enumerate((*chain.steps, *(() if chain.ending is None else (chain.ending,))), 1):
        for slot in chain.parts[step.part].saves:
            yield slot_at(slot, number, step.offset)


def data_bytes(program: Program) -> int:
    """Of all saves that go to the user."""
    if program.chain is not None:
        return program.chain.data_bytes
    return max((slot.offset + slot.facts.num_bytes for slot in program.saves if slot.keep is None), default=0)


def came_out(slot: SaveSlot, shapes: Mapping[tuple[RequestId, str], tuple[int, ...]], request: RequestId) -> SaveSlot:
    """The slot as its value came out."""
    shape = shapes.get((request, slot.name))
    return slot if shape is None else slot_at(replace(slot, is_of_step=False), 0, 0, shape)
