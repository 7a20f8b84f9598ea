"""Hours of a large deployment in minutes: `python -m bench.simulator --policy fair`.

Prints the figures, draws `out/simulation.png`, and with --record appends a line to `bench/results/simulate.jsonl`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from bench import record
from bench.simulator.benchmark import PICTURE, SimulationConfig, is_right, run, tell
from bench.simulator.policies import POLICIES


def main() -> None:
    """The command line."""
    usual = SimulationConfig()
    parser = argparse.ArgumentParser(description="the real scheduler against a cost model of a deployment")
    parser.add_argument("--requests", type=int, default=usual.requests)
    parser.add_argument("--tenants", type=int, default=usual.tenants)
    parser.add_argument("--seconds", type=float, help="in which people ask; default: in proportion to the requests")
    parser.add_argument("--policy", choices=[*POLICIES, "all"], default="all")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--model", default=usual.model, help="one that ships, or a folder with a configuration")
    parser.add_argument("--stages", type=int, default=usual.stages)
    parser.add_argument("--ranks", type=int, default=usual.ranks)
    parser.add_argument("--hardware", default=usual.hardware)
    parser.add_argument("--nodes", type=int, default=usual.nodes)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    seconds = arguments.seconds or usual.seconds * arguments.requests / usual.requests
    config = SimulationConfig(
        requests=arguments.requests,
        tenants=arguments.tenants,
        seconds=seconds,
        policies=tuple(POLICIES) if arguments.policy == "all" else (arguments.policy,),
        seed=arguments.seed,
        model=arguments.model,
        stages=arguments.stages,
        ranks=arguments.ranks,
        hardware=arguments.hardware,
        nodes=arguments.nodes,
    )
    found = run(config)
    print()
    print(tell(found))
    print(PICTURE)
    if not is_right(found):
        sys.exit("requests are missing, or backlogged tenants were further apart than the bound allows")
    if arguments.record:
        record.append("simulate", config=asdict(config), figures=found)


if __name__ == "__main__":
    main()
