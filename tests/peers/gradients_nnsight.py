"""Runs `gradients` in nnsight: `python -m peers.gradients_nnsight OUT`, as `patterns_nnsight` is run."""

from __future__ import annotations

import importlib
from typing import Any

from peers.gradients import patterns
from peers.in_nnsight import write_values

nnsight: Any = importlib.import_module("nnsight")

if __name__ == "__main__":
    write_values(patterns(nnsight.save))
