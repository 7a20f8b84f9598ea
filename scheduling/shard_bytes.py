"""What a request takes of a shard's memory beside the weights, from its plan: its rows, and what it leaves there.

Counted for the shard that holds most, and at the request's own widest pass: what others have in the same pass is
theirs. Kernels' own workspace is not in it.
"""

from __future__ import annotations

import math
from functools import lru_cache

from polytrace.description import ModelDescription, Rows, SiteInfo
from polytrace.tensors import num_bytes
from scheduling.caches import caches_of
from scheduling.checks import ModelTable
from scheduling.plan import MIN_ROWS, Program

_IN_AND_OUT = 2  # of a module: what it takes in is there until what it gives is


def row_bytes(program: Program, table: ModelTable) -> int:
    """Of the rows of its widest pass, while they run through a layer or the head.

    A row has the hidden states that it came with and will leave with, its keys and values at one layer, and the widest
    value that a module of a layer gives, beside what it was made of; at the head its logits.
    """
    description = table.description
    layer, head = _widest(table)
    each = _IN_AND_OUT * (description.hidden_bytes + layer) + description.key_value_bytes
    most = 0
    for wave in program.waves:
        if wave.invokes:
            rows = max(wave.rows.widest, wave.rows_anew.widest)
            kept = zip(wave.invokes, wave.kept, strict=True)
            last = sum(len(columns) * len(program.invokes[invoke].sequences) for invoke, columns in kept)
            most = max(most, _filled(rows, description) * each, _filled(last, description) * _IN_AND_OUT * head)
    return most


def staying_bytes(program: Program, table: ModelTable) -> int:
    """Of rows that stay for its later passes and steps: its trunks, and keys and values of all that it generates."""
    if program.chain is None:
        return program.trunk_bytes
    stages = table.levels.stages
    layers = max(map(stages.count, set(stages)), default=0)
    positions = sum(cache.most for cache in caches_of(program))
    return program.trunk_bytes + positions * table.description.key_value_bytes * layers


@lru_cache(maxsize=64)
def _widest(table: ModelTable) -> tuple[int, int]:
    """Of one row: the bytes of the widest value that a module of a layer gives, and of the widest behind the layers."""
    inside = [site for site in table.description.sites if site.rows is not Rows.KEPT]
    behind = [site for site in table.description.sites if site.rows is Rows.KEPT]
    ranks = table.description.ranks
    return (
        max((_site_bytes(site, ranks) for site in inside), default=0),
        max((_site_bytes(site, ranks) for site in behind), default=0),
    )


def _site_bytes(site: SiteInfo, ranks: int) -> int:
    """Of one row at a port, on one rank."""
    sizes = [
        num_bytes(leaf.dtype, leaf.tail) // (1 if leaf.sharded_dim is None else ranks)
        for leaf in site.leaves
        if not (leaf.of_pairs or leaf.is_attended or leaf.is_whole)
    ]
    return max(sizes, default=0)


def _filled(rows: int, description: ModelDescription) -> int:
    """Rows that a pass of so many runs."""
    multiple = max(1, description.row_multiple)
    return math.ceil(max(rows, MIN_ROWS) / multiple) * multiple if rows else 0
