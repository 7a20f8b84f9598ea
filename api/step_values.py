"""What steps of a generation saved, as its events tell it: read from the result file that is being written.

What a pass saved is in the file when the pass has ended. A value beyond `polytrace.graph.MAX_LOG_BYTES` is told with
the range of its bytes in the result only, which can be asked for when the request is done.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from api.results import Read, Results
from polytrace.graph import MAX_LOG_BYTES
from scheduling.plan import RequestId, SaveSlot


def values_as_json(
    request: RequestId, saves: Iterable[SaveSlot], result_start: int, results: Results
) -> list[dict[str, Any]]:
    """The values of these slots, `result_start` bytes behind the beginning of the result."""
    slots = [slot for slot in saves if slot.keep is None]
    if not slots:
        return []
    try:
        with results.reading(request) as read:
            return [_value(slot, result_start + slot.offset, read) for slot in slots]
    except OSError:
        return []  # they come with the result, or its failure does


def _value(slot: SaveSlot, start: int, read: Read) -> dict[str, Any]:
    size = slot.facts.num_bytes
    told: dict[str, Any] = {"name": slot.name, "dtype": slot.facts.dtype, "shape": list(slot.facts.shape)}
    if size <= MAX_LOG_BYTES:
        told["data"] = base64.b64encode(read(start, size)).decode()
    return told | {"range": [start, start + size]}
