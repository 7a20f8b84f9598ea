"""Named tensors in npz and safetensors files: shapes are known before a number is read, and nothing is run."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

from polytrace.errors import GraphError, TooLargeError


class TensorFile(Protocol):
    """A file whose shapes are known."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, dtype: Any) -> Any:
        """A tensor of it, in a dtype."""


class NpzFile:
    """An archive as `numpy.savez` writes it. Arrays of objects, which are pickles, are refused by their header."""

    def __init__(self, path: Path, most_bytes: int, where: str) -> None:
        """Raises GraphError for another kind of file, TooLargeError for what its headers say before any is read."""
        self.path, self._where = path, where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._entries: dict[str, str] = {}
        total = 0
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    with archive.open(entry) as file:
                        shape, size = _header(file)
                    if size + _HEADER_BYTES < entry.file_size or size > entry.file_size:
                        raise ValueError(f"{entry.filename} has {entry.file_size:,} bytes for {size:,} of numbers")
                    own = entry.filename.removesuffix(".npy")
                    name = "W_" + own[2:] if own.startswith("w_") else own
                    self.shapes[name], self._entries[name] = shape, entry.filename
                    total += entry.file_size
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise GraphError(f"{path} is no npz file of numbers: {error}", where=where) from None
        _check_size(path, total, most_bytes, where)

    def read(self, name: str, dtype: Any) -> Any:
        import torch
        from numpy.lib import format as npy

        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._entries[name]) as file:
                array = npy.read_array(file, allow_pickle=False)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise GraphError(f"{name} in {self.path} cannot be read: {error}", where=self._where) from None
        return torch.from_numpy(array).to(dtype)


class SafetensorsFile:
    """A safetensors file."""

    def __init__(self, path: Path, most_bytes: int, where: str) -> None:
        """Raises GraphError for another kind of file, TooLargeError before any of it is read."""
        from safetensors import SafetensorError, safe_open

        self.path, self._where = path, where
        try:
            _check_size(path, path.stat().st_size, most_bytes, where)
            with safe_open(str(path), framework="pt") as file:
                self._names = {"W_" + own[2:] if own.startswith("w_") else own: own for own in list(file.keys())}
                self.shapes: dict[str, tuple[int, ...]] = {
                    name: tuple(file.get_slice(own).get_shape()) for name, own in self._names.items()
                }
        except (OSError, SafetensorError) as error:
            raise GraphError(f"{path} is no safetensors file: {error}", where=where) from None

    def read(self, name: str, dtype: Any) -> Any:
        from safetensors import safe_open

        with safe_open(str(self.path), framework="pt") as file:
            return file.get_tensor(self._names[name]).to(dtype)


_HEADER_BYTES = 16 << 10  # of an array in an npz file, at most


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], int]:
    """Shape and bytes of a `.npy` file. Raises ValueError where it is none, or not of numbers."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"it is of version {version} of the format")
    shape, _, dtype = read(file)  # numpy limits the header's length, and reads literals alone
    if dtype.hasobject or dtype.kind not in "fiu":
        raise ValueError(f"it holds {dtype}, which are not numbers; pickles are not read")
    if any(own < 0 for own in shape):
        raise ValueError(f"its shape is {list(shape)}")
    return tuple(int(own) for own in shape), prod(shape) * dtype.itemsize


def _check_size(path: Path, total: int, most_bytes: int, where: str) -> None:
    if total > most_bytes:
        raise TooLargeError(
            f"{path} has {total:,} bytes of numbers; at most {most_bytes:,} are read: load_sae(..., max_bytes=)",
            where=where,
        )
