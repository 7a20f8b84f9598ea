"""Which rows of a workload have to run through which layer, counted by hand: the union of its causal cones.

A run has rows of its own from the layer and position on where it first differs from its parent, and until the last
layer that it, or a run that forks from it, needs. A write inside a layer counts from that layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.cones.workloads import Read, Run, Workload


def last_layers(workload: Workload, num_layers: int) -> list[int]:
    """Per run, the number of layers from the first on that its rows, where it has any, go through."""
    needed = [_needed_by_itself(run, num_layers) for run in workload.runs]
    for index in reversed(range(len(workload.runs))):
        run = workload.runs[index]
        if run.parent is not None:
            needed[run.parent] = max(needed[run.parent], needed[index])
        for edit in run.edits:
            if edit.source is not None:
                needed[edit.source] = max(needed[edit.source], edit.layer + 1)
    return needed


def layer_rows(workload: Workload, num_layers: int) -> tuple[int, ...]:
    """Rows that each layer runs."""
    until = last_layers(workload, num_layers)
    rows = [0] * num_layers
    for run, stop in zip(workload.runs, until, strict=True):
        for layer in range(run.first_layer, stop):
            rows[layer] += len(run.ids) - run.position
    return tuple(rows)


def token_layers_alone(workload: Workload, num_layers: int) -> int:
    """Rows x layers of whole sequences, each as deep as it is needed: early ends, but nothing shared."""
    until = last_layers(workload, num_layers)
    return sum(len(run.ids) * stop for run, stop in zip(workload.runs, until, strict=True))


def whole_rows(runs: Sequence[Run]) -> int:
    """Tokens of whole sequences."""
    return sum(len(run.ids) for run in runs)


def _needed_by_itself(run: Run, num_layers: int) -> int:
    if run.read is Read.NOTHING:
        return 0
    return run.layer + 1 if run.read is Read.HIDDEN else num_layers
