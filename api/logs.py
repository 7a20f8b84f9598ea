"""Values that requests log while they run: read from the result file that is being written, and told with the status.

What a pass saved is in the file when the pass has ended. A log beyond what is kept here comes with the result.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from api.results import Results
from polytrace.graph import MAX_LOG_BYTES
from scheduling.scheduler import Progress

MAX_LOGS_BYTES = 262_144  # of all that a request has logged


def logs_as_json(told: Progress, results: Results) -> str:
    """The logs of the passes that are done, as the store keeps them."""
    if not told.logs:
        return "[]"
    found: list[dict[str, Any]] = []
    left = MAX_LOGS_BYTES
    try:
        with results.reading(told.request) as read:
            for log in told.logs:
                size = log.slot.facts.num_bytes
                if size > min(MAX_LOG_BYTES, left):
                    continue
                left -= size
                data = read(told.result_start + log.slot.offset, size)
                found.append(
                    {
                        "name": log.slot.name,
                        "dtype": log.slot.facts.dtype,
                        "shape": list(log.slot.facts.shape),
                        "data": base64.b64encode(data).decode(),
                        "passes_done": log.passes_done,
                    }
                )
    except OSError:
        return "[]"  # they come with the result, or its failure does
    return json.dumps(found)


def logs_since(logs: Sequence[Mapping[str, Any]], passes_done: int) -> list[Mapping[str, Any]]:
    """Those of later passes than the caller knows of."""
    return [log for log in logs if log["passes_done"] > passes_done]
