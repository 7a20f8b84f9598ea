"""How fast weights come from files: a shard's load against plain reads of the same bytes and against safetensors alone.

    python -m bench.run loading

A Llama with random weights is written to a temporary folder first. Two conditions: *warm*, all files are in the page
cache; *evicted*, the kernel was told before each turn that nobody needs them (posix_fadvise; what lies below the kernel
may cache still). Everyone ends with the bytes in memory of his own; building the modules is inside a shard's time.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from bench.race import race, ratio
from engine.links import Solo
from engine.loading import LoadedModel, ShardConfig, load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingConfig:
    """One run of the benchmark."""

    layers: int = 8
    hidden: int = 2048
    vocabulary: int = 32000
    dtype: str = "bfloat16"
    file_size: str = "400MB"
    rounds: int = 7
    threads: int = 2


def run(config: LoadingConfig) -> dict[str, Any]:
    """The figures, as plain JSON: a row for each condition."""
    torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory(prefix="polytrace-loading-") as folder:
        write_model(config, folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        contenders: dict[str, Callable[[], object]] = {
            "files": lambda: [_read(file) for file in files],
            "files again": lambda: [_read(file) for file in files],
            "safetensors": lambda: [_load(file) for file in files],
            "shard": lambda: _shard(folder, stages=1),
            "last of 2 stages": lambda: _shard(folder, stages=2),
        }
        num_bytes = {name: sum(file.stat().st_size for file in files) for name in contenders}
        num_bytes["last of 2 stages"] = _shard(folder, stages=2).read_bytes
        rows = []
        conditions: dict[str, Callable[[], object]] = {
            "warm": gc.collect,  # models are cyclic, and a race collects nothing
            "evicted": lambda: forget(files),
        }
        for condition, before in conditions.items():
            seconds = race(contenders, rounds=config.rounds, before=before)
            rows.append(
                {
                    "condition": condition,
                    "shard / files": asdict(ratio(seconds["shard"], seconds["files"])),
                    "shard / safetensors": asdict(ratio(seconds["shard"], seconds["safetensors"])),
                    "files again / files": asdict(ratio(seconds["files again"], seconds["files"])),
                    "gb_s": {n: num_bytes[n] / 1e9 / statistics.median(times) for n, times in seconds.items()},
                    "median_s": {name: statistics.median(times) for name, times in seconds.items()},
                }
            )
        wrong = _wrong(_shard(folder, stages=1), files) + _wrong(_shard(folder, stages=2), files)
    return {"gb": num_bytes["files"] / 1e9, "rows": rows, "parameters_that_differ": wrong}


def write_model(config: LoadingConfig, folder: str) -> None:
    """A Llama with random weights."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        intermediate_size=config.hidden * 11 // 4,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden // 128,
        num_key_value_heads=config.hidden // 128,
    )
    model = LlamaForCausalLM._from_config(shape, dtype=getattr(torch, config.dtype))
    model.save_pretrained(folder, max_shard_size=config.file_size)


def _read(file: Path) -> np.ndarray[Any, Any]:
    with file.open("rb", buffering=0) as opened:
        into = np.empty(file.stat().st_size, dtype=np.uint8)
        done = 0
        while count := opened.readinto(into[done:].data):
            done += count
    return into


def _load(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(file).items()}  # what is loaded is mapped, not read


def _shard(folder: str, *, stages: int) -> LoadedModel:
    return load_model(ShardConfig(source=folder, stage=stages - 1, stages=stages), Solo())


def forget(files: list[Path]) -> None:
    """Tells the kernel that nobody needs them."""
    gc.collect()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # only what is on disk can be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _wrong(loaded: LoadedModel, files: list[Path]) -> int:
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return sum(not torch.equal(tensor, expected[name]) for name, tensor in loaded.model.named_parameters())


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every value was what it should be."""
    return bool(figures["parameters_that_differ"] == 0)


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = [f"loading {figures['gb']:.2f} GB"]
    for row in figures["rows"]:
        rates = ", ".join(f"{name} {rate:.2f}" for name, rate in row["gb_s"].items())
        lines.append(
            f"  {row['condition']}: GB/s: {rates}; a shard takes {row['shard / files']['median']:.2f}x of plain reads, "
            f"{row['shard / safetensors']['median']:.2f}x of safetensors; "
            f"noise {row['files again / files']['median']:.3f}x"
        )
    return "\n".join(lines)


def config_for(folder: Path, *, quick: bool) -> LoadingConfig:
    """The configuration that `make bench` runs, or a short one to see that it works; `folder` is not needed."""
    return LoadingConfig(layers=2, hidden=256, rounds=2, file_size="10MB") if quick else LoadingConfig()
