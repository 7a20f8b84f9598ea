"""Where saved values go: into the result file at their planned offset, or to the caller in the same process."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.links import as_bytes
from scheduling.plan import Program, SaveSlot


class ResultSink(Protocol):
    """Takes a request's saves on one shard."""

    saved_bytes: int

    def put(self, slot: SaveSlot, value: Any) -> None:
        """Takes a copy of a value; ValueError when it is not of the planned shape and dtype."""


class MemorySink:
    """Keeps saves as tensors, for a caller in the same process."""

    def __init__(self) -> None:
        self.saved_bytes = 0
        self.values: dict[str, Tensor] = {}

    def put(self, slot: SaveSlot, value: Any) -> None:
        tensor = _planned(slot, value)
        self.values[slot.name] = tensor.clone(memory_format=torch.contiguous_format)
        self.saved_bytes += slot.facts.num_bytes


class FileSink:
    """Writes saves straight into the result file. The file exists and has its full size."""

    def __init__(self, path: str, data_start: int) -> None:
        self.path = path
        self.data_start = data_start
        self.saved_bytes = 0

    def put(self, slot: SaveSlot, value: Any) -> None:
        tensor = _planned(slot, value).cpu()
        if tensor.nbytes:
            written = memoryview(as_bytes(tensor).numpy().data)
            descriptor = os.open(self.path, os.O_WRONLY)
            try:
                offset = self.data_start + slot.offset
                while written:
                    count = os.pwrite(descriptor, written, offset)
                    written, offset = written[count:], offset + count
            finally:
                os.close(descriptor)
        self.saved_bytes += slot.facts.num_bytes


def sink_for(program: Program) -> MemorySink | FileSink:
    """The sink that a program asks for."""
    if program.result_file is None:
        return MemorySink()
    return FileSink(program.result_file, program.result_start)


def _planned(slot: SaveSlot, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{slot.name} is a {type(value).__name__}, not a tensor")
    dtype = str(value.dtype).removeprefix("torch.")
    if tuple(value.shape) != slot.facts.shape or dtype != slot.facts.dtype:
        raise ValueError(
            f"{slot.name} came out as {dtype} {list(value.shape)}, "
            f"planned was {slot.facts.dtype} {list(slot.facts.shape)}"
        )
    return value.detach()
