"""Works one request out: where each of its nodes runs, what is carried, in which waves. Done once, at admission.

The whole story of a compilation is `compile_program`; each of its steps is a file of this folder. Knows nothing of
other requests (`scheduling.packing` merges them) nor of files (the caller sets them with `dataclasses.replace`).
"""

from __future__ import annotations

from polytrace.certificate import Certificate, ValueShape
from polytrace.description import ModelDescription
from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import Graph, NodeId, Request, Save, Write
from polytrace.tensors import itemsize
from scheduling.checks import Resolved, resolve, table_of
from scheduling.costs import carried_bytes, find_notes, read_bytes, token_layers, wave_tokens
from scheduling.kept import Kept, full_facts, keep_columns
from scheduling.placement import Scale, find_live, place, scale_of
from scheduling.plan import PROLOGUE, Program, RequestId, SaveSlot, StageWork, ValueFacts, Wave
from scheduling.residency import stage_works
from scheduling.waves import Run, executions, find_runs


def compile_program(
    request_id: RequestId, request: Request, description: ModelDescription, facts: tuple[ValueFacts | None, ...]
) -> Program:
    """The program of a request, `facts` being what is known of each node's value. Linear in nodes and writes.

    Constants stay where the request has them. Raises GraphError with the user's line, and TooLargeError.
    """
    # 1) Refuse what does not fit the model.
    graph = request.graph
    resolved = resolve(request, table_of(description))
    _check_writes(request, resolved, facts)

    # 2) Give each node that a save or a write needs its point (wave, stage, order).
    scale = scale_of(description)
    live = find_live(graph, resolved)
    points = place(graph, resolved, live, facts, scale)

    # 3) Say which invokes run in which waves, and which columns of them the head sees.
    runs = find_runs(graph, resolved, live, points, scale)
    kept = keep_columns(
        graph, request.invokes, resolved, live, facts, runs, points, scale, has_kept_rows=description.has_kept_rows
    )

    # 4) Plan what is carried, held and dropped, and where saved values go.
    works = stage_works(graph, resolved, points, kept.facts, executions(graph, live, points, runs, scale), scale)
    saves = _lay_out_saves(graph, points, facts, scale)
    result_bytes = sum(slot.facts.num_bytes for slot in saves)
    if result_bytes > description.limits.max_result_bytes:
        raise TooLargeError(f"all saves take {result_bytes} bytes; the limit is {description.limits.max_result_bytes}")
    return Program(
        request=request_id,
        graph=kept.graph,
        invokes=request.invokes,
        seed=request.options.seed,
        facts=kept.facts,
        waves=_waves(works, runs, kept),
        saves=saves,
        constants=request.constants,
    )


def certify(program: Program, request: Request, description: ModelDescription) -> Certificate:
    """What the request of a compiled program will cost and return."""
    table = table_of(description)
    resolved = resolve(request, table)
    facts = full_facts(program.graph, program.invokes, resolved, program.facts)
    return Certificate(
        nodes=tuple(None if known is None else _shape(known) for known in facts),
        saves={slot.name: _shape(slot.facts) for slot in program.saves},
        passes=len(program.waves),
        tokens=sum(wave_tokens(program, wave) for wave in program.waves),
        token_layers=token_layers(program, table),
        result_bytes=sum(slot.facts.num_bytes for slot in program.saves),
        read_bytes=read_bytes(program),
        carried_bytes=carried_bytes(program, table),
        live_bytes=sum(known.num_bytes for known in program.facts if known is not None),
        notes=find_notes(program, table),
    )


def _check_writes(request: Request, resolved: Resolved, facts: tuple[ValueFacts | None, ...]) -> None:
    """A written value has exactly the shape of its site's view; its dtype is cast."""
    for node, entry in zip(request.graph.nodes, resolved.sites, strict=True):
        if isinstance(node, Write) and entry is not None:
            invoke, value = request.invokes[node.invoke], facts[node.value.node]
            shape = (len(invoke.sequences), invoke.longest, *entry[1].tail)
            if value is None:
                raise GraphError(f"what is written to {node.site} is no tensor of known shape", where=node.where)
            if value.shape != shape:
                told = f"{node.site} has shape {list(shape)}, the value written to it {list(value.shape)}"
                raise GraphError(told, where=node.where)


def _lay_out_saves(
    graph: Graph, points: list[int], facts: tuple[ValueFacts | None, ...], scale: Scale
) -> tuple[SaveSlot, ...]:
    """Slots without holes, as readers of the format demand; larger elements first keeps each aligned to its size."""
    found: list[tuple[Save, NodeId, ValueFacts]] = []
    for position, node in enumerate(graph.nodes):
        if isinstance(node, Save):
            known = facts[node.value.node]
            if known is None:
                told = f"the shape of {node.name!r} is not known ahead, so it cannot be saved"
                raise GraphError(told, where=node.where)
            found.append((node, NodeId(position), known))
    found.sort(key=lambda entry: -itemsize(entry[2].dtype))
    slots, offset = [], 0
    for save, position, known in found:
        stage = scale.stage(points[position])
        slots.append(SaveSlot(name=save.name, node=position, stage=stage, facts=known, offset=offset))
        offset += known.num_bytes
    return tuple(slots)


def _waves(works: list[tuple[StageWork, ...]], runs: list[Run], kept: Kept) -> tuple[Wave, ...]:
    runs_of: list[list[Run]] = [[] for _ in works]
    for run in runs:
        runs_of[run.wave].append(run)
    return tuple(
        Wave(
            invokes=tuple(run.invoke for run in own),
            kept=tuple(kept.columns[run.wave, run.invoke] for run in own),
            until=max((run.until for run in own), default=PROLOGUE),
            stages=stages,
        )
        for stages, own in zip(works, runs_of, strict=True)
    )


def _shape(known: ValueFacts) -> ValueShape:
    return ValueShape(shape=known.shape, dtype=known.dtype)
