"""Tries every class, two at a time, each in a process of its own: `python -m bench.families`, or `make families`.

Writes docs/families.md as it goes. With names of classes, or `--untried`, it tries these alone and leaves the other
rows as they are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench.families.configurations import classes
from bench.families.page import page, row, rows_of
from bench.families.runs import try_all

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; without: all")
    parser.add_argument("--untried", action="store_true", help="those that the page does not have")
    parser.add_argument("--jobs", type=int, default=2, help="classes at a time")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds that one may take")
    told = parser.parse_args()
    rows = rows_of(PAGE.read_text()) if (told.names or told.untried) and PAGE.exists() else {}
    names = told.names or [name for name in classes() if name not in rows]
    began = time.monotonic()
    for number, trial in enumerate(try_all(names, jobs=told.jobs, timeout_s=told.timeout), 1):
        rows[trial.name] = row(trial)
        print(f"[{number}/{len(names)}, {time.monotonic() - began:.0f} s] {rows[trial.name]}", flush=True)
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
