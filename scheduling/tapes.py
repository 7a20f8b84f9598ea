"""What passes keep for their way back: how many bytes of it, on the shard that keeps most.

From the first visit where a gradient stops to the last one that is needed, a row keeps what every layer's backward
asks for (`ModelDescription.tape_bytes`, measured at load). Where a request would not fit, a layer keeps only the hidden
states that came into it and is run again on the way back (Chen et al. 2016, arXiv:1604.06174); layers inside of which a
gradient stops are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polytrace.description import ModelDescription
from polytrace.errors import TooLargeError
from scheduling.checks import ModelTable
from scheduling.waves import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """What one wave keeps."""

    begin: int  # of the waves
    end: int  # the last that runs it backwards
    rows: int
    layers: tuple[int, ...]  # that its rows run through from the first stop on
    stopping: frozenset[int]  # of these, the layers inside of which gradients stop


def tapes_of(
    cuts: Mapping[int, Sequence[int]],
    ends: Mapping[int, int],
    runs: Sequence[Run],
    tokens: Sequence[int],
    table: ModelTable,
) -> list[Tape]:
    """The tapes of a request: `cuts` by wave, `ends` the last wave that runs each back, `tokens` by invoke."""
    levels, found = table.levels, []
    for wave, orders in cuts.items():
        own = [run for run in runs if run.wave == wave]
        begun = levels.begun(max([run.until for run in own], default=-1))
        first = levels.of(orders[0]) if orders else begun
        inside = frozenset(levels.of(order) for order in orders if levels.is_inside(order))
        rows = sum(tokens[run.invoke] for run in own)
        layers = tuple(range(first, begun))
        found.append(Tape(begin=wave, end=ends[wave], rows=rows, layers=layers, stopping=inside))
    return found


def tape_bytes(tapes: Sequence[Tape], description: ModelDescription, table: ModelTable, *, reruns: bool) -> int:
    """Of all that a request's waves keep at once, at most, on the shard that keeps most."""
    stages = table.levels.stages
    most = 0
    for wave in {tape.begin for tape in tapes}:
        held = [0] * (1 + max(stages, default=0))
        for tape in tapes:
            if tape.begin <= wave <= tape.end:
                for layer in tape.layers:
                    is_whole = not reruns or layer in tape.stopping
                    held[stages[layer]] += tape.rows * (
                        description.tape_bytes if is_whole else description.hidden_bytes
                    )
        if reruns:  # one layer at a time is there in full
            rows = max((tape.rows for tape in tapes if tape.begin <= wave <= tape.end), default=0)
            held = [one + rows * description.tape_bytes for one in held]
        most = max(most, *held)
    return most


def fit(tapes: Sequence[Tape], description: ModelDescription, table: ModelTable) -> tuple[int, bool]:
    """The bytes that a request's tapes take, and whether layers are run again for it. Raises TooLargeError."""
    limit = description.limits.tape_bytes
    whole = tape_bytes(tapes, description, table, reruns=False)
    if whole <= limit:
        return whole, False
    least = tape_bytes(tapes, description, table, reruns=True)
    if least <= limit:
        return least, True
    rows = sum(tape.rows for tape in tapes)
    raise TooLargeError(
        f"the gradients of this request keep {least:,} bytes on a shard, of {rows:,} tokens; the limit is {limit:,}: "
        "ask for the gradients of fewer prompts at once, or of later layers"
    )
