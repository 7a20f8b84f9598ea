"""The benchmarks in one command.

    python -m bench.run [NAME ...] [--quick] [--model FOLDER]

Each prints its figures and appends one JSON line to `bench/results/`. A row whose numbers are wrong is an error, not a
result: nothing is recorded then. `--quick` shows that a benchmark works and records nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench import record, tinyworld

# Modules with `config_for(folder, quick=)`, `run(config)`, `is_right(figures)`, `tell(figures)`; `overlap`,
# `moved` and `maps` need Ray, `large` a GPU.
BENCHMARKS: Mapping[str, str] = {
    "merged": "bench.merged",
    "calls": "bench.calls",
    "overhead": "bench.overhead",
    "cones": "bench.cones.benchmark",
    "generation": "bench.generation.benchmark",
    "overlap": "bench.overlap",
    "loading": "bench.loading",
    "moved": "bench.moved",
    "language": "bench.language",
    "gradients": "bench.gradients",
    "race": "bench.load.race",
    "maps": "bench.maps",
    "simulate": "bench.simulator.benchmark",
    "large": "bench.large",
}
_ON_GPUS = {"large"}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="polytrace's benchmarks")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--model", type=Path, default=tinyworld.FOLDER, help="folder of a Llama-shaped model")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing recorded")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    missing = set() if torch.cuda.is_available() or arguments.quick else _ON_GPUS
    if wanted := set(arguments.names) & missing:
        parser.error(f"{', '.join(wanted)} needs a CUDA device; --quick shows that it works")
    for name in arguments.names or [name for name in BENCHMARKS if name not in missing]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        run_one(name, arguments.model, quick=arguments.quick)


def run_one(name: str, folder: Path, *, quick: bool) -> None:
    """Runs, prints and records one benchmark; ends the program when its numbers are wrong."""
    benchmark: Any = import_module(BENCHMARKS[name])
    config = benchmark.config_for(folder, quick=quick)
    figures = benchmark.run(config)
    print(benchmark.tell(figures), flush=True)
    if not benchmark.is_right(figures):
        sys.exit(f"{name}: the numbers are wrong, so the times mean nothing")
    if not quick:
        path = record.append(name, config=asdict(config) | {"folder": folder.name}, figures=figures)
        print(f"recorded in {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
