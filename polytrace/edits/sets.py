"""A set of edits that later traces start from, as data: the graph of one invoke whose prompts are not there yet.

Owns what such a graph may be, its bytes (those of a request, so the same checks hold), and where sets are kept by name.
A later trace adds the nodes for each of its invokes (`Recording.replay`); shapes are checked then. Nothing of recording
is known here, so a service checks and keeps sets without it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from polytrace.contents import with_digest
from polytrace.errors import GraphError, NotFoundError, WireError
from polytrace.graph import Call, Graph, Invoke, Node, Request, Save, Write
from polytrace.tensors import RawTensor
from polytrace.wire import decode_request, encode_request

_NOBODY = Invoke(sequences=((0,),))  # stands for the prompts of later traces


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSet:
    """Writes and what they need."""

    label: str  # what receipts call it: name@version, or where it was written
    nodes: tuple[Node, ...]
    constants: Mapping[str, RawTensor]
    updates: tuple[str, ...] = ()  # modules whose weights an adapter stands for

    @property
    def calls(self) -> list[Call]:
        """The calls of modules in it."""
        return [node for node in self.nodes if isinstance(node, Call)]

    def check_call(self, module: str, where: str) -> None:
        """Raises GraphError for a call of a module that would not have the updates."""
        changed = next((path for path in self.updates if path == module or path.startswith(f"{module}.")), None)
        if changed is not None:
            raise GraphError(
                f"{module} is called here, and a call has the weights that are served, without what {self.label} "
                f"changes in {changed}: read {module}.output, or start this trace without that adapter",
                where=where,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownEdit:
    """An edit that is kept under a name."""

    name: str
    version: int  # counted from 1; the number of one that was deleted is not given again
    is_shared: bool  # everyone who may use the model may use it
    is_own: bool
    num_bytes: int
    created: float  # seconds since the epoch


class Shelf(Protocol):
    """Where edits are kept by name. What is put and got are the bytes of `encode_edits`."""

    def put(self, name: str, data: bytes, *, is_shared: bool) -> int:
        """Keeps another version and returns its number. Raises TooLargeError, and ConflictError for a taken name."""

    def get(self, name: str, version: int | None) -> tuple[int, bytes]:
        """A version, by default the newest, and its number. Raises NotFoundError."""

    def known(self) -> list[KnownEdit]:
        """All that may be used, by name and version."""

    def delete(self, name: str, version: int | None) -> None:
        """Drops one's own version, by default all of the name. Raises NotFoundError."""


class LocalShelf:
    """Keeps edits in memory, or in a folder for the next process."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._versions: dict[str, dict[int, tuple[float, bytes]]] = {}
        self._newest: dict[str, int] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.glob("*@*.edit")):
                name, _, number = path.stem.rpartition("@")
                self._add(name, int(number), path.stat().st_mtime, path.read_bytes())

    def put(self, name: str, data: bytes, *, is_shared: bool) -> int:
        version = self._newest.get(name, 0) + 1
        if self._folder is not None:
            self._path(name, version).write_bytes(data)
        self._add(name, version, time.time(), data)
        return version

    def get(self, name: str, version: int | None) -> tuple[int, bytes]:
        versions = self._found(name, version)
        number = max(versions) if version is None else version
        return number, versions[number][1]

    def known(self) -> list[KnownEdit]:
        return [
            KnownEdit(name=name, version=version, is_shared=False, is_own=True, num_bytes=len(data), created=created)
            for name in sorted(self._versions)
            for version, (created, data) in sorted(self._versions[name].items())
            if data
        ]

    def delete(self, name: str, version: int | None) -> None:
        versions = self._found(name, version)
        for number in versions if version is None else [version]:
            if self._folder is not None:
                self._path(name, number).write_bytes(b"")  # its number is not given again
            self._add(name, number, time.time(), b"")

    def _found(self, name: str, version: int | None) -> dict[int, tuple[float, bytes]]:
        versions = {number: kept for number, kept in self._versions.get(name, {}).items() if kept[1]}
        if not versions or (version is not None and version not in versions):
            raise unknown_edit(name, version, {known.name for known in self.known()})
        return versions

    def _add(self, name: str, version: int, created: float, data: bytes) -> None:
        self._versions.setdefault(name, {})[version] = (created, data)
        self._newest[name] = max(version, self._newest.get(name, 0))

    def _path(self, name: str, version: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}@{version}.edit"


def check_name(name: str, where: str | None = None) -> str:
    """The name of an edit. Raises GraphError for one that cannot be."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise GraphError(f"{name!r} cannot be an edit's name: up to 64 letters, digits, '.', '_' and '-'", where=where)
    return name


def plain_label(text: str) -> str:
    """A text as requests and receipts may call edits."""
    return re.sub(r"[^ -!#-\[\]-~]", "?", text)[:80]


def unknown_edit(name: str, version: int | None, known: Iterable[str]) -> NotFoundError:
    """The refusal of an edit that is not there."""
    names = ", ".join(sorted(known)[:20]) or "none"
    what = f"edit {name!r}" if version is None else f"version {version} of edit {name!r}"
    return NotFoundError(f"there is no {what} here; there are {names}")


def encode_edits(edits: EditSet) -> bytes:
    """The bytes under which a set of edits is kept: a request that saves nothing, of one prompt that means nobody's."""
    request = Request(graph=Graph(nodes=edits.nodes), invokes=(_NOBODY,), constants=edits.constants)
    return b"".join(encode_request(request))


def decode_edits(data: bytes | memoryview, label: str, *, max_nodes: int) -> EditSet:
    """The set that `encode_edits` wrote. Raises WireError or GraphError for anything else."""
    request = decode_request(data, max_nodes=max_nodes)
    if request.invokes != (_NOBODY,):
        raise WireError("an edit has no prompts of its own")
    check_edits(request.graph.nodes)
    constants = {name: with_digest(raw) for name, raw in request.constants.items()}
    return EditSet(label=label, nodes=request.graph.nodes, constants=constants)


def check_edits(nodes: Sequence[Node], where: str | None = None) -> None:
    """Raises GraphError for a graph that changes nothing, or gives something back."""
    saved = next((node for node in nodes if isinstance(node, Save)), None)
    if saved is not None:
        raise refuse_save(saved.where)
    if not any(isinstance(node, Write) for node in nodes):
        raise GraphError(
            "this edit writes nothing, so traces that start from it would be as without: change a site in its block "
            "(`module.output = value`, `module.output[...] += value`)",
            where=where,
        )


def refuse_save(where: str) -> GraphError:
    """Of a save in an edit."""
    return GraphError("an edit gives nothing back: save values in the traces that start from it", where=where)
