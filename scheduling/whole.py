"""Works out a request to a model that is called as it is: each invoke is one call, with sites of its own.

Owns the one order that the calls of a request have in common, so that values flow between them as between prompts.
What a call visits is found elsewhere (`engine.whole_sites`). There are no rows, so there is nothing to share, to narrow
or to leave out, and nothing to pack: a wave names what runs, and its calls follow from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from polytrace.collector import young_only
from polytrace.description import Limits, ModelDescription, SiteInfo
from polytrace.errors import GraphError, TooLargeError
from polytrace.given import structure_of
from polytrace.graph import Inputs, Port, Read, Request, Write
from scheduling.checks import resolve, table_of
from scheduling.columns import Columns
from scheduling.gradients import expand, has_gradients
from scheduling.liveness import peak_bytes
from scheduling.placement import find_live, find_order, place, scale_of
from scheduling.plan import PROLOGUE, Program, RequestId, ValueFacts, Wave, WaveRows
from scheduling.program import check_writes, lay_out_saves
from scheduling.residency import stage_works
from scheduling.waves import executions, find_runs

_NO_ROWS = WaveRows(widest=0, token_layers=0)
_Key = tuple[str, Port, int]


def described(description: ModelDescription, of_invokes: Sequence[tuple[SiteInfo, ...]]) -> ModelDescription:
    """The description for one request, given the sites of each of its invokes: all of them in one order."""
    distinct = list({id(sites): sites for sites in of_invokes}.values())
    with_tensors = [tuple([info for info in sites if info.leaves]) for sites in distinct]
    placed = dict(zip(map(id, distinct), _in_one_order(with_tensors), strict=True))
    return with_sites(description, [placed[id(sites)] for sites in of_invokes])


def with_sites(description: ModelDescription, of_invokes: Sequence[tuple[SiteInfo, ...]]) -> ModelDescription:
    """The same, of sites that have been brought into one order."""
    every = {info.order: info for sites in of_invokes for info in sites}
    own = tuple([every[order] for order in sorted(every)])
    return replace(description, sites=own, of_invokes=tuple(of_invokes))


def named_sites(request: Request, description: ModelDescription) -> list[tuple[SiteInfo, ...]]:
    """Of each invoke the sites that the request names: all that is needed to work it out again."""
    named: list[set[_Key]] = [set() for _ in request.invokes]
    for node in request.graph.nodes:
        if isinstance(node, (Read, Write)):
            named[node.invoke].add((node.site.module, node.site.port, node.site.visit))
    pairs = zip(description.of_invokes, named, strict=True)
    return [tuple([info for info in sites if _key(info) in own]) for sites, own in pairs]


def inputs_of_all(request: Request) -> list[Inputs]:
    """What each invoke is called with. Raises GraphError where one has prompts."""
    found = [invoke.inputs for invoke in request.invokes]
    if any(inputs is None for inputs in found):
        raise GraphError("this model is called with arguments of its forward, and the request has prompts")
    return [inputs for inputs in found if inputs is not None]


def taped(program: Program, num_bytes: int, limits: Limits) -> Program:
    """The program, whose calls keep so much for gradients. Raises TooLargeError."""
    if num_bytes > limits.tape_bytes:
        raise TooLargeError(
            f"the gradients of this request keep {num_bytes:,} bytes; the limit is {limits.tape_bytes:,}: "
            "ask for gradients of fewer calls at once, of smaller ones, or of later sites"
        )
    return replace(program, tape_bytes=num_bytes)


def work_out_call(
    request_id: RequestId, request: Request, description: ModelDescription, facts: tuple[ValueFacts | None, ...]
) -> Program:
    """The program of a request; `description` is that of the request (`described`). Raises as `work_out_program`."""
    with young_only:
        # 1) Refuse what does not fit the model.
        graph, limits = request.graph, description.limits
        resolved = resolve(request, table_of(description))
        check_writes(request, resolved, facts)

        # 2) Give each node its point: a value that is needed earlier than it is made opens a later wave.
        scale = scale_of(description)
        live = find_live(graph, resolved)
        earliest: Sequence[int] | None = None
        cuts: Mapping[int, tuple[int, ...]] = {}
        frees: Mapping[int, tuple[int, ...]] = {}
        if has_gradients(graph):
            columns = Columns(narrowed={}, changed={}, graph=graph, facts=facts)
            expanded = expand(request, resolved, columns, table_of(description), scale)
            resolved, live, graph, facts = (
                expanded.resolved,
                expanded.live,
                expanded.request.graph,
                expanded.columns.facts,
            )
            earliest, cuts, frees = expanded.earliest, expanded.cuts, expanded.frees
        order = find_order(graph, resolved, live)
        points = place(graph, resolved, order, facts, scale, earliest)
        runs = find_runs(graph, resolved, live, points, scale)

        # 3) Plan what is dropped when, and where saved values go.
        works = stage_works(graph, resolved, points, facts, executions(graph, live, points, runs, scale), scale)
        saves = lay_out_saves(graph, points, facts, scale, {keep.save: keep for keep in request.keeps})
        result_bytes = sum(slot.facts.num_bytes for slot in saves if slot.keep is None)
        if result_bytes > limits.max_result_bytes:
            raise TooLargeError(f"all saves take {result_bytes} bytes; the limit is {limits.max_result_bytes}")
        waves = [
            Wave(
                invokes=(),
                kept=(),
                cones=(),
                until=PROLOGUE,
                rows=_NO_ROWS,
                rows_anew=_NO_ROWS,
                stages=stages,
                cuts=cuts.get(number, ()),
                of=scale.runs_back(number),
                frees=frees.get(number, ()),
            )
            for number, stages in enumerate(works)
        ]
        return Program(
            request=request_id,
            graph=graph,
            narrowed={},
            invokes=request.invokes,
            seed=request.options.seed,
            edits=request.options.edits,
            sharing_domain=None,
            facts=facts,
            below={},
            waves=tuple(waves),
            saves=saves,
            trunks=(),
            trunk_bytes=0,
            live_bytes=peak_bytes(resolved, [0 if known is None else known.num_bytes for known in facts])[0],
            constants=request.constants,
            structure=_one_structure(request),
        )


def _one_structure(request: Request) -> str | None:
    """That of all calls; None where they have several."""
    found = {repr(structure_of(inputs, request.constants)) for inputs in inputs_of_all(request)}
    return found.pop() if len(found) == 1 else None


def _in_one_order(tables: Sequence[tuple[SiteInfo, ...]]) -> list[tuple[SiteInfo, ...]]:
    """The tables with orders that agree: sites of one name have one order, and each table keeps its own sequence.

    Where no order agrees with all, one table stands behind the other.
    """
    if len(tables) == 1:
        return list(tables)
    sorter: TopologicalSorter[_Key] = TopologicalSorter()
    for sites in tables:
        for before, info in zip((None, *sites), sites, strict=False):
            sorter.add(_key(info), *(() if before is None else (_key(before),)))
    try:
        orders = {key: order for order, key in enumerate(sorter.static_order())}
    except CycleError:
        starts = [sum(map(len, tables[:number])) for number in range(len(tables))]
        return [
            tuple([replace(info, order=start + number) for number, info in enumerate(sites)])
            for start, sites in zip(starts, tables, strict=True)
        ]
    return [tuple([replace(info, order=orders[_key(info)]) for info in sites]) for sites in tables]


def _key(info: SiteInfo) -> _Key:
    return info.module, info.port, info.visit
