"""Parts of a map's result: what came of some prompts, in memory and as a safetensors file.

A value that has one shape for all prompts of a part is one tensor `[prompts, ...]`. One whose first dimension differs
(tokens) is its rows end to end, `[all rows, ...]`, with `name:lengths`; one that differs otherwise is flat, with
`name:shapes` `[prompts, dimensions]`. What the part adds to combined values is kept as `name:sum` and the like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from polytrace.constants import content
from polytrace.kinds import value_kind
from polytrace.maps.running import Array, Contribution
from polytrace.tensors import RawTensor, itemsize
from polytrace.wire import decode_tensors, encode_tensors

_ROOM = 64 << 20  # of a file's header


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What came of a range of prompts. `part["name"]` is a value of all of them, `part.rows("name")` of each."""

    number: int
    prompts: range  # numbers in the dataset; those that were skipped are among them
    skipped: Mapping[int, str]  # numbers of prompts that gave nothing, and why
    path: str | None  # of its file, where the map has a folder
    tensors: Mapping[str, RawTensor]
    names: tuple[str, ...]  # values that are not combined
    is_whole: bool = False  # the body mixed its prompts: each value is what it was for all of them, without rows

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the prompts that the rows are of, in order."""
        return tuple(number for number in self.prompts if number not in self.skipped)

    def __getitem__(self, name: str) -> Any:
        """`[prompts, ...]`; rows end to end where their lengths differ (`rows` tells them apart)."""
        self._check(name)
        return value_kind().decode(self.tensors[name])

    def rows(self, name: str) -> list[Any]:
        """Each prompt's own value, without the dimension of prompts."""
        value = self[name]
        if self.is_whole:
            raise ValueError(f"{name!r} is one value of all prompts: the body mixed them, so there are no rows")
        if (shapes := self._integers(f"{name}:shapes")) is not None:
            ends = np.cumsum([prod(shape) for shape in shapes.tolist()])
            cuts = zip([0, *ends[:-1].tolist()], ends.tolist(), shapes.tolist(), strict=True)
            return [value[start:stop].reshape(shape) for start, stop, shape in cuts]
        if (lengths := self._integers(f"{name}:lengths")) is not None:
            ends = np.cumsum(lengths).tolist()
            return [value[start:stop] for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
        return list(value)

    def keys(self) -> tuple[str, ...]:
        """Names of the values."""
        return self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def contributions(self, name: str) -> list[Contribution]:
        """What the part adds to a combined value, one after another where its prompts ran in several requests."""
        found: dict[int, dict[str, Array]] = {}
        for key, raw in self.tensors.items():
            own, _, what = key.partition(":")
            if own == name and what:
                piece, _, array = what.rpartition(":")
                found.setdefault(int(piece or 0), {})[array] = _array(raw)
        return [found[piece] for piece in sorted(found)]

    def _check(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names) or "only what is combined (see the map's results)"
            raise KeyError(f"{name!r}; this part has {known}")

    def _integers(self, name: str) -> Array | None:
        raw = self.tensors.get(name)
        return None if raw is None else _array(raw)


def put_rows(tensors: dict[str, RawTensor], name: str, rows: Sequence[Any]) -> None:
    """Each prompt's `[1, ...]` as one tensor of the part, ragged where they differ."""
    raws = [raw_of(row) for row in rows]
    shapes = [raw.shape[1:] for raw in raws]
    if len(set(shapes)) == 1:
        tensors[name] = _joined(raws, (len(raws), *shapes[0]))
    elif len({shape[1:] for shape in shapes}) == 1 and len({len(shape) for shape in shapes}) == 1:
        lengths = np.array([shape[0] for shape in shapes], np.int64)
        tensors[name] = _joined(raws, (int(lengths.sum()), *shapes[0][1:]))
        tensors[f"{name}:lengths"] = raw_of(lengths)
    else:
        tensors[name] = _joined(raws, (sum(prod(shape) for shape in shapes),))
        tensors[f"{name}:shapes"] = raw_of(np.array(shapes, np.int64))


def put_contribution(tensors: dict[str, RawTensor], name: str, piece: int, given: Contribution) -> None:
    """What one request adds to a combined value; `piece` counts the requests of the part."""
    for what, array in given.items():
        tensors[f"{name}:{piece}:{what}" if piece else f"{name}:{what}"] = raw_of(array)


def raw_of(value: Any) -> RawTensor:
    """A torch tensor or numpy array as bytes of its own."""
    dtype, shape, data = content(value, "")
    return RawTensor(dtype=dtype, shape=shape, data=memoryview(data))


def file_of(part: Part) -> bytes:
    """The part as a safetensors file."""
    body = {
        "number": part.number,
        "prompts": [part.prompts.start, part.prompts.stop],
        "skipped": {str(number): reason for number, reason in part.skipped.items()},
        "names": list(part.names),
        "is_whole": part.is_whole,
    }
    return b"".join(encode_tensors("part", body, part.tensors))


def part_of(data: bytes, path: str) -> Part:
    """The part in a file. Raises WireError where the bytes are none."""
    body, tensors = decode_tensors(data, "part", max_header_bytes=_ROOM)
    return Part(
        number=body["number"],
        prompts=range(*body["prompts"]),
        skipped={int(number): reason for number, reason in body["skipped"].items()},
        path=path,
        tensors=tensors,
        names=tuple(body["names"]),
        is_whole=body["is_whole"],
    )


def checksum_of(data: bytes) -> str:
    """What tells whether a file is what it was."""
    return hashlib.sha256(data).hexdigest()


def _joined(raws: Sequence[RawTensor], shape: tuple[int, ...]) -> RawTensor:
    dtype = raws[0].dtype
    data = b"".join(raw.data for raw in raws)
    assert len(data) == prod(shape) * itemsize(dtype)
    return RawTensor(dtype=dtype, shape=shape, data=memoryview(data))


def _array(raw: RawTensor) -> Array:
    """numpy's view of a tensor of a dtype that numpy has."""
    if not raw.data.nbytes:
        return np.empty(raw.shape, np.dtype(raw.dtype))
    return np.frombuffer(raw.data, np.dtype(raw.dtype)).reshape(raw.shape)
