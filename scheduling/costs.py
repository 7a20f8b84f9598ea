"""What a program takes and moves, counted from the plan, for certificates before the run and receipts after it."""

from __future__ import annotations

from collections.abc import Iterator

from polytrace.graph import NodeId, Parameter, Read, Write
from scheduling.checks import ModelTable
from scheduling.plan import PROLOGUE, Program, Wave

MAX_NOTES = 16  # of one kind

_WAY_BACK = 2  # forwards that a layer's way back counts as: in attention it is more, in products of frozen weights one

ROUNDED_NOTE = "on this device the last bits of a value depend on how many rows share the pass"


def wave_tokens(program: Program, wave: Wave) -> int:
    """Tokens of a wave's sequences."""
    return sum(program.invokes[invoke].num_tokens for invoke in wave.invokes)


def token_layers(program: Program, table: ModelTable, *, is_keeping: bool = True) -> int:
    """Rows x decoder layers that they run through, when the request has its passes to itself.

    `is_keeping` says whether the shards had room for the program's trunks. Ways back count as of `token_layers_back`.
    """
    if not table.description.has_forks:  # rows are planned everywhere; the pass still ends behind its last visit
        return token_layers_alone(program, table)
    there = sum((wave.rows if is_keeping else wave.rows_anew).token_layers for wave in program.waves)
    return there + token_layers_back(program, table)


def token_layers_alone(program: Program, table: ModelTable) -> int:
    """What it would be if every sequence had all its rows, each wave up to the last layer that the request needs."""
    there = sum(wave_tokens(program, wave) * table.levels.begun(wave.until) for wave in program.waves)
    return there + token_layers_back(program, table)


def token_layers_back(program: Program, table: ModelTable) -> int:
    """What gradients add: every row twice for each layer from the first visit where they stop on, each time that its
    wave runs back; three times where layers are run again for it.
    """
    found, levels = 0, table.levels
    for back in program.waves:
        if back.of is not None:
            wave = program.waves[back.of]
            layers = levels.begun(wave.until) - levels.acts_from(wave.cuts[0])
            found += wave_tokens(program, wave) * layers * (_WAY_BACK + wave.reruns)
    return found


def carried_bytes(program: Program, table: ModelTable) -> int:
    """Bytes of carried values on the links between stages, all ranks together."""
    works = [(stage, work) for wave in program.waves for stage, work in enumerate(wave.stages)]
    sent = sum(
        move.facts.num_bytes for stage, work in works for move in (*work.held, *work.leaving) if move.source == stage
    )
    return sent * table.description.ranks


def hidden_link_bytes(program: Program, table: ModelTable) -> int:
    """Bytes of hidden states, and of their gradients, from stage to stage: every rank sends its own copy."""
    stages, found = table.levels.stages, 0
    for wave in program.waves:
        if wave.of is None:
            found += wave.rows.link_rows
            continue
        there = program.waves[wave.of]
        first, end = table.levels.acts_from(there.cuts[0]), table.levels.begun(there.until)
        if first < end:
            found += wave_tokens(program, there) * (stages[end - 1] - stages[first])
    return found * table.description.hidden_bytes * table.description.ranks


def gathered_bytes(program: Program, table: ModelTable) -> int:
    """Bytes that ranks get of each other's parts, for the program's reads, parameters and operations.

    Of values that are worked out below the gather: of what is left over.
    """
    others = table.description.ranks - 1
    if not others:
        return 0
    found = 0
    for node in {node for wave in program.waves for node in nodes_of(wave)}:
        event, known, below = program.graph.nodes[node], program.facts[node], program.below.get(node)
        if known is None:
            continue
        if below is not None:
            found += known.num_bytes if below.result is None else 0
        elif isinstance(event, Read):
            _, leaf = table.site(event.site, "reads", event.where, event.invoke)
            found += known.num_bytes if leaf.sharded_view_dim is not None else 0
        elif isinstance(event, Parameter) and table.parameters[event.path].sharded_dim is not None:
            found += known.num_bytes
    return found * others


def read_bytes(program: Program) -> int:
    """Bytes of the values that reads give, all of them once."""
    read = {node for wave in program.waves for node in nodes_of(wave) if isinstance(program.graph.nodes[node], Read)}
    return sum(known.num_bytes for node in read if (known := program.facts[node]) is not None)


def pad_rows_written(program: Program) -> int:
    """Rows of writes that fall on left padding, each write once."""
    written = {node for wave in program.waves for node in nodes_of(wave)}
    writes = [node for node in map(program.graph.nodes.__getitem__, written) if isinstance(node, Write)]
    return sum(_num_pads(program, write.invoke) for write in writes)


def nodes_of(wave: Wave) -> Iterator[NodeId]:
    """All nodes that run in a wave, stage by stage."""
    for work in wave.stages:
        for fragment in work.fragments:
            yield from fragment.nodes


def find_notes(program: Program, table: ModelTable) -> tuple[str, ...]:
    """What a person should know: reads that see writes of later lines, rows written to padding, bits that may move."""
    events: dict[int, list[tuple[int, int]]] = {}  # invoke -> (order, node)
    for node, order in _orders(program).items():
        event = program.graph.nodes[node]
        if isinstance(event, (Read, Write)):
            events.setdefault(event.invoke, []).append((order, node))
    seen = [note for invoke in sorted(events) for note in _late_writes(program, sorted(events[invoke]))]
    padded = [
        f"the write at {write.where} writes {pads} rows of left padding, which vanish"
        for invoke in sorted(events)
        if (pads := _num_pads(program, invoke))
        for _, node in sorted(events[invoke])
        if isinstance(write := program.graph.nodes[node], Write) and table.has_pads(write.site)
    ]
    rounded = () if table.description.has_exact_rows else (ROUNDED_NOTE,)
    return (*_capped(seen), *_capped(padded), *rounded)


def _orders(program: Program) -> dict[NodeId, int]:
    """The order of the visit at which each node runs, in any wave."""
    works = [work for wave in program.waves for work in wave.stages]
    return {node: fragment.order for work in works for fragment in work.fragments for node in fragment.nodes}


def _late_writes(program: Program, events: list[tuple[int, int]]) -> Iterator[str]:
    """One note a read that sees a write of a later line: the last such."""
    latest = PROLOGUE
    for _, node in events:
        event = program.graph.nodes[node]
        if isinstance(event, Write):
            latest = max(latest, node)
        elif isinstance(event, Read) and latest > node:
            seen = program.graph.nodes[latest].where
            yield f"the read at {event.where} sees the write at {seen}, which stands later but acts at an earlier layer"


def _capped(notes: list[str]) -> tuple[str, ...]:
    distinct = tuple(dict.fromkeys(notes))
    more = len(distinct) - MAX_NOTES
    return distinct if more <= 0 else (*distinct[:MAX_NOTES], f"... and {more} more of this kind")


def _num_pads(program: Program, invoke: int) -> int:
    prompts = program.invokes[invoke]
    return len(prompts.sequences) * prompts.longest - prompts.num_tokens
