"""Saves reach their files behind the pass: in order, within bounds, and a disk that fails is one request's failure."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from engine.results import FileSink, Writer
from polytrace.graph import NodeId
from scheduling.plan import SaveSlot, ValueFacts


def slot(tensor: torch.Tensor, offset: int, node: int = 0) -> SaveSlot:
    facts = ValueFacts(shape=tuple(tensor.shape), dtype="float32", num_bytes=tensor.nbytes)
    return SaveSlot(name=f"s{node}", node=NodeId(node), stage=0, facts=facts, offset=offset)


def test_saves_lie_at_their_offsets_when_the_writer_has_done_all(tmp_path: Path) -> None:
    path = tmp_path / "result"
    values = [torch.randn(3, 5), torch.randn(7, 4).T, torch.randn(100, 8)[40:41], torch.empty(0, 3)]
    path.write_bytes(bytes(16 + sum(value.nbytes for value in values)))
    writer = Writer()
    sink = FileSink(str(path), 16, writer)
    offset = 0
    for node, value in enumerate(values):
        sink.put(slot(value, offset, node), value)
        offset += value.nbytes
    writer.wait()
    data = path.read_bytes()[16:]
    assert data == b"".join(value.contiguous().numpy().tobytes() for value in values)
    assert sink.saved_bytes == len(data) and not sink.failures
    writer.close()
    assert not any(thread.name == "saves" for thread in threading.enumerate())


def test_what_waits_for_a_slow_disk_is_bounded(tmp_path: Path) -> None:
    """A pipe is a disk that is as slow as its reader."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    value = torch.zeros(1000)
    writer = Writer(most_bytes=2 * value.nbytes)
    is_through = threading.Event()

    def put() -> None:
        for _ in range(3):
            writer.put(str(pipe), 0, value, lambda _message: None)
        is_through.set()

    threading.Thread(target=put, daemon=True).start()
    assert not is_through.wait(0.3), "the third has to wait: nobody has opened the pipe"
    with pipe.open("rb"):  # the first write fails, a pipe has no offsets, and makes room
        assert is_through.wait(30)
        writer.wait()
    writer.close()


def test_a_file_that_cannot_be_written_fails_the_save_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "result"
    value = torch.randn(4)
    path.write_bytes(bytes(value.nbytes))
    writer = Writer()
    good, bad = FileSink(str(path), 0, writer), FileSink(str(tmp_path / "gone" / "result"), 0, writer)
    bad.put(slot(value, 0, node=3), value)
    good.put(slot(value, 0), value)
    writer.wait()
    ((node, message),) = bad.failures
    assert node == 3 and "could not be written" in message and "No such file" in message
    assert not good.failures and path.read_bytes() == value.numpy().tobytes()
    writer.close()


def test_a_value_that_is_not_what_was_planned_is_refused_at_once(tmp_path: Path) -> None:
    sink = FileSink(str(tmp_path / "result"), 0, Writer())
    with pytest.raises(ValueError, match="planned was float32"):
        sink.put(slot(torch.zeros(3), 0), torch.zeros(4))
