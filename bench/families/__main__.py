"""Tries every class, two at a time, each in a process of its own: `python -m bench.families`, or `make families`.

Writes docs/families.md. With names of classes it tries these alone and prints their rows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench.families.configurations import classes
from bench.families.page import page, row
from bench.families.runs import try_all

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; without: all")
    parser.add_argument("--jobs", type=int, default=2, help="classes at a time")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds that one may take")
    told = parser.parse_args()
    names = told.names or list(classes())
    began, trials = time.monotonic(), []
    for trial in try_all(names, jobs=told.jobs, timeout_s=told.timeout):
        trials.append(trial)
        took = time.monotonic() - began
        print(f"[{len(trials)}/{len(names)}, {took:.0f} s] {row(trial)}", flush=True)
    if not told.names:
        PAGE.write_text(page(trials))
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
