"""Chosen cells with as much time as wanted; prints, and with `--record` adds a line to `bench/results/cones.jsonl`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from bench import record, tinyworld
from bench.cones import benchmark
from bench.cones.benchmark import ConesConfig, Setting
from bench.cones.growth import Growth
from bench.cones.models import SIZES
from bench.cones.workloads import CASES


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.cones", description="cells of the benchmark of causal cones")
    parser.add_argument("--model", nargs="+", default=["tinyworld"], help=f"tinyworld, {', '.join(SIZES)}, or a folder")
    parser.add_argument("--tokens", nargs="+", type=int, default=[64])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--round-seconds", type=float, default=2.0, help="of all contenders; decides the sweeps' sizes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-nnsight", action="store_true")
    parser.add_argument("--growth", action="store_true", help="how cost grows, too")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    settings = tuple(
        Setting(
            model=str(tinyworld.FOLDER) if model == "tinyworld" else model,
            tokens=tokens,
            threads=threads,
            cases=tuple(arguments.cases),
            round_s=arguments.round_seconds,
            rounds=arguments.rounds,
        )
        for model in arguments.model
        for tokens in arguments.tokens
        for threads in arguments.threads
    )
    config = ConesConfig(
        settings=settings,
        growth=Growth() if arguments.growth else None,
        growth_model=str(tinyworld.FOLDER),
        has_peer=not arguments.no_nnsight,
    )
    figures = benchmark.run(config)
    print(benchmark.tell(figures))
    if not benchmark.is_right(figures):
        sys.exit("the numbers are wrong, so the times mean nothing")
    if arguments.record:
        path: Path = record.append("cones", config=asdict(config), figures=figures)
        print(f"recorded in {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
