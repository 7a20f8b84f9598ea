"""Works a request of prompts out: where each of its nodes runs, what is carried, in which waves.

The whole story is `_work_out`; each of its steps is a file of this folder. Knows nothing of
other requests (`scheduling.packing` merges them) nor of files (the caller sets them with `dataclasses.replace`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from polytrace.certificate import Certificate, ValueShape
from polytrace.collector import young_only
from polytrace.description import Limits, ModelDescription
from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import (
    Backward,
    Graph,
    Invoke,
    KeptSave,
    NodeId,
    Read,
    Request,
    Save,
    Sharing,
    Write,
    name_at,
)
from polytrace.tensors import itemsize
from scheduling.below import Lowered, lower
from scheduling.checks import Resolved, check_steps, resolve, table_of
from scheduling.columns import find_columns
from scheduling.cones import Keys, find_cones, kept_columns
from scheduling.costs import (
    carried_bytes,
    find_notes,
    gathered_bytes,
    hidden_link_bytes,
    read_bytes,
    token_layers,
    token_layers_alone,
    wave_tokens,
)
from scheduling.forest import Forest, Placed, grow
from scheduling.gradients import cuts_of, expand, has_gradients
from scheduling.image_costs import image_bytes, image_flops
from scheduling.levels import Levels
from scheduling.liveness import peak_bytes
from scheduling.op_costs import program_flops
from scheduling.placement import Scale, find_live, find_order, is_token, place, scale_of
from scheduling.plan import PROLOGUE, Cone, Program, RequestId, SaveSlot, StageWork, ValueFacts, Wave, WaveRows
from scheduling.residency import stage_works
from scheduling.shard_bytes import row_bytes, staying_bytes
from scheduling.splitting import fits, split
from scheduling.step_costs import most_rows, step_costs
from scheduling.steps import Facts, Infer, generates, work_out_chain
from scheduling.tapes import fit, tapes_of
from scheduling.trunks import TrunkChoice, choose_trunks, rows_of, trunk_bytes
from scheduling.waves import Run, executions, find_runs

_NO_ROWS = WaveRows(widest=0, token_layers=0)
_MAX_LOOKS = 3  # at waves, to split those that are too large; one that still is goes alone


def work_out_program(request_id: RequestId, request: Request, description: ModelDescription, facts: Facts) -> Program:
    """The program of a request, `facts` being what is known of each node's value. Linear in nodes and writes.

    Constants stay where the request has them. Raises GraphError with the user's line, and TooLargeError.
    """
    with young_only:
        return _work_out(request_id, request, description, facts)


def work_out_prompts(
    request_id: RequestId, request: Request, description: ModelDescription, infer: Infer
) -> tuple[Program, Facts]:
    """The program of a request, a generation or not, and what is known of each node's value.

    `infer` says that of a request's nodes. Of a generation it is asked for step 0 and then for every different step.
    """
    if not generates(request):
        facts = infer(request)
        return work_out_program(request_id, request, description, facts), facts

    def work_out_step(step: Request, facts: Facts, holds: frozenset[NodeId], *, is_first: bool) -> Program:
        return _work_out(request_id, step, description, facts, holds, is_first=is_first)

    with young_only:
        _check_size(request, description.limits)
        check_steps(request.graph.nodes, table_of(description))
        program, facts = work_out_chain(request, infer, work_out_step)
    assert program.chain is not None
    if program.chain.data_bytes > description.limits.max_result_bytes:
        told = f"the saves of all steps take {program.chain.data_bytes} bytes"
        raise TooLargeError(f"{told}; the limit is {description.limits.max_result_bytes}")
    return program, facts


def _check_size(request: Request, limits: Limits) -> None:
    """What a generation may be before it is cut into steps."""
    nodes = request.graph.nodes
    if len(nodes) > limits.max_nodes:
        raise TooLargeError(f"the graph has {len(nodes)} nodes; the limit is {limits.max_nodes}")
    saves = sum(node.num_steps for node in nodes if isinstance(node, Save))
    if saves > limits.max_nodes:
        raise TooLargeError(f"all steps together save {saves} values; the limit is {limits.max_nodes}")
    tokens = sum(
        one.num_tokens + len(one.sequences) * one.generation.max_new_tokens
        for one in request.invokes
        if one.generation is not None
    )
    if tokens > limits.max_request_tokens:
        raise TooLargeError(
            f"all prompts and what they go on with have {tokens} tokens; the limit is {limits.max_request_tokens}"
        )


def _work_out(
    request_id: RequestId,
    request: Request,
    description: ModelDescription,
    facts: Facts,
    holds: frozenset[NodeId] = frozenset(),
    *,
    is_first: bool = True,
) -> Program:
    # 1) Refuse what does not fit the model.
    graph, limits = request.graph, description.limits
    table = table_of(description)
    resolved = resolve(request, table)
    check_writes(request, resolved, facts)

    # 2) Find what a save or a write needs, and which columns of the prompts are read and written.
    scale = scale_of(description)
    live = find_live(graph, resolved, holds)
    columns = find_columns(request, resolved, live, facts)
    _check_pairs(graph, resolved, live, columns.facts, limits.max_value_bytes)
    earliest: Sequence[int] | None = None
    cuts: Mapping[int, tuple[int, ...]] = {}
    frees: Mapping[int, tuple[int, ...]] = {}
    is_graded = has_gradients(graph)
    if is_graded:
        _check_gradients(graph, description)
        expanded = expand(request, resolved, columns, table, scale)
        request, resolved, live, columns = expanded.request, expanded.resolved, expanded.live, expanded.columns
        graph, facts, cuts, frees = request.graph, columns.facts, expanded.cuts, expanded.frees
        earliest = expanded.earliest

    # 3) Give each node its point (wave, stage, order), and with it each wave its rows; too many take several waves.
    # On the way of a gradient a row is one sequence's: two losses would add up in it.
    is_shared = is_first and description.has_forks and request.options.sharing is not Sharing.OFF and not is_graded
    domain = request.options.sharing.value if is_shared else None  # of whom it is: see `owned`
    earliest = [0] * len(request.invokes) if earliest is None else list(earliest)
    ancestors: set[int] = set()
    order = find_order(graph, resolved, live)
    keys = Keys(request, resolved, columns, order)
    num_unsplit = 0
    for look in range(_MAX_LOOKS):
        points = place(graph, resolved, order, facts, scale, earliest, holds)
        runs = find_runs(graph, resolved, live, points, scale)
        cones = find_cones(request, resolved, columns, keys, runs, table, cuts)
        forests = _grow(request.invokes, runs, cones, domain, description.num_layers)
        num_unsplit = num_unsplit or len(forests)
        if is_graded or look == _MAX_LOOKS - 1 or all(fits(forest, limits.pass_tokens) for forest in forests.values()):
            break
        found = split(runs, forests, request.invokes, description.num_layers, limits.pass_tokens)
        if not found.waits:
            break
        ancestors |= found.ancestors
        for invoke, wave in found.waits.items():
            earliest[invoke] = wave
    kept = kept_columns(request, resolved, columns, runs)

    chosen = choose_trunks(request.invokes, runs if is_shared else [], cones, forests, ancestors, table.levels)

    ends = {wave: back for back, waves in frees.items() for wave in waves}
    stops = {wave: cuts_of(cuts, wave, runs, resolved, table.levels) for wave in cuts}
    visited = [entry[0] for entry in resolved.sites if entry is not None]
    tapes = tapes_of(stops, ends, runs, kept, request.invokes, visited, table)
    taken_bytes, reruns = fit(tapes, description, table)

    # 4) Plan what is carried, held and dropped, and where saved values go.
    executed = executions(graph, live, points, runs, scale)
    works = stage_works(graph, resolved, points, columns.facts, executed, scale, holds)
    lowered = Lowered(below={}, graph=columns.graph)
    if not is_graded:
        lowered = lower(columns.graph, columns.facts, resolved, live, points, scale, table, holds)
    saves = lay_out_saves(graph, points, facts, scale, {keep.save: keep for keep in request.keeps})
    result_bytes = sum(slot.facts.num_bytes for slot in saves if slot.keep is None)
    if result_bytes > limits.max_result_bytes:
        raise TooLargeError(f"all saves take {result_bytes} bytes; the limit is {limits.max_result_bytes}")
    return Program(
        request=request_id,
        graph=lowered.graph,
        narrowed=columns.narrowed,
        invokes=request.invokes,
        seed=request.options.seed,
        edits=request.options.edits,
        sharing_domain=domain,
        facts=columns.facts,
        below=lowered.below,
        waves=tuple(
            replace(
                wave,
                cuts=stops.get(number, ()),
                of=scale.runs_back(number),
                frees=frees.get(number, ()),
                reruns=reruns and number in stops,
            )
            for number, wave in enumerate(_waves(graph, works, runs, kept, cones, forests, chosen, table.levels))
        ),
        saves=saves,
        holds={node: scale.stage(points[node]) for node in sorted(holds)},
        trunks=chosen.trunks,
        trunk_bytes=trunk_bytes(chosen.trunks, description, table.levels),
        tape_bytes=taken_bytes,
        live_bytes=peak_bytes(resolved, [0 if known is None else known.num_bytes for known in columns.facts])[0],
        split=len(forests) - num_unsplit,
        constants=request.constants,
    )


def owned(program: Program, tenant: str, *, is_interactive: bool, shares_across_tenants: bool) -> Program:
    """The program as a tenant's: it shares rows and kept prefixes with its own requests alone, unless the deployment
    shares across tenants.
    """

    def domain_of(own: Program) -> str | None:
        if own.sharing_domain is None or shares_across_tenants:
            return own.sharing_domain
        return f"{tenant}:{own.sharing_domain}"

    def placed(own: Program) -> Program:
        return replace(own, tenant=tenant, is_interactive=is_interactive, sharing_domain=domain_of(own))

    program = placed(program)
    if program.chain is None:
        return program
    return replace(program, chain=replace(program.chain, parts=tuple(map(placed, program.chain.parts))))


def certify(
    program: Program,
    facts: tuple[ValueFacts | None, ...],
    description: ModelDescription,
    *,
    has_values: bool = True,
    request_bytes: int = 0,
) -> Certificate:
    """What a program will cost and return; `facts` are those that it was worked out with.

    Of a generation as if no sequence ended early. Without values: the totals alone, which admission asks for.
    """
    table = table_of(description)
    steps = step_costs(program, most_rows(program), table)
    saves = list(_all_saves(program))
    return Certificate(
        nodes=tuple([None if known is None else _shape(known) for known in facts]) if has_values else (),
        saves={name: _shape(slot.facts) for name, slot in saves if slot.keep is None} if has_values else {},
        passes=len(program.waves) + _num_step_passes(program),
        tokens=steps.tokens + sum(wave_tokens(program, wave) for wave in program.waves),
        token_layers=steps.token_layers + token_layers(program, table),
        token_layers_alone=steps.token_layers + token_layers_alone(program, table),
        result_bytes=sum(slot.facts.num_bytes for _, slot in saves if slot.keep is None),
        kept_bytes=sum(slot.facts.num_bytes for _, slot in saves if slot.keep is not None),
        read_bytes=steps.read_bytes + read_bytes(program),
        carried_bytes=steps.carried_bytes + carried_bytes(program, table),
        tape_bytes=program.tape_bytes,
        live_bytes=max([program.live_bytes, *(part.live_bytes for part in _parts(program))]),
        op_flops=steps.op_flops + program_flops(program, table) + image_flops(program, description),
        split=program.split + sum(part.split for part in _parts(program)),
        row_bytes=row_bytes(program, table) + image_bytes(program, description),
        trunk_bytes=staying_bytes(program, table),
        gathered_bytes=steps.gathered_bytes + gathered_bytes(program, table),
        hidden_link_bytes=steps.hidden_link_bytes + hidden_link_bytes(program, table),
        notes=find_notes(program, table) if has_values else (),
        edits=program.edits,
        request_bytes=request_bytes,
    )


def _all_saves(program: Program) -> Iterator[tuple[str, SaveSlot]]:
    """Every save that a result may have, those of all steps."""
    for slot in program.saves:
        yield (name_at(slot.name, 0) if slot.is_of_step else slot.name), slot
    if program.chain is not None:
        runs = list(enumerate(program.chain.steps, 1))
        if program.chain.ending is not None:
            runs.append((len(runs) + 1, program.chain.ending))
        for step, run in runs:
            for slot in program.chain.parts[run.part].saves:
                yield (name_at(slot.name, step) if slot.is_of_step else slot.name), slot


def _parts(program: Program) -> tuple[Program, ...]:
    return () if program.chain is None else program.chain.parts


def _num_step_passes(program: Program) -> int:
    if program.chain is None:
        return 0
    runs = [*program.chain.steps, *([] if program.chain.ending is None else [program.chain.ending])]
    return sum(len(program.chain.parts[run.part].waves) for run in runs)


def _check_gradients(graph: Graph, description: ModelDescription) -> None:
    """Raises GraphError where the model has none."""
    if description.why_no_gradients:
        where = next(node.where for node in graph.nodes if isinstance(node, Backward))
        raise GraphError(f"{description.class_name} has no gradients here: {description.why_no_gradients}", where=where)


def _check_pairs(
    graph: Graph, resolved: Resolved, live: list[bool], facts: tuple[ValueFacts | None, ...], max_value_bytes: int
) -> None:
    """Scores and patterns are as large as the square of a prompt; what counts is how many columns are read of them."""
    for position, (node, entry) in enumerate(zip(graph.nodes, resolved.sites, strict=True)):
        if live[position] and entry is not None and entry[1].of_pairs and isinstance(node, Read):
            known = facts[position]
            if known is not None and known.num_bytes > max_value_bytes:
                raise TooLargeError(
                    f"{node.site} would be a value of {known.num_bytes} bytes ({list(known.shape)}); the limit is "
                    f"{max_value_bytes}: read some of its queries, as in [:, :, -1]",
                    where=node.where,
                )


def check_writes(request: Request, resolved: Resolved, facts: tuple[ValueFacts | None, ...]) -> None:
    """A written value has exactly the shape of its site's view; its dtype is cast."""
    for node, entry in zip(request.graph.nodes, resolved.sites, strict=True):
        if isinstance(node, Write) and entry is not None:
            invoke, value = request.invokes[node.invoke], facts[node.value.node]
            shape = entry[1].view_shape(len(invoke.sequences), invoke.longest, before=invoke.before)
            if value is None:
                raise GraphError(f"what is written to {node.site} is no tensor of known shape", where=node.where)
            if value.shape != shape:
                told = f"{node.site} has shape {list(shape)}, the value written to it {list(value.shape)}"
                raise GraphError(told, where=node.where)


