"""One deployment without shards: its description, its cost model, and the experiments worked out for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from bench.simulator.costs import PlanCosts
from bench.simulator.description import describe
from bench.simulator.experiments import EXPERIMENTS, Worked, work_out
from cluster.planning.hardware import hardware_of
from cluster.planning.planner import Load, Machine, census_of
from cluster.planning.roofline import Roofline
from engine.census import Census
from polytrace.description import ModelDescription


@dataclass(frozen=True)
class SimulatedDeployment:
    """What is served, on what. Worked out when first asked for."""

    model: str = "meta-llama/Llama-3.1-405B"  # that ships, or a folder
    stages: int = 8
    ranks: int = 2
    hardware: str = "h100"
    nodes: int = 2

    @property
    def machine(self) -> Machine:
        return Machine(hardware=hardware_of(self.hardware), gpus=self.stages * self.ranks, nodes=self.nodes)

    @cached_property
    def census(self) -> Census:
        return census_of(self.model)

    @cached_property
    def description(self) -> ModelDescription:
        trunk_bytes = Load().store_bytes // 2  # as `engine.shard`: the other half is a pass's own
        name = self.model.rpartition("/")[2]
        return describe(self.census, name=name, stages=self.stages, ranks=self.ranks, trunk_bytes=trunk_bytes)

    @cached_property
    def roofline(self) -> Roofline:
        machine = self.machine
        return Roofline(self.census, machine.hardware, machine.gpus_a_node, stages=self.stages, ranks=self.ranks)

    @cached_property
    def costs(self) -> PlanCosts:
        return PlanCosts(self.description, self.roofline)

    @cached_property
    def worked(self) -> dict[str, dict[int, Worked]]:
        """Every experiment, by its name and the length of the prompt."""
        return work_out(list(EXPERIMENTS), self.census, self.description)
