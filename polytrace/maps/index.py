"""`index.json` of a map's folder: what the parts are of, which of them are complete, and whether a new run may go on.

A part counts once the index names it, with its checksum, and the index is written after the part. So whatever ends a
run, the folder has a beginning of the map in it, and the next run of the same map goes on behind that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from polytrace.errors import ConflictError, WireError
from polytrace.maps.folders import Folder
from polytrace.maps.parts import Part, checksum_of, file_of, part_of

NAME = "index.json"
_VERSION = 1
_WORDS = {
    "model": "the model",
    "dtype": "the model's dtype",
    "body": "the body, or a tensor that it uses",
    "seed": "the seed",
    "probe": "the numbers that the model gives for the first prompt",
    "first": "the first prompt",
    "prompts": "the prompts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How prompts are cut into parts. A run that goes on cuts as the first did."""

    tokens: int
    prompts: int
    bytes: int


@dataclass(slots=True)
class Index:
    """The index of one folder."""

    folder: Folder
    facts: Mapping[str, Any]  # what the results depend on, beside the prompts
    cut: Cut
    parts: list[dict[str, Any]] = field(default_factory=list)
    is_complete: bool = False

    def add(self, part: Part, dataset: str) -> Part:
        """Writes a part, then says that it is there. `dataset`: a digest of all prompts up to its end."""
        name = f"part-{part.number:05}.safetensors"
        part = replace(part, path=self.folder.path(name))
        data = file_of(part)
        self.folder.write(name, data)
        self.parts.append(
            {
                "file": name,
                "prompts": [part.prompts.start, part.prompts.stop],
                "skipped": len(part.skipped),
                "bytes": len(data),
                "sha256": checksum_of(data),
                "dataset": dataset,
                "tensors": {key: [raw.dtype, list(raw.shape)] for key, raw in part.tensors.items()},
            }
        )
        self.write()
        return part

    def read(self, place: int) -> Part | None:
        """A part that the index names; None where its file is not what it was."""
        entry = self.parts[place]
        data = self.folder.read(entry["file"])
        if data is None or len(data) != entry["bytes"] or checksum_of(data) != entry["sha256"]:
            return None
        try:
            return part_of(data, self.folder.path(entry["file"]))
        except (WireError, KeyError):
            return None

    def finish(self) -> None:
        """The dataset has ended."""
        if not self.is_complete:
            self.is_complete = True
            self.write()

    def cut_off(self, place: int) -> None:
        """Forgets the parts from one on."""
        del self.parts[place:]
        self.is_complete = False

    def write(self) -> None:
        body = {
            "polytrace_map": _VERSION,
            **self.facts,
            "cut": {"tokens": self.cut.tokens, "prompts": self.cut.prompts, "bytes": self.cut.bytes},
            "is_complete": self.is_complete,
            "parts": self.parts,
        }
        self.folder.write(NAME, json.dumps(body, indent=1).encode())


def open_index(folder: Folder, facts: Mapping[str, Any], cut: Cut) -> Index:
    """The folder's index, or a new one. Raises ConflictError where the folder has another map's parts."""
    data = folder.read(NAME)
    if data is None:
        return Index(folder, facts, cut)
    where = folder.path(NAME)
    try:
        found = json.loads(data)
        if found["polytrace_map"] != _VERSION:
            raise ConflictError(f"{where} is of another version of polytrace: map to an empty folder")
        other = [_WORDS.get(key, key) for key, value in facts.items() if found.get(key) != value]
        if other:
            raise ConflictError(
                f"{where} is of another map: {' and '.join(other)} differ. Map to another folder, or empty this one"
            )
        return Index(folder, facts, Cut(**found["cut"]), list(found["parts"]), bool(found["is_complete"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConflictError(f"{where} is not the index of a map: map to an empty folder") from error


class DatasetDigest:
    """A digest of prompts, one after another."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()

    def add(self, what: str) -> None:
        self._state.update(what.encode())
        self._state.update(b"\n")

    def value(self) -> str:
        return self._state.copy().hexdigest()
