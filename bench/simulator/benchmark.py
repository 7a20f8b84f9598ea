"""The product against first come, first served and one request at a time, on a large deployment that is not there.

    python -m bench.run simulate

What is modelled and what is not stands in `bench.simulator`: seconds are a cost model's.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import record
from bench.simulator.deployment import SimulatedDeployment
from bench.simulator.figures import figures
from bench.simulator.pictures import draw
from bench.simulator.policies import POLICIES
from bench.simulator.population import STANDING, asked, population
from bench.simulator.simulation import TEXT_TOKENS, Run, Simulation, Tell

BOUND = 2.0  # of the gap between two backlogged tenants of equal weight, in largest passes
PICTURE = record.ROOT / "out" / "simulation.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """One run of the benchmark."""

    requests: int = 100_000
    tenants: int = 1000
    seconds: float = 7200.0  # in which people and labs ask
    policies: tuple[str, ...] = tuple(POLICIES)
    seed: int = 0
    model: str = "meta-llama/Llama-3.1-405B"
    stages: int = 8
    ranks: int = 2
    hardware: str = "h100"
    nodes: int = 2


def run(config: SimulationConfig) -> dict[str, Any]:
    """The figures of all policies, each with the same requests; draws the picture."""
    runs = run_all(config, tell=_to_stderr)
    draw(PICTURE, title=_title(config), runs=runs)
    return {"seed": config.seed, "policies": {name: figures(one) for name, one in runs.items()}} | {
        "planner_ms_a_pass": {name: 1e3 * one.planner_s / one.passes for name, one in runs.items()},
    }


def run_all(config: SimulationConfig, *, tell: Tell | None = None) -> dict[str, Run]:
    """The runs by policy."""
    deployment = SimulatedDeployment(
        model=config.model,
        stages=config.stages,
        ranks=config.ranks,
        hardware=config.hardware,
        nodes=config.nodes,
    )
    tenants = population(config.requests, config.tenants, config.seconds)
    requests = asked(tenants, config.requests, config.seconds, config.seed, TEXT_TOKENS)
    names = [tenant.name for tenant in tenants]
    _ = deployment.worked
    found = {}
    for name in config.policies:
        told = None if tell is None else _named(tell, name)
        simulation = Simulation(
            deployment, POLICIES[name], names, requests, watched=STANDING, seed=config.seed, tell=told
        )
        found[name] = _quietly(simulation)
    return found


def _quietly(simulation: Simulation) -> Run:
    """Without the collector looking at all that is kept again and again: nothing here is a cycle."""
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        return simulation.run()
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


def is_right(found: Mapping[str, Any]) -> bool:
    """Whether every request was served, and the bound held."""
    policies = found["policies"]
    all_done = all(own["done"] == own["requests"] for own in policies.values())
    return all_done and ("fair" not in policies or policies["fair"]["gap / largest_pass"] <= BOUND)


def tell(found: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = ["seconds, rates and occupancy are those of a cost model (a roofline), not measured"]
    for name, own in found["policies"].items():
        stages = own["occupancy_by_stage"]
        lines.append(
            f"{name}: {own['done']:,} requests in {own['seconds'] / 3600:.2f} h, {own['requests_per_s']:.1f}/s; "
            f"stages busy {sum(stages) / len(stages):.0%} ({min(stages):.0%} to {max(stages):.0%}); "
            f"{own['passes']:,} passes of {own['requests_per_pass']:.1f} requests, "
            f"{own['tenants_per_pass']:.1f} tenants, {own['rows_per_pass']:,.0f} rows"
        )
        lines.append(
            f"  gap of two backlogged tenants: {own['gap / largest_pass']:.2f} of the largest pass "
            f"({own['largest_pass']:,.0f} token-layers), at most {own['most_backlogged']} backlogged"
        )
        for tenant, share in own["received / due"].items():
            lines.append(
                f"  {tenant:10} received {share['median']:.2f} of its due ({share['least']:.2f} to {share['most']:.2f})"
            )
        for kind, waits in own["latency_ms"].items():
            told = ", ".join(f"{key} {value / 1e3:,.1f}" for key, value in waits.items() if key != "p90")
            lines.append(f"  {kind:10} s: {told}")
        planner_ms = found["planner_ms_a_pass"][name]
        lines.append(f"  the planner took {planner_ms:.1f} ms of one core a pass here (measured)")
    return "\n".join(lines)


def config_for(folder: Path, *, quick: bool) -> SimulationConfig:
    """The configuration that `make bench` runs, or a short one to see that it works. `folder` is not needed."""
    return SimulationConfig(requests=2_000, tenants=100, seconds=144.0) if quick else SimulationConfig()


def _title(config: SimulationConfig) -> str:
    name = config.model.rpartition("/")[2]
    return (
        f"{config.requests:,} requests of {config.tenants:,} tenants, {name} on {config.stages * config.ranks} "
        f"{config.hardware} ({config.stages} stages x {config.ranks} ranks): a cost model, not measured"
    )


def _named(tell: Tell, name: str) -> Tell:
    began = time.monotonic()
    return lambda line: tell(f"{name}: {line} simulated, {time.monotonic() - began:.0f} s")


def _to_stderr(line: str) -> None:
    print(f"\r  {line:<78}", end="", file=sys.stderr, flush=True)
