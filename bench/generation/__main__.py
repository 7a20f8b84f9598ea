"""One model with chosen parts; prints, and with `--record` adds a line to `bench/results/generation.jsonl`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from bench import record
from bench.cones.models import SIZES
from bench.generation import benchmark
from bench.generation.benchmark import PARTS, GenerationConfig, Setting


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.generation", description="parts of the generation benchmark")
    parser.add_argument("--model", default="8x512", help=f"{', '.join(SIZES)}, or a folder")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--users", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    setting = Setting(
        model=arguments.model, parts=tuple(arguments.parts), users=tuple(arguments.users), rounds=arguments.rounds
    )
    config = GenerationConfig(settings=(setting,), threads=arguments.threads)
    figures = benchmark.run(config)
    print(benchmark.tell(figures))
    if not benchmark.is_right(figures):
        sys.exit("the numbers are wrong, so the times mean nothing")
    if arguments.record:
        path = record.append("generation", config=asdict(config), figures=figures)
        print(f"recorded in {path.relative_to(record.ROOT)}")


if __name__ == "__main__":
    main()
