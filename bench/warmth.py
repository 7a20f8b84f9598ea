"""What warmth is worth: a shard's load of weights that are held in memory against one from the disk.

    python -m bench.warmth [--quick]

A Llama with random weights is written to a temporary folder. Before each turn the kernel is told that nobody needs the
files (posix_fadvise; what lies below the kernel may cache still); *warm*, they are held (`cluster.holder`) then, and
stay although the kernel is told so once more. What else a start takes, processes and the self-test, is the same for
both, and not in these figures.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import record
from bench.loading import LoadingConfig, forget, write_model
from cluster.holder import Holder
from engine.links import Solo
from engine.loading import ShardConfig, load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmthConfig:
    """One run of the benchmark."""

    layers: int = 10
    hidden: int = 2560
    rounds: int = 4
    threads: int = 2


def run(config: WarmthConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    with tempfile.TemporaryDirectory(prefix="polytrace-warmth-") as folder:
        write_model(LoadingConfig(layers=config.layers, hidden=config.hidden), folder)
        files = sorted(Path(folder).glob("*.safetensors"))
        seconds: dict[str, list[float]] = {"cold": [], "hold": [], "warm": []}
        told = ""
        for _ in range(config.rounds):
            forget(files)
            seconds["cold"].append(_load(folder, config.threads))
            forget(files)
            holder, began = Holder(), time.perf_counter()
            told = str(holder.hold(map(str, files)))
            seconds["hold"].append(time.perf_counter() - began)
            forget(files)
            seconds["warm"].append(_load(folder, config.threads))
            holder.let_go()
        return {
            "gb": sum(file.stat().st_size for file in files) / 1e9,
            "held": told,
            "load": os.getloadavg()[0],
            "median_s": {name: statistics.median(times) for name, times in seconds.items()},
            "seconds": seconds,
        }


def _load(folder: str, threads: int) -> float:
    began = time.perf_counter()
    loaded = load_model(ShardConfig(source=folder, threads=threads), Solo())
    seconds = time.perf_counter() - began
    del loaded
    gc.collect()
    return seconds


def tell(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    median = figures["median_s"]
    times = f"a shard loads them in {median['cold']:.1f} s from the disk and in {median['warm']:.1f} s when they are"
    held = f"held, which takes {median['hold']:.1f} s ({figures['held']})"
    return f"{figures['gb']:.2f} GB of weights: {times} {held}; the machine's load was {figures['load']:.0f}"


def main() -> None:
    """The command line."""
    is_quick = "--quick" in sys.argv[1:]
    config = WarmthConfig(layers=2, hidden=256, rounds=1) if is_quick else WarmthConfig()
    figures = run(config)
    print(tell(figures))
    if not is_quick:
        record.append("warmth", config=asdict(config), figures=figures)


if __name__ == "__main__":
    main()
