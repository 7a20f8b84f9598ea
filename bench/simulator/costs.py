"""What a plan costs each stage, in seconds at the roofline (`cluster.planning.roofline`).

Counted from the plan: rows of every layer, pairs of query and key, rows of the head, hidden states on links; and from
its members' programs: modules that they call, values that they carry, saves that go to the network. Keys of a segment
are read once for all that fork from it, as `engine.flash` does.

Not counted: what the host does between kernels, smaller operations of graphs than calls of modules, copies, waiting for
disks, and reads that ranks have to gather (no experiment of `bench.simulator.experiments` has one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from cluster.planning.roofline import Roofline
from polytrace.description import ModelDescription
from polytrace.graph import Call, NodeId, Read, Save, Write
from polytrace.tensors import itemsize
from scheduling.checks import table_of
from scheduling.op_costs import call_flops
from scheduling.plan import PROLOGUE, Plan, Program
from scheduling.rows import stretches


@dataclass(frozen=True, slots=True)
class Part:
    """What one stage does of one member's wave, beside its rows."""

    seconds: float
    saved_bytes: int
    fired: tuple[NodeId, ...]  # reads, writes and saves, as a shard reports them


class PlanCosts:
    """Costs of one deployment's plans."""

    def __init__(self, description: ModelDescription, roofline: Roofline) -> None:
        self.description, self.roofline = description, roofline
        self._table = table_of(description)
        self._num_layers = description.num_layers
        # by graph and wave: requests are the programs of a few templates, whose graphs are these same objects
        self._parts: dict[tuple[int, int], tuple[Part, ...]] = {}
        self._graphs: list[object] = []  # kept, so that their ids stay theirs

    def seconds(self, plan: Plan) -> list[float]:
        """Of each stage."""
        layers = self._num_layers
        begun = self._table.levels.begun(plan.until) if plan.until != PROLOGUE else 0
        rows = [count if layer < begun else 0 for layer, count in enumerate(plan.running_rows)]
        pairs, keys = _attended(plan, layers)
        head_rows = sum(len(segment.head) for segment in plan.segments if segment.trunk is None)
        found = []
        for stage, share in enumerate(self.roofline.shares):
            own = slice(share.layers.start, share.layers.stop)
            sent = rows[share.layers.stop] if share.layers.stop < layers else 0
            found.append(
                self.roofline.seconds(
                    stage, rows=rows[own], pairs=pairs[own], keys=keys[own], head_rows=head_rows, sent_rows=sent
                ).all_s
            )
        for member in plan.members:
            for stage, part in enumerate(self.parts(member.program, member.wave)):
                found[stage] += part.seconds
        return found

    def parts(self, program: Program, wave: int) -> tuple[Part, ...]:
        """What each stage does of a member's wave."""
        key = id(program.graph), wave
        if key not in self._parts:
            self._graphs.append(program.graph)
            self._parts[key] = tuple([self._part(program, wave, stage) for stage in range(self.description.stages)])
        return self._parts[key]

    def _part(self, program: Program, wave: int, stage: int) -> Part:
        hardware, work = self.roofline.hardware, program.waves[wave].stages[stage]
        nodes = [node for fragment in work.fragments for node in fragment.nodes]
        calls = [call for node in nodes if isinstance(call := program.graph.nodes[node], Call)]
        seconds = sum(self._call_seconds(call, program) for call in calls)
        carried = sum(move.facts.num_bytes for move in (*work.held, *work.leaving) if move.source == stage)
        sizes: Mapping[NodeId, int] = {slot.node: slot.facts.num_bytes for slot in program.saves}
        saved = sum(sizes.get(node, 0) for node in nodes)
        return Part(
            seconds=seconds + carried / hardware.link_rate + saved / hardware.network_rate,
            saved_bytes=saved,
            fired=tuple([node for node in nodes if isinstance(program.graph.nodes[node], (Read, Write, Save))]),
        )

    def _call_seconds(self, call: Call, program: Program) -> float:
        """Of a module that a graph calls: each call reads its weights, of which every rank has its part."""
        hardware, ranks = self.roofline.hardware, self.description.ranks
        own = [info for path, info in self._table.parameters.items() if path.startswith(f"{call.module}.")]
        stored = [info for info in own if info.of is None]
        num_bytes = sum(
            prod(info.shape) * itemsize(info.dtype) // (1 if info.sharded_dim is None else ranks) for info in stored
        )
        share = 1 if all(info.sharded_dim is None for info in stored) else ranks
        flops = call_flops(call, program.facts, self._table) / share
        return max(flops / hardware.flops, num_bytes / hardware.memory_rate)


def _attended(plan: Plan, num_layers: int) -> tuple[list[float], list[float]]:
    """By layer: pairs of a query and a key, and keys that are read."""
    pairs, keys = [0.0] * (num_layers + 1), [0.0] * (num_layers + 1)
    for segment in plan.segments:
        for first, until, start, stop in stretches(segment, num_layers):
            keys[first] += stop - start
            keys[until] -= stop - start
            if segment.trunk is None:
                found = (stop - start) * (start + stop + 1) / 2  # the row at a position attends to so many and itself
                pairs[first] += found
                pairs[until] -= found
    return list(accumulate(pairs[:num_layers])), list(accumulate(keys[:num_layers]))
