"""Where saved values go: into the result at their planned offset, or to the caller in the same process.

Neither a disk nor a copy from a GPU holds a pass up: values are written behind it (`Writer`).
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.copies import HostCopy
from engine.extents import is_object_place, write_extents
from engine.links import as_bytes
from polytrace.graph import NodeId
from scheduling.plan import Program, SaveSlot

SENDERS = 16  # writes under way to a place of objects


class ResultSink(Protocol):
    """Takes a request's saves on one shard."""

    saved_bytes: int  # in this pass
    failures: list[tuple[NodeId, str]]

    def put(self, slot: SaveSlot, value: Any) -> None:
        """Takes a value, which nobody changes any more; ValueError when it is not of the planned shape and dtype."""


class MemorySink:
    """Keeps saves as tensors, for a caller in the same process."""

    def __init__(self) -> None:
        self.saved_bytes = 0
        self.failures: list[tuple[NodeId, str]] = []  # there is nothing that could fail
        self.values: dict[str, Tensor] = {}

    def put(self, slot: SaveSlot, value: Any) -> None:
        tensor = _planned(slot, value)
        self.values[slot.name] = tensor.clone(memory_format=torch.contiguous_format)
        self.saved_bytes += slot.facts.num_bytes


class Writer:
    """Writes to result files in a thread of its own, while the pass goes on.

    What waits to be written is bounded: `put` waits when there is more. GPU tensors come over beside what the GPU
    computes.
    """

    def __init__(self, most_bytes: int = 256 << 20) -> None:
        self._most_bytes = most_bytes
        self._waiting_bytes = 0  # of what has been put and is not written
        self._changed = threading.Condition()
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._senders: ThreadPoolExecutor | None = None  # of what goes to a place of objects: many at a time

    def put(self, path: str, offset: int, tensor: Tensor, failed: Callable[[str], None]) -> None:
        """Starts writing a tensor, which must not change any more; `failed` hears, in the thread, why it could not be
        written.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="saves", daemon=True)
            self._thread.start()
        with self._changed:
            # One that is larger than all that may wait goes when nothing else does.
            self._changed.wait_for(
                lambda: not self._waiting_bytes or self._waiting_bytes + tensor.nbytes <= self._most_bytes
            )
            self._waiting_bytes += tensor.nbytes
        copy = HostCopy(tensor) if tensor.is_cuda else _apart(tensor)
        self._queue.put(_Write(path, offset, tensor.nbytes, copy, failed))

    def wait(self) -> None:
        """Until all that was put has been written or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting_bytes)

    def close(self) -> None:
        """Ends the thread, when all is written."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        if self._senders is not None:
            self._senders.shutdown()
            self._senders = None

    def _run(self) -> None:
        while (write := self._queue.get()) is not None:
            if is_object_place(write.path):
                self._senders = self._senders or ThreadPoolExecutor(SENDERS, thread_name_prefix="saves")
                self._senders.submit(self._do, write)
            else:
                self._do(write)

    def _do(self, write: _Write) -> None:
        try:
            _write(write)
        except Exception as error:  # noqa: BLE001  the edge of the thread: a disk that is full fails one request
            write.failed(f"its result could not be written: {error}")
        with self._changed:
            self._waiting_bytes -= write.num_bytes
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Write:
    path: str
    offset: int
    num_bytes: int
    copy: HostCopy | Tensor
    failed: Callable[[str], None]


def _apart(tensor: Tensor) -> Tensor:
    """The tensor, as a copy where it would keep much more memory alive than its own."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > 2 * tensor.nbytes else tensor


def _write(write: _Write) -> None:
    tensor = write.copy.wait() if isinstance(write.copy, HostCopy) else write.copy
    left, offset = memoryview(as_bytes(tensor).numpy().data), write.offset
    if is_object_place(write.path):
        write_extents(write.path, offset, left)
        return
    descriptor = os.open(write.path, os.O_WRONLY)
    try:
        while left:
            count = os.pwrite(descriptor, left, offset)
            left, offset = left[count:], offset + count
    finally:
        os.close(descriptor)


class FileSink:
    """Saves into the result, by way of a writer: a file that exists at its full size, or a place of objects."""

    def __init__(self, path: str, data_start: int, writer: Writer) -> None:
        self.path = path
        self.data_start = data_start
        self.saved_bytes = 0
        self.failures: list[tuple[NodeId, str]] = []  # what could not be written; whole when the writer has done all
        self._writer = writer

    def put(self, slot: SaveSlot, value: Any) -> None:
        tensor = _planned(slot, value)
        if tensor.nbytes:
            failed = partial(self._fail, slot.node)
            path, start = (self.path, self.data_start) if slot.file is None else (slot.file, 0)
            self._writer.put(path, start + slot.offset, tensor, failed)
        self.saved_bytes += slot.facts.num_bytes

    def _fail(self, node: NodeId, message: str) -> None:
        self.failures.append((node, message))


def sink_for(program: Program, writer: Writer) -> MemorySink | FileSink:
    """The sink that a program asks for."""
    if program.result_file is None:
        return MemorySink()
    return FileSink(program.result_file, program.result_start, writer)


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
