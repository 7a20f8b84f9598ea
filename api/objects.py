"""Durable objects outside of the service's folder: in S3, or whatever place fsspec has a URL for.

Owns names, transfers in chunks, and the words for what goes wrong. Knows nothing of requests. Options such as an
endpoint or credentials come from the environment, as the place's own library reads them.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from api.away import AwayError
from engine.extents import filesystem
from polytrace.errors import UserError

CHUNK_BYTES = 8 << 20


class Objects:
    """The objects below a URL. Any thread; every method raises AwayError when the place does not answer."""

    def __init__(self, url: str) -> None:
        """Raises UserError when no installed package knows the URL."""
        self.url = url.rstrip("/")
        try:
            self._system, self._root = filesystem(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"objects cannot be kept at {self.url}: {error}") from error

    def at(self, name: str) -> str:
        """The URL of an object, or of all whose names begin so."""
        return f"{self.url}/{name}"

    def put(self, name: str, data: bytes) -> None:
        """Makes an object, whole or not at all."""
        with _answering("written"):
            self._system.pipe_file(self._path(name), data)

    def put_file(self, name: str, path: Path) -> None:
        """The same of a file, never whole in memory. OSError when the file cannot be read."""
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= CHUNK_BYTES:
                self.put(name, file.read())
                return
        with _answering("written"):
            self._system.put_file(str(path), self._path(name))

    def get_file(self, name: str, path: Path) -> bool:
        """Brings an object into a file, whole or not at all. False when there is none."""
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.coming")
        try:
            with _answering("read"):
                self._system.get_file(self._path(name), str(part))
            os.replace(part, path)
        except FileNotFoundError:
            return False
        finally:
            part.unlink(missing_ok=True)
        return True

    def read(self, name: str, start: int, end: int) -> bytes:
        """A range of an object. FileNotFoundError when there is none."""
        with _answering("read"):
            data: bytes = self._system.cat_file(self._path(name), start=start, end=end)
        return data

    def sizes(self, name: str) -> dict[str, int]:
        """Every object below a name, with its bytes; names are told from there on."""
        root = self._path(name)
        with _answering("listed"):
            try:
                found = self._system.find(root, detail=True)
            except FileNotFoundError:
                return {}
        return {path.removeprefix(f"{root}/"): int(about["size"]) for path, about in found.items()}

    def names(self, name: str) -> list[str]:
        """What lies directly below a name."""
        with _answering("listed"):
            try:
                found = self._system.ls(self._path(name), detail=False)
            except FileNotFoundError:
                return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def remove(self, *names: str) -> None:
        """Takes objects away, and all that lies below these names; nothing when there is nothing."""
        with _answering("removed"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextlib.contextmanager
def _answering(what: str) -> Iterator[None]:
    """Every place has errors of its own; none of them may end the service."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise AwayError(f"the service's objects cannot be {what} now ({told[:300]})") from error
