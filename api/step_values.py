"""What steps of a generation saved, as its events tell it: read from the result file that is being written.

What a pass saved is in the file when the pass has ended. A value beyond `polytrace.logs.MAX_LOG_BYTES` is told with the
range of its bytes in the result only, which can be asked for when the request is done.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from polytrace.logs import MAX_LOG_BYTES
from scheduling.plan import SaveSlot


def values_as_json(saves: Iterable[SaveSlot], result_start: int, file: Path) -> list[dict[str, Any]]:
    """The values of these slots, `result_start` bytes behind the beginning of the file."""
    slots = [slot for slot in saves if slot.keep is None]
    if not slots:
        return []
    try:
        fd = os.open(file, os.O_RDONLY)
    except OSError:
        return []  # they come with the result, or its failure does
    try:
        return [_value(slot, result_start + slot.offset, fd) for slot in slots]
    finally:
        os.close(fd)


def _value(slot: SaveSlot, start: int, fd: int) -> dict[str, Any]:
    size = slot.facts.num_bytes
    told: dict[str, Any] = {"name": slot.name, "dtype": slot.facts.dtype, "shape": list(slot.facts.shape)}
    if size <= MAX_LOG_BYTES:
        told["data"] = base64.b64encode(os.pread(fd, size, start)).decode()
    return told | {"range": [start, start + size]}