def lay_out_saves(
    graph: Graph, points: list[int], facts: tuple[ValueFacts | None, ...], scale: Scale, keeps: Mapping[str, KeptSave]
) -> tuple[SaveSlot, ...]:
    """Slots without holes, as readers of the format demand; larger elements first keeps each aligned to its size.

    What stays on the service has a place of its own.
    """
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
        keep = keeps.get(save.name)
        place = 0 if keep is not None else offset
        slots.append(
            SaveSlot(
                name=save.name,
                node=position,
                stage=stage,
                facts=known,
                offset=place,
                keep=keep,
                is_of_step=save.step is not None,
            )
        )
        offset += 0 if keep is not None else known.num_bytes
    return tuple(slots)


def _grow(
    invokes: tuple[Invoke, ...],
    runs: list[Run],
    cones: dict[tuple[int, int], tuple[Cone, ...]],
    domain: str | None,
    num_layers: int,
) -> dict[int, Forest]:
    """The rows of each wave when the request has its passes to itself."""
    placed: dict[int, list[Placed]] = {}
    for run in runs:
        own = zip(invokes[run.invoke].sequences, cones[run.wave, run.invoke], strict=True)
        placed.setdefault(run.wave, []).extend(Placed(tokens=tokens, cone=cone, domain=domain) for tokens, cone in own)
    return {wave: grow(sequences, num_layers) for wave, sequences in placed.items()}


