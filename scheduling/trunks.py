"""Which sequences leave their rows in the store, so that later waves of the request fork from them.

Owns the choice, and how much of each is kept. Candidates are the sequences that run again in a later wave, those that
waiting parts of a split wave fork from, and all others where there are few. What is kept is what their forks need when
the request has its passes to itself; rows that only those need run in the trunk's wave. Nothing is kept where all that
costs more than it saves.

Waves are looked at from the last to the first: what one needs of its trunks is what their waves have to run as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from polytrace.description import ModelDescription
from polytrace.graph import Invoke
from scheduling.forest import Forest, Placed, Stored, grow
from scheduling.levels import Levels
from scheduling.plan import NOWHERE, PROLOGUE, Cone, RequestId, Trunk, WaveRows
from scheduling.waves import Run

_FEW = 64  # sequences of earlier waves that are all looked at

Cones = Mapping[tuple[int, int], tuple[Cone, ...]]  # (wave, invoke) -> a cone for each sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkChoice:
    """The trunks of a request, by wave, and what each wave runs when they are kept."""

    trunks: tuple[Trunk, ...]
    rows: Mapping[int, WaveRows]


@dataclass(slots=True, eq=False)
class _Candidate:
    wave: int
    invoke: int
    sequence: int
    tokens: tuple[int, ...]
    cone: Cone
    stops: list[int]
    outputs: list[int]


def choose_trunks(
    invokes: Sequence[Invoke],
    runs: Sequence[Run],
    cones: Cones,
    forests: Mapping[int, Forest],
    ancestors: set[int],
    levels: Levels,
) -> TrunkChoice:
    """`forests` are the waves' without trunks; `ancestors` are invokes that waiting parts of their wave fork from.

    Without `runs` nothing is kept.
    """
    anew = {wave: rows_of(forest, levels) for wave, forest in forests.items()}
    if not runs or len(forests) < 2:
        return TrunkChoice(trunks=(), rows=anew)
    candidates = list(_candidates(invokes, runs, cones, ancestors, levels.count))
    while True:
        rows = _use(candidates, invokes, runs, cones, forests, levels)
        used = [one for one in candidates if any(one.stops)]
        if sum(each.token_layers for each in rows.values()) >= sum(each.token_layers for each in anew.values()):
            return TrunkChoice(trunks=(), rows=anew)  # they need more rows of trunks than they save
        if len(used) == len(candidates):  # one that is not used stands in the way of others
            return TrunkChoice(trunks=tuple(_trunk(one, levels) for one in used), rows=rows)
        candidates = [replace(one, stops=[0] * levels.count, outputs=[NOWHERE] * levels.count) for one in used]


def _use(
    candidates: Sequence[_Candidate],
    invokes: Sequence[Invoke],
    runs: Sequence[Run],
    cones: Cones,
    forests: Mapping[int, Forest],
    levels: Levels,
) -> dict[int, WaveRows]:
    """Tells the candidates what is needed of them; returns what each wave runs then."""
    rows: dict[int, WaveRows] = {}
    for wave in sorted(forests, reverse=True):
        before = [one for one in candidates if one.wave < wave]
        own = {(one.invoke, one.sequence): one for one in candidates if one.wave == wave and any(one.stops)}
        if not before and not own:
            rows[wave] = rows_of(forests[wave], levels)
            continue
        placed = [
            Placed(tokens=tokens, cone=_extended(cone, own.get((run.invoke, place))), domain=True)
            for run in runs
            if run.wave == wave
            for place, (tokens, cone) in enumerate(
                zip(invokes[run.invoke].sequences, cones[wave, run.invoke], strict=True)
            )
        ]
        forest = grow(placed, levels.count, [_as_kept(one, levels.count) for one in before])
        rows[wave] = rows_of(forest, levels)
        for one, (stops, outputs) in zip(before, forest.used, strict=True):
            one.stops = list(map(max, one.stops, stops))
            one.outputs = list(map(min, one.outputs, outputs))
    return rows


def rows_of(forest: Forest, levels: Levels) -> WaveRows:
    """What a forest runs, and what of it goes from stage to stage."""
    rows = forest.layer_rows
    borders = [layer for layer in range(1, len(levels.stages)) if levels.stages[layer] != levels.stages[layer - 1]]
    return WaveRows(
        widest=max(rows, default=0),
        token_layers=token_layers_of(forest),
        link_rows=sum(rows[layer] for layer in borders),
    )


def token_layers_of(forest: Forest) -> int:
    """Rows x layers that a forest runs."""
    return sum(forest.layer_rows) - sum(forest.skipped_rows)


def extended(cone: Cone, trunk: Trunk) -> Cone:
    """The cone of a sequence that is kept: what later waves need of its rows is needed."""
    return replace(
        cone,
        needs=tuple(map(max, cone.needs, trunk.stops)),
        behind=tuple(
            min(first, output) if output < stop else first
            for first, output, stop in zip(cone.behind, trunk.outputs, trunk.stops, strict=True)
        ),
    )


def trunk_bytes(trunks: Iterable[Trunk], description: ModelDescription, levels: Levels) -> int:
    """What all the trunks take on the shard that keeps most."""
    by_stage = [0] * description.stages
    for trunk in trunks:
        for layer, (stop, output) in enumerate(zip(trunk.stops, trunk.outputs, strict=True)):
            by_stage[levels.stages[layer]] += stop * description.key_value_bytes
            by_stage[levels.stages[layer]] += max(0, stop - output) * description.hidden_bytes
    return max(by_stage)


def _candidates(
    invokes: Sequence[Invoke], runs: Sequence[Run], cones: Cones, ancestors: set[int], num_layers: int
) -> Iterable[_Candidate]:
    last = {run.invoke: run.wave for run in runs}
    final = max(last.values())
    are_few = sum(len(invokes[run.invoke].sequences) for run in runs if run.wave < final) <= _FEW
    seen: set[tuple[object, ...]] = set()
    for run in runs:
        if run.wave == final or not (are_few or run.invoke in ancestors or last[run.invoke] > run.wave):
            continue
        for place, tokens in enumerate(invokes[run.invoke].sequences):
            cone = cones[run.wave, run.invoke][place]
            if cone.skips:
                continue  # it has no keys and values there to be kept
            if (tokens, cone.edits) not in seen:
                seen.add((tokens, cone.edits))
                yield _Candidate(run.wave, run.invoke, place, tokens, cone, [0] * num_layers, [NOWHERE] * num_layers)


def _as_kept(one: _Candidate, num_layers: int) -> Stored:
    """All of it: how much is kept follows from who forks from it."""
    return Stored(
        trunk=(RequestId(""), 0),
        tokens=one.tokens,
        edits=one.cone.edits,
        domain=True,
        stops=(NOWHERE,) * num_layers,
        outputs=(0,) * num_layers,
    )


def _extended(cone: Cone, one: _Candidate | None) -> Cone:
    return cone if one is None else extended(cone, _bare_trunk(one))


def _bare_trunk(one: _Candidate) -> Trunk:
    return Trunk(
        wave=one.wave,
        invoke=one.invoke,
        sequence=one.sequence,
        edits=one.cone.edits,
        stops=tuple(one.stops),
        outputs=tuple(map(min, one.outputs, one.stops)),
        until=PROLOGUE,
    )


def _trunk(one: _Candidate, levels: Levels) -> Trunk:
    bare = _bare_trunk(one)
    until = PROLOGUE
    for layer, (stop, output) in enumerate(zip(bare.stops, bare.outputs, strict=True)):
        if stop:
            until = levels.behind(layer) if output < stop else levels.output(layer)
    return replace(bare, until=until)
