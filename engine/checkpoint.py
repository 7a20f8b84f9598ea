"""A checkpoint on disk or in the hub's cache: which of its files and keys a shard needs, as lazy slices.

Opens the files that hold a needed key and no others (a hub id downloads no others). Knows the safetensors format and
the hub's layout; nothing of models beyond the names of their weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from engine.windows import Window
from polytrace.errors import ServiceError

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Which checkpoint keys a shard may need. In doubt it may: transformers decides about what it is given."""

    window: Window
    dropped: set[str]  # keys of the whole model that the shard does not own

    def has(self, key: str) -> bool:
        layer = self._layer_of(key)
        if layer is not None:
            return self.window.first <= layer < self.window.stop
        # A checkpoint may lack the base model's prefix ("wte.weight" for "transformer.wte.weight").
        return not any(name == key or name.endswith(f".{key}") for name in self.dropped)

    def _layer_of(self, key: str) -> int | None:
        parts = key.split(".")
        names = self.window.layers.split(".")
        for depth in range(len(names)):  # the full path of the layers' list, or without leading prefixes
            tail = names[depth:]
            if parts[: len(tail)] == tail and len(parts) > len(tail) and parts[len(tail)].isdigit():
                return int(parts[len(tail)])
        return None


def lazy_state(source: str, needs: Needs, files: ExitStack, report: Report) -> dict[str, Any]:
    """Checkpoint key -> lazy slice, from the files that hold a needed key; the others are not opened."""
    where = _weight_files(source)
    wanted = sorted({file for key, file in where.items() if needs.has(key)}) if where else ["model.safetensors"]
    state: dict[str, Any] = {}
    for number, name in enumerate(wanted, start=1):
        report(f"opening {name} ({number} of {len(wanted)})")
        try:
            opened = files.enter_context(safe_open(_file(source, name), framework="pt", device="cpu"))
        except (OSError, SafetensorError) as error:
            raise ServiceError(f"cannot read {name} of {source}: {error}") from error
        state.update({key: opened.get_slice(key) for key in opened.keys() if needs.has(key)})  # noqa: SIM118
    return state


def checkpoint_dtype(source: str) -> torch.dtype:
    """The dtype of the first floating-point weight, as transformers' own "auto" takes it; float32 without weights."""
    where = _weight_files(source)
    name = where[min(where)] if where else "model.safetensors"
    path = _file(source, name, is_required=bool(where))
    if path is None:
        return torch.float32
    with safe_open(path, framework="pt", device="cpu") as opened:
        for key in opened.keys():  # noqa: SIM118
            dtype: torch.dtype = opened.get_slice(key)[:0].dtype
            if dtype.is_floating_point:
                return dtype
    raise ServiceError(f"{name} of {source} has no floating-point weights")


def _weight_files(source: str) -> dict[str, str]:
    """Checkpoint key -> file name, from the index; empty when the checkpoint is one file."""
    index = _file(source, "model.safetensors.index.json", is_required=False)
    if index is None:
        return {}
    return dict(json.loads(Path(index).read_text())["weight_map"])


def _file(source: str, name: str, *, is_required: bool = True) -> str | None:
    try:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ServiceError(f"cannot get {name} of {source}: {error}") from error
    if path is None and is_required:
        raise ServiceError(f"{source} has no {name}: polytrace reads weights in the safetensors format")
    return path
