"""What a large generation filled goes back to the system when nobody waits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of

from engine import heap
from engine.local import LocalBackend
from polytrace.model import Model


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and trims glibc's heap")
def test_freed_tensors_on_the_heap_go_back() -> None:
    size, count = 64 << 10, 3000  # each below the least size that glibc maps by itself
    tensors = [torch.ones(size // 4) for _ in range(count)]
    last = torch.ones(size // 4)  # lies behind them
    filled = resident_bytes()
    tensors.clear()
    heap.trim()
    assert resident_bytes() < filled - size * count // 2
    assert bool((last == 1).all())


def test_a_shard_that_has_nobody_left_trims_when_it_is_worth_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of("llama").save_pretrained(tmp_path)
    backend = LocalBackend(str(tmp_path), threads=1)
    model: Any = Model(backend)

    def given_after_a_generation() -> int:
        with model.generate([4, 5, 6], max_new_tokens=4, eos=()):
            pass
        return backend.shard.store.given_bytes

    assert 0 < given_after_a_generation() < heap.WORTH_BYTES
    monkeypatch.setattr(heap, "WORTH_BYTES", 1)
    assert given_after_a_generation() == 0
    backend.close()
