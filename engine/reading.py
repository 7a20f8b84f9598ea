"""Weights in safetensors files, read when they are asked for: the bytes of a slice, and no others.

A `FileTensor` stands for a tensor that has not been read. Indexing it reads the bytes that the index names into new
memory, several pieces of the file side by side. Nothing is mapped: what was read stays as it was, whatever becomes of
the file. The `Reader` counts bytes and tells how far it is.

Knows the safetensors format; nothing of models, nor of where files lie.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from polytrace.errors import ServiceError

_PIECE_BYTES = 16 << 20  # read at a time by one thread
_PAGE_BYTES = 4096  # what a disk reads at least: shorter runs are read together with what lies between them
_THREADS = 4
_TELL_S = 0.5  # between two tellings
_MAX_HEADER_BYTES = 100 << 20  # the format's own limit

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Index = slice | EllipsisType | tuple[slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How far a shard is with its weights."""

    read_bytes: int
    total_bytes: int  # as far as it is known before
    seconds: float

    def __str__(self) -> str:
        rate = self.read_bytes / max(self.seconds, 1e-9)
        return f"read {self.read_bytes / 1e9:.2f} of {self.total_bytes / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s"


Report = Callable[["str | Reading"], None]  # takes lines for people, and how far reading is


class Reader:
    """Reads pieces of files side by side, counts them, and tells how far it is. A context manager; not thread-safe."""

    def __init__(
        self, report: Report = lambda _: None, *, piece_bytes: int = _PIECE_BYTES, tell_s: float = _TELL_S
    ) -> None:
        self.piece_bytes = piece_bytes
        self.read_bytes = 0
        self.total_bytes = 0  # to be read, for those who look on; set by whoever knows
        self.paths: list[str] = []  # of the files that were opened
        self._report = report
        self._tell_s = tell_s
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read")
        self._began = self._told = time.monotonic()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def count(self, num_bytes: int) -> None:
        """Takes in that so many bytes are there."""
        self.read_bytes += num_bytes
        now = time.monotonic()
        if now - self._told >= self._tell_s:
            self._told = now
            self._report(
                Reading(
                    read_bytes=self.read_bytes,
                    total_bytes=max(self.total_bytes, self.read_bytes),
                    seconds=now - self._began,
                )
            )

    def fill(self, file: WeightFile, buffer: Tensor, starts: Iterator[int], run_bytes: int) -> None:
        """Fills `buffer`, flat bytes, with runs of equal length that begin at `starts` in the file."""
        into = buffer.numpy().data
        runs = ((start, into[k * run_bytes : (k + 1) * run_bytes]) for k, start in enumerate(starts))
        pieces = (
            (start + first, run[first : first + self.piece_bytes])
            for start, run in runs
            for first in range(0, run_bytes, self.piece_bytes)
        )
        size = max(1, self.piece_bytes // run_bytes)
        tasks = iter(lambda: list(itertools.islice(pieces, size)), [])
        if buffer.numel() <= self.piece_bytes:
            for task in tasks:
                self.count(file.read(task))
            return
        for num_bytes in self._pool.map(file.read, tasks):
            self.count(num_bytes)


class WeightFile:
    """An open safetensors file and its table of contents."""

    def __init__(self, path: str, reader: Reader) -> None:
        """ServiceError, with what is wrong, when it is no such file."""
        self._name = Path(path).name
        self.reader = reader
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ServiceError(f"cannot open {path}: {error.strerror}") from error
        try:
            self.tensors = self._contents()
        except BaseException:
            self.close()
            raise
        reader.paths.append(path)

    def close(self) -> None:
        os.close(self._descriptor)

    def read(self, pieces: list[tuple[int, memoryview]]) -> int:
        """Reads each piece from its place into its memory; how many bytes these were. Any thread."""
        for start, into in pieces:
            done = 0
            while done < len(into):
                try:
                    count = os.preadv(self._descriptor, [into[done:]], start + done)
                except OSError as error:
                    raise ServiceError(f"cannot read {self._name}: {error.strerror}") from error
                if not count:
                    raise ServiceError(f"{self._name} ends after {start + done} bytes, before its last tensor")
                done += count
        return sum(len(into) for _, into in pieces)

    def _contents(self) -> dict[str, FileTensor]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ServiceError(f"{self._name} is no safetensors file: its header cannot be {length} bytes of {size}")
        first = 8 + length
        found = {}
        try:
            header: dict[str, Any] = json.loads(os.pread(self._descriptor, length, 8))
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                begin, end = entry["data_offsets"]
                tensor = FileTensor(self, entry["dtype"], tuple(entry["shape"]), first + begin)
                if end - begin != tensor.num_bytes or not 0 <= begin <= end <= size - first:
                    raise ServiceError(f"{self._name} lies about {name}, or is cut off: bytes {begin}-{end} of {size}")
                found[name] = tensor
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ServiceError(f"{self._name} is no safetensors file: {error}") from error
        return found


class FileTensor:
    """A tensor in a file, of which an index reads its own part; with the interface of safetensors' slices."""

    def __init__(self, file: WeightFile, dtype: str, shape: tuple[int, ...], start: int) -> None:
        if dtype not in _DTYPES:
            raise ServiceError(f"a tensor of dtype {dtype} cannot be read here; known are {', '.join(_DTYPES)}")
        self._file = file
        self._dtype_name = dtype
        self._shape = shape
        self._start = start
        self.dtype = _DTYPES[dtype]
        self.num_bytes = math.prod(shape) * self.dtype.itemsize

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._dtype_name

    def __getitem__(self, index: Index) -> Tensor:
        bounds = bounds_of(index, self._shape)
        shape = [stop - start for start, stop in bounds]
        if not math.prod(shape):
            return torch.empty(shape, dtype=self.dtype)
        # 1) how many of the last dimensions lie in the file in one run
        inner = len(shape)
        while inner > 0 and bounds[inner - 1] == (0, self._shape[inner - 1]):
            inner -= 1
        run_dims = max(0, inner - 1)  # the run begins inside this dimension and has all of those behind
        run_bytes = math.prod(shape[run_dims:]) * self.dtype.itemsize
        if run_bytes < _PAGE_BYTES and math.prod(shape[:run_dims]) > 1:
            return self._read_around(bounds, run_dims)
        # 2) where the runs begin
        buffer = torch.empty(math.prod(shape) * self.dtype.itemsize, dtype=torch.uint8)
        self._file.reader.fill(self._file, buffer, self._starts(bounds, run_dims), run_bytes)
        return buffer.view(self.dtype).reshape(shape)

    def _starts(self, bounds: list[tuple[int, int]], run_dims: int) -> Iterator[int]:
        strides = [math.prod(self._shape[dim + 1 :]) * self.dtype.itemsize for dim in range(len(self._shape))]
        inside = bounds[run_dims][0] * strides[run_dims] if bounds else 0
        ranges = [
            range(start * stride, stop * stride, stride)
            for (start, stop), stride in zip(bounds[:run_dims], strides, strict=False)
        ]
        for offsets in itertools.product(*ranges):
            yield self._start + inside + sum(offsets)

    def _read_around(self, bounds: list[tuple[int, int]], run_dims: int) -> Tensor:
        """Runs shorter than a page: with what lies between them, a block of the first dimension at a time."""
        first, last = bounds[0]
        whole = [(0, size) for size in self._shape[run_dims:]]
        row_bytes = max(1, self.num_bytes // self._shape[0])
        step = max(1, self._file.reader.piece_bytes // row_bytes)
        cut = tuple(slice(*each) for each in bounds[run_dims:])
        out = torch.empty([stop - start for start, stop in bounds], dtype=self.dtype)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            block = self[tuple(slice(*each) for each in ((begin, end), *bounds[1:run_dims], *whole))]
            out[begin - first : end - first] = block[(slice(None),) * run_dims + cut]
        return out


def bounds_of(index: Index, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """First and last-but-one of every dimension that an index of plain slices names."""
    slices: tuple[Any, ...] = () if index is Ellipsis else index if isinstance(index, tuple) else (index,)
    if len(slices) > len(shape) or not all(isinstance(each, slice) and each.step in (None, 1) for each in slices):
        raise TypeError(f"a tensor of shape {shape} that is not read yet takes plain slices, and not {index!r}")
    slices += (slice(None),) * (len(shape) - len(slices))
    return [each.indices(size)[:2] for each, size in zip(slices, shape, strict=True)]
