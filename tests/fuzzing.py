"""Request files that somebody has broken: bytes, the header, its numbers, or what the graph says."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[int | str, ...]

NUMBERS = (0, 1, -1, 2, 7, 63, 255, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 48, (1 << 53) + 1, 1 << 62, 1 << 63, 1 << 200)
ODD: tuple[Any, ...] = (
    None, True, False, "", "nan", "-inf", "NaN", "\0", "é", "x" * 5000, 0.5, -0.0, 1e308, [], {}, [[]], [None],
    [1, 0], [[1 << 40, 0]], {"ref": 0}, {"back": 1}, {"slice": [0, None, 0]}, {"steps": [0, 1]}, {"dtype": "float64"},
    *NUMBERS,
)  # fmt: skip
JSON = st.recursive(
    st.sampled_from(ODD) | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def broken_files(draw: st.DrawFn, whole: bytes) -> bytes:
    """Of a whole one. Some are not broken at all, or only differently good."""
    match draw(st.sampled_from(["body", "body", "body", "header", "bytes", "length", "noise"])):
        case "body":
            return _with_body(whole, _damaged(draw, body_of(whole)))
        case "header":
            return with_header(whole, _damaged(draw, header_of(whole)))
        case "bytes":
            file = bytearray(whole)
            for _ in range(draw(st.integers(1, 4))):
                file[draw(st.integers(0, len(file) - 1))] = draw(st.integers(0, 255))
            return bytes(file[: draw(st.integers(0, len(file)))]) if draw(st.booleans()) else bytes(file)
        case "length":
            length = draw(st.sampled_from([number for number in NUMBERS if 0 <= number < 1 << 64]))
            return struct.pack("<Q", length) + whole[8:]
        case _:
            return draw(st.binary(max_size=200))


def _damaged(draw: st.DrawFn, plain: Any) -> Any:
    """With a few of its parts changed, taken away, doubled, or put in each other's place."""
    plain = copy.deepcopy(plain)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(plain))
        if not places:
            return draw(JSON)
        holder, key = _at(plain, draw(st.sampled_from(places)))
        match draw(st.sampled_from(["other", "other", "moved", "gone", "again"])):
            case "other":
                holder[key] = copy.deepcopy(draw(JSON))
            case "moved":
                source, there = _at(plain, draw(st.sampled_from(places)))
                holder[key] = copy.deepcopy(source[there])
            case "gone":
                del holder[key]
            case _ if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case _:
                holder[draw(st.text(max_size=4))] = copy.deepcopy(holder[key])
    return plain


def _places(plain: Any, path: Path = ()) -> Iterator[Path]:
    """Of everything in it, however deep."""
    parts: Any = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from _places(part, (*path, key))


def _at(plain: Any, path: Path) -> tuple[Any, Any]:
    for key in path[:-1]:
        plain = plain[key]
    return plain, path[-1]


def header_of(file: bytes) -> Any:
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length])


def body_of(file: bytes) -> Any:
    return json.loads(header_of(file)["__metadata__"]["request"])


def with_header(file: bytes, header: Any) -> bytes:
    """The file with another header; its data stay."""
    (length,) = struct.unpack("<Q", file[:8])
    text = (header if isinstance(header, str) else json.dumps(header)).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + file[8 + length :]


def _with_body(file: bytes, body: Any) -> bytes:
    header = header_of(file)
    header["__metadata__"]["request"] = json.dumps(body)
    return with_header(file, header)
