"""A checkpoint on disk or in the hub's cache: which of its files and keys a shard needs, as tensors not read yet.

Opens the files that hold a needed key and no others (a hub id downloads no others). Knows the hub's layout; nothing of
models beyond the names of their weights.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import is_offline_mode
from transformers.utils.hub import cached_file

from engine.fetching import MANIFEST, fetch
from engine.reading import FileTensor, Reader, Report, WeightFile
from engine.windows import Window
from polytrace.errors import ServiceError


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


def lazy_state(source: str, needs: Needs, files: ExitStack, reader: Reader, report: Report) -> dict[str, FileTensor]:
    """Checkpoint key -> tensor to be read, from the files that hold a needed key; the others are not opened."""
    where = _weight_files(source)
    wanted = sorted({file for key, file in where.items() if needs.has(key)}) if where else [_ONE_FILE]
    state: dict[str, FileTensor] = {}
    report(f"opening {len(wanted)} files")
    for number, name in enumerate(wanted, start=1):
        if not Path(source).is_dir():  # the hub's cache may not have it yet
            report(f"getting {name} ({number} of {len(wanted)})")
        fetch(source, name, report)
        opened = files.enter_context(closing(_open(source, name, reader)))
        state.update({key: tensor for key, tensor in opened.tensors.items() if needs.has(key)})
    return state


def check_weights(source: str) -> None:
    """ServiceError when a folder, or a cache that is all there is, has no weights of the model. Opens nothing."""
    if (Path(source) / MANIFEST).is_file():
        return  # they come when they are read
    if (Path(source).is_dir() or is_offline_mode()) and not _weight_files(source):
        _file(source, _ONE_FILE)


def checkpoint_dtype(source: str) -> torch.dtype:
    """The dtype of the first floating-point weight, as transformers' own "auto" takes it; float32 without weights."""
    where = _weight_files(source)
    name = where[min(where)] if where else _ONE_FILE
    if not where and _file(source, name, is_required=False) is None:
        return torch.float32
    with Reader() as reader, closing(_open(source, name, reader)) as opened:
        found = (opened.tensors[key].dtype for key in sorted(opened.tensors))
        dtype = next((dtype for dtype in found if dtype.is_floating_point and dtype.itemsize > 1), None)
    if dtype is None:
        raise ServiceError(f"{name} of {source} has no floating-point weights")
    return dtype


_ONE_FILE = "model.safetensors"


def _open(source: str, name: str, reader: Reader) -> WeightFile:
    path = _file(source, name)
    assert path is not None
    try:
        return WeightFile(path, reader)
    except ServiceError as error:
        raise ServiceError(f"cannot read {name} of {source}: {error.message}") from error


def _weight_files(source: str) -> dict[str, str]:
    """Checkpoint key -> file name, from the index; empty when the checkpoint is one file."""
    index = _file(source, "model.safetensors.index.json", is_required=False)
    if index is None:
        return {}
    return dict(json.loads(Path(index).read_text())["weight_map"])


def weight_paths(source: str) -> list[str]:
    """Every file of weights that is here already."""
    names = sorted(set(_weight_files(source).values())) or [_ONE_FILE]
    if Path(source).is_dir():
        found = [Path(source) / name for name in names]
        return [str(path) for path in found if path.is_file()] or sorted(map(str, Path(source).glob("*.safetensors")))
    paths = (
        cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False) for name in names
    )
    return [path for path in paths if path is not None]


def _file(source: str, name: str, *, is_required: bool = True) -> str | None:
    try:
        fetch(source, name)
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ServiceError(f"cannot get {name} of {source}: {error}") from error
    if path is None and is_required:
        raise ServiceError(
            f"{source} has no {name}: polytrace reads weights in the safetensors format. For trials of size and speed "
            f"without any weights: --random-weights SEED, or random_weights=SEED in polytrace.load"
        )
    return path
