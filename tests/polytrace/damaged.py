"""Request files of which one part is another."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st


def damaged(file: bytes, data: st.DataObject, keys: Sequence[str], others: Sequence[Any]) -> bytes:
    """The file with any JSON, or one of `others`, in place of a part somewhere below the request's `keys`."""
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    body = json.loads(header["__metadata__"]["request"])
    spot: Any = body
    while True:
        key = data.draw(
            st.sampled_from(keys if spot is body else sorted(spot) if isinstance(spot, dict) else range(len(spot)))
        )
        if not isinstance(spot[key], (dict, list)) or not spot[key] or data.draw(st.booleans()):
            break
        spot = spot[key]
    spot[key] = data.draw(
        st.none() | st.booleans() | st.integers(-3, 2**33) | st.floats(allow_nan=False, allow_infinity=False)
        | st.sampled_from([*others, [], [[1, 2]], {"back": 1}, {"steps": [0, 1]}])
    )  # fmt: skip
    header["__metadata__"]["request"] = json.dumps(body)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + file[8 + length :]