def _waves(
    graph: Graph,
    works: list[tuple[StageWork, ...]],
    runs: list[Run],
    kept: dict[tuple[int, int], tuple[int, ...]],
    cones: dict[tuple[int, int], tuple[Cone, ...]],
    forests: dict[int, Forest],
    chosen: TrunkChoice,
    levels: Levels,
) -> tuple[Wave, ...]:
    runs_of: list[list[Run]] = [[] for _ in works]
    for run in runs:
        runs_of[run.wave].append(run)
    tokens = _final_tokens(graph)
    waves = []
    for wave, (stages, own) in enumerate(zip(works, runs_of, strict=True)):
        waves.append(
            Wave(
                invokes=tuple(run.invoke for run in own),
                kept=tuple(kept[run.wave, run.invoke] for run in own),
                cones=tuple(cones[run.wave, run.invoke] for run in own),
                drawing=tuple(run.invoke for run in own if not tokens.isdisjoint(run.reads)),
                until=max((run.until for run in own), default=PROLOGUE),
                rows=chosen.rows.get(wave, _NO_ROWS),
                rows_anew=rows_of(forests[wave], levels) if wave in forests else _NO_ROWS,
                stages=stages,
            )
        )
    return tuple(waves)


def _final_tokens(graph: Graph) -> frozenset[int]:
    """The reads that say what sequences go on with: of each invoke its last, behind all writes."""
    return frozenset({node.invoke: place for place, node in enumerate(graph.nodes) if is_token(node)}.values())  # type: ignore[union-attr]


def _shape(known: ValueFacts) -> ValueShape:
    return ValueShape(shape=known.shape, dtype=known.dtype)
