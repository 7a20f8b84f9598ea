"""What passes keep for their way back: how many bytes of it, on the shard that keeps most.

From the first visit where a gradient stops to the last one that is needed, a row keeps what every layer's backward
asks for (`ModelDescription.tape_bytes`, measured at load), and has gradients wherever they stop. Rows that only fill up
a pass keep as much as others. Where a request would not fit, a layer keeps only the hidden
states that came into it and is run again on the way back (Chen et al. 2016, arXiv:1604.06174); layers inside of which a
gradient stops are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from polytrace.description import ModelDescription, Rows, SiteInfo
from polytrace.errors import TooLargeError
from polytrace.graph import Invoke
from polytrace.tensors import num_bytes
from scheduling.checks import ModelTable
from scheduling.plan import MIN_ROWS
from scheduling.waves import Run

_AT_AN_INPUT = 2  # gradients: of what is handed on there, and of what others hold already
_AT_A_STOP = 3  # these, and what was written
_OF_PAIRS = 6  # scores, masked and not, and patterns, with their gradients
_OF_A_STAGE = 4  # hidden states: what it takes in, with its gradient, and what it hands on; or what the last norm keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """What one wave keeps."""

    begin: int  # of the waves
    end: int  # the last that runs it backwards
    rows: int  # with those that fill up its pass
    layers: tuple[int, ...]  # that its rows run through from the first stop on
    stopping: frozenset[int]  # of these, the layers inside of which gradients stop
    stop_bytes: tuple[int, ...]  # by stage: where gradients stop, and where stages meet


def tapes_of(
    cuts: Mapping[int, Sequence[int]],
    ends: Mapping[int, int],
    runs: Sequence[Run],
    kept: Mapping[tuple[int, int], Sequence[int]],
    invokes: Sequence[Invoke],
    visited: Iterable[SiteInfo],
    table: ModelTable,
) -> list[Tape]:
    """The tapes of a request: `cuts` by wave as of `Wave`, `ends` the last wave that runs each back, `kept` the columns
    that the head runs on, by wave and invoke, `visited` what its graph reads and writes.
    """
    levels, found = table.levels, []
    sites = {site.order: site for site in (*table.description.sites, *visited)}
    for wave, orders in cuts.items():
        if not orders:
            continue
        own = [run for run in runs if run.wave == wave]
        begun = levels.begun(max([run.until for run in own], default=-1))
        inside = frozenset(levels.of(order) for order in orders if levels.is_inside(order))
        rows = _filled(sum(invokes[run.invoke].num_tokens for run in own), table.description)
        head = sum(len(kept[wave, run.invoke]) * len(invokes[run.invoke].sequences) for run in own)
        layers = tuple(range(levels.acts_from(orders[0]), begun))
        stop_bytes = [0] * (1 + max(levels.stages, default=0))
        if len(stop_bytes) > 1:
            for stage in {levels.stages[layer] for layer in layers} | {sites[order].stage for order in orders}:
                stop_bytes[stage] += _OF_A_STAGE * rows * table.description.hidden_bytes
        for order in orders:
            site = sites[order]
            num_rows = _filled(head, table.description) if site.rows is Rows.KEPT else rows
            count = _AT_AN_INPUT if order in levels.inputs else _AT_A_STOP
            stop_bytes[site.stage] += count * num_rows * _row_bytes(site)
            longest = max(len(sequence) for run in own for sequence in invokes[run.invoke].sequences)
            stop_bytes[site.stage] += _OF_PAIRS * rows * longest * _pair_bytes(site)
        found.append(
            Tape(
                begin=wave,
                end=ends[wave],
                rows=rows,
                layers=layers,
                stopping=inside,
                stop_bytes=tuple(stop_bytes),
            )
        )
    return found


def _filled(rows: int, description: ModelDescription) -> int:
    """Rows that a pass of so many runs."""
    return -(-max(rows, MIN_ROWS) // description.row_multiple) * description.row_multiple


def _row_bytes(site: SiteInfo) -> int:
    """Of one row at a port."""
    return sum(num_bytes(leaf.dtype, leaf.tail) for leaf in site.leaves if not leaf.of_pairs)


def _pair_bytes(site: SiteInfo) -> int:
    """Of one query and key at a port that has a value for each."""
    return sum(num_bytes(leaf.dtype, leaf.tail) for leaf in site.leaves if leaf.of_pairs)


def tape_bytes(tapes: Sequence[Tape], description: ModelDescription, table: ModelTable, *, reruns: bool) -> int:
    """Of all that a request's waves keep at once, at most, on the shard that keeps most."""
    stages = table.levels.stages
    most = 0
    for wave in {tape.begin for tape in tapes}:
        there = [tape for tape in tapes if tape.begin <= wave <= tape.end]
        held = [0] * (1 + max(stages, default=0))
        for tape in there:
            held = [one + other for one, other in zip(held, tape.stop_bytes, strict=True)]
            for layer in tape.layers:
                is_whole = not reruns or layer in tape.stopping
                whole = tape.rows * description.tape_bytes + description.tape_fill_bytes
                held[stages[layer]] += whole if is_whole else tape.rows * description.hidden_bytes
        if reruns:  # one layer at a time is there in full
            rows = max((tape.rows for tape in there), default=0)
            held = [one + rows * description.tape_bytes + description.tape_fill_bytes for one in held]
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
        f"the gradients of this request keep {least:,} bytes on a shard, of {rows:,} rows; the limit is {limit:,}: "
        "ask for the gradients of fewer prompts at once, or of later layers"
    )
