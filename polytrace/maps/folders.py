"""Where a map puts its files: a folder of this machine, or any address that fsspec knows (`s3://...`, `memory://...`).

A file is there whole or not at all: here by renaming, in object stores because one put is one object.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Protocol


class Folder(Protocol):
    """Named files."""

    def path(self, name: str) -> str:
        """The file's address, for people."""

    def read(self, name: str) -> bytes | None:
        """The file, None where there is none."""

    def write(self, name: str, data: bytes) -> None:
        """Makes or replaces the file; after this it outlives a crash."""

    def remove(self, name: str) -> None:
        """Takes the file away, if it is there."""


def open_folder(place: str | os.PathLike[str]) -> Folder:
    """The folder at a path or an address; it is made when something is written."""
    address = os.fspath(place)
    if address.startswith("file://"):
        address = address.removeprefix("file://")
    return _Remote(address) if "://" in address else _Local(Path(address))


class _Local:
    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, name: str) -> str:
        return str(self._root / name)

    def read(self, name: str) -> bytes | None:
        try:
            return (self._root / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        unfinished = self._root / f".{name}.unfinished"
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._root / name)
        with contextlib.suppress(OSError):  # some file systems do not take this of a folder
            folder = os.open(self._root, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)


class _Remote:
    def __init__(self, address: str) -> None:
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]
        except ImportError as error:
            raise ImportError(
                f"{address} needs the package fsspec, and for s3:// s3fs: pip install fsspec s3fs"
            ) from error
        self._address = address.rstrip("/")
        files, root = url_to_fs(self._address)
        self._files: Any = files
        self._root: str = root.rstrip("/")

    def path(self, name: str) -> str:
        return f"{self._address}/{name}"

    def read(self, name: str) -> bytes | None:
        try:
            self._files.invalidate_cache(self._root)
            return bytes(self._files.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._files.makedirs(self._root, exist_ok=True)
        self._files.pipe_file(f"{self._root}/{name}", data)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")
