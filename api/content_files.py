"""The files of contents: a folder for each owner, and the place of objects that has them all where there is one.

    contents/<owner>/<hash>       one tensor, a file of `polytrace.wire`; never changes
    contents/<owner>/<part>.part  on its way: an upload, or what shards write for a request that is to leave it

Owns these names. Knows no rows: who puts a file there or takes one away does it inside a transaction (`api.holdings`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from pathlib import Path

from api.disk import sync
from api.identity import LOCAL
from api.objects import Objects
from polytrace.contents import digest_of
from polytrace.errors import WireError
from polytrace.tensors import RawTensor
from polytrace.wire import content_header, decode_content

DEFAULT_OWNER = LOCAL.owner


class ContentFiles:
    """Its methods may be called from any thread."""

    def __init__(self, folder: Path, objects: Objects | None) -> None:
        self._folder = folder
        self._objects = objects  # where every content is too, so that the folder may be lost
        self._made: set[str] = set()  # owners whose folder is there
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # of a store from before there were tenants
            (folder / "default").rename(folder / DEFAULT_OWNER)

    def folder_of(self, owner: str) -> Path:
        """Where an owner's contents are."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@~-]{0,130}", owner):
            raise ValueError(f"{owner!r} cannot own anything")
        folder = self._folder / owner
        if owner not in self._made:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._made.add(owner)
        return folder

    def path(self, owner: str, digest: str) -> Path:
        """A content."""
        return self.folder_of(owner) / digest

    def part(self, owner: str, part: str) -> Path:
        """What is on its way."""
        return self.folder_of(owner) / f"{part}.part"

    def bring(self, owner: str, digest: str) -> None:
        """A content's file is at hand, if the content is anywhere."""
        path = self.path(owner, digest)
        if self._objects is not None and not path.exists():
            self._objects.get_file(_object_of(owner, digest), path)

    def keep(self, owner: str, path: Path, digest: str) -> None:
        """Makes a file durable that is to become a content, before its row is there; its room has a row meanwhile."""
        if self._objects is None:
            sync(path)
        else:
            self._objects.put_file(_object_of(owner, digest), path)

    def link(self, owner: str, path: Path, digest: str) -> None:
        """A durable file becomes a content's too, and stays where it was."""
        target = self.path(owner, digest)
        target.unlink(missing_ok=True)  # what a transaction left that failed
        os.link(path, target)
        sync(target.parent)

    @property
    def have_objects(self) -> bool:
        return self._objects is not None

    def drop_object(self, owner: str, digest: str) -> None:
        """The copy among the objects."""
        assert self._objects is not None
        self._objects.remove(_object_of(owner, digest))

    def keep_only(self, known: set[tuple[str, str]]) -> set[tuple[str, str]]:
        """Removes every file but those of these owners and hashes; which of them have none."""
        files = {(path.parent.name, path.name) for path in self._folder.glob("*/*")}
        for owner, name in files - known:
            (self._folder / owner / name).unlink(missing_ok=True)
        if self._objects is not None:
            files = {_named(name) for name in self._objects.sizes("contents")}
            self._objects.remove(*(_object_of(*each) for each in files - known))
        return known - files


def mapped(path: Path) -> tuple[memoryview, RawTensor]:
    """A content's file, and the tensor in it; nothing is read yet."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise WireError("the content is empty")
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return view, decode_content(view)


def digest_of_file(path: Path) -> str:
    """The hash of what is in it. Raises WireError when it is no file of a content."""
    view, raw = mapped(path)
    header = content_header(raw.dtype, raw.shape)
    if bytes(view[: len(header)]) != header or len(view) != len(header) + len(raw.data):
        raise WireError("the content is not written as contents are")
    return digest_of(raw.dtype, raw.shape, raw.data)


def _object_of(owner: str, digest: str) -> str:
    return f"contents/{owner}/{digest}"


def _named(name: str) -> tuple[str, str]:
    owner, _, digest = name.partition("/")
    return owner, digest
