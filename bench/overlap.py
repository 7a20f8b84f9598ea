"""Four stages under load: how much of the time each has something to do, and what that makes of throughput.

    python -m bench.run overlap
    python -m bench.overlap docs/stage-timeline.png     what each stage did when, as a picture

A deployment of four stages on a Ray cluster of this machine, as `polytrace serve` has it. Two loads: clients who send
their next request when they have an answer, and one sweep. Contenders take turns in a shuffled order:
- `one pass`: one pass in flight, with all that waits;
- `greedy`: as many passes in flight as keep the stages at work, each with all that waits (the clients' only);
- `uniform`: the same, and what waits is cut into equal passes, a sweep into waves: what the product does;
- `parts`: passes cut the same way, one in flight: what the stages have to do when nobody takes their cores away.
The sum of the parts is the least time that the work of `parts` takes: that of the slowest stage, or of all stages on
the cores that there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import random
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from bench import pictures
from bench.cluster import own_cluster
from bench.cones.models import folder_of
from bench.pictures import Stretch
from bench.race import ratio
from cluster.deployment import Deployment, DeploymentConfig
from cluster.gang import RayShards
from engine.direct import DirectBackend
from engine.loading import meta_model
from engine.local import LocalBackend
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError
from polytrace.graph import Request
from polytrace.model import Model
from scheduling.loop import step
from scheduling.plan import Phase, Plan, Program, RequestId, ShardResult
from scheduling.policy import PassPolicy, most_wave_rows, passes_in_flight
from scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapConfig:
    """One run of the benchmark."""

    model: str = "8x512"
    stages: int = 4
    rounds: int = 3
    clients: int = 16
    requests: int = 48
    tokens: tuple[int, int] = (32, 96)  # of a prompt, at least and at most
    budget_tokens: int = 4096
    least_tokens: int = PassPolicy().least_tokens
    sweep_invokes: int = 60
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """How passes are made and how many are in flight."""

    policy: PassPolicy
    depth: int
    wave_rows: int  # that requests are worked out for


@dataclass(slots=True, kw_only=True)
class Served:
    """A load that has been served."""

    seconds: float = 0.0
    core_seconds: float = 0.0  # of all shards
    digests: dict[int, str] = field(default_factory=dict)  # of each program's result file
    results: list[tuple[Plan, tuple[ShardResult, ...]]] = field(default_factory=list)

    def busy_by_stage(self, stages: int) -> list[float]:
        """Seconds that a pass was with a stage and did not wait for another."""
        return [
            sum(result.busy_seconds for _, results in self.results for result in results if result.stage == stage)
            for stage in range(stages)
        ]


class Stages:
    """The deployment, and what is asked of it."""

    def __init__(self, config: OverlapConfig, source: str, folder: Path) -> None:
        self.config, self.source, self.folder = config, source, folder
        self.deployment = Deployment(
            DeploymentConfig(name="overlap", source=source, stages=config.stages, device="cpu", threads=1)
        )
        self.description: ModelDescription = self.deployment.start()
        self.awake = threading.Event()
        self.shards = self.deployment.shards(self.awake.set)
        self._pids = self.deployment.process_ids()
        self._meta = meta_model(source)

    def loads(self) -> dict[str, list[Request]]:
        """The clients' requests, and the sweep."""
        rng, model = random.Random(self.config.seed), Model(self._backend(self.description))
        clients = [_request(model, rng, self.config) for _ in range(self.config.requests)]
        return {"clients": clients, "sweep": [_sweep(model, rng, self.config)]}

    def work_out(self, contender: Contender, requests: list[Request]) -> list[Program]:
        """The requests, worked out for a contender's passes."""
        limits = dataclasses.replace(self.description.limits, pass_tokens=contender.wave_rows)
        backend = self._backend(dataclasses.replace(self.description, limits=limits))
        return [backend.work_out(request) for request in requests]

    def _backend(self, description: ModelDescription) -> DirectBackend:
        return DirectBackend(self.source, self.shards, description, self._meta)

    def serve(self, contender: Contender, programs: list[Program]) -> Served:
        """Runs programs, as many at a time as there are clients; results go to files."""
        served = Served()
        fresh = [self._with_file(program) for program in programs]
        numbers = {program.request: number for number, program in enumerate(fresh)}
        waiting = iter(fresh)
        scheduler = Scheduler(self.description, contender.policy)
        shards = _Watched(self.shards, contender.depth, served.results)
        cores, began = self._core_seconds(), time.perf_counter()
        for program in islice(waiting, self.config.clients):
            scheduler.add(program)
        missing = set(numbers)
        while missing:
            self.awake.clear()
            step(scheduler, shards)
            for outcome in scheduler.take_outcomes():
                if outcome.error is not None:
                    raise outcome.error
                missing.remove(outcome.request)
                following = next(waiting, None)
                if following is not None:
                    scheduler.add(following)
            if missing and not (scheduler.has_work() and shards.have_room()):
                assert self.awake.wait(600), "no pass has ended in ten minutes"
        served.seconds, served.core_seconds = time.perf_counter() - began, self._core_seconds() - cores
        served.digests = {numbers[program.request]: _digest(program) for program in fresh}
        return served

    def alone(self, requests: list[Request]) -> dict[int, str]:
        """Digests of what one process gives, each request by itself."""
        backend = LocalBackend(self.source, threads=1)
        digests = {}
        for number, request in enumerate(requests):
            fresh = self._with_file(backend.work_out(request))
            (outcome,) = backend.run_together([fresh])
            if outcome.error is not None:
                raise outcome.error
            digests[number] = _digest(fresh)
        backend.close()
        return digests

    def _with_file(self, program: Program) -> Program:
        path = self.folder / secrets.token_hex(8)
        with path.open("wb") as file:
            file.truncate(max(slot.offset + slot.facts.num_bytes for slot in program.saves))
        return dataclasses.replace(program, request=RequestId(path.name), result_file=str(path))

    def _core_seconds(self) -> float:
        """That the shards have had so far, of all cores (Linux)."""
        ticks = 0
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


class _Watched:
    """Shards with so many passes in flight, whose answers are kept."""

    def __init__(self, shards: RayShards, depth: int, results: list[tuple[Plan, tuple[ShardResult, ...]]]) -> None:
        self._shards, self._depth, self._results = shards, depth, results
        self._num_in_flight = 0

    def have_room(self) -> bool:
        return self._num_in_flight < self._depth and self._shards.have_room()

    def submit(self, plan: Plan) -> None:
        self._num_in_flight += 1
        self._shards.submit(plan)

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...]]]:
        for plan, results in self._shards.finished():
            self._num_in_flight -= 1
            if isinstance(results, PolytraceError):
                raise results
            self._results.append((plan, results))
            yield plan, results


@contextmanager
def running(config: OverlapConfig) -> Iterator[Stages]:
    """The deployment, on a Ray cluster of its own that ends with the block."""
    source = str(folder_of(config.model))
    with (
        tempfile.TemporaryDirectory(prefix="pt", dir="/tmp", ignore_cleanup_errors=True) as folder,
        own_cluster(config.stages, folder),
    ):
        stages = None
        try:
            stages = Stages(config, source, Path(folder))
            yield stages
        finally:
            if stages is not None:
                stages.deployment.stop()


def contenders(config: OverlapConfig) -> dict[str, Contender]:
    """By name."""
    most = config.budget_tokens
    cut = PassPolicy(budget_tokens=most, least_tokens=config.least_tokens)
    whole = PassPolicy(budget_tokens=most, least_tokens=most)  # nothing is cut
    depth, own = passes_in_flight(config.stages), most_wave_rows(cut, config.stages)
    return {
        "one pass": Contender(policy=whole, depth=1, wave_rows=most),
        "greedy": Contender(policy=whole, depth=depth, wave_rows=most),
        "uniform": Contender(policy=cut, depth=depth, wave_rows=own),
        "parts": Contender(policy=cut, depth=1, wave_rows=own),
    }


def run(config: OverlapConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    with running(config) as stages:
        loads, by_name, rng = stages.loads(), contenders(config), random.Random(config.seed)
        expected = {load: stages.alone(requests) for load, requests in loads.items()}
        turns = [(load, name) for load in loads for name in by_name if (load, name) != ("sweep", "greedy")]
        programs = {(load, name): stages.work_out(by_name[name], loads[load]) for load, name in turns}
        runs: dict[str, dict[str, list[Served]]] = {load: {} for load in loads}
        stages.serve(by_name["uniform"], programs["clients", "uniform"])  # not counted
        for _ in range(config.rounds):
            rng.shuffle(turns)
            for load, name in turns:
                runs[load].setdefault(name, []).append(stages.serve(by_name[name], programs[load, name]))
    figures = {load: _figures(config, served, loads[load], expected[load]) for load, served in runs.items()}
    return {**figures, "cores": _cores()}


def _figures(
    config: OverlapConfig, runs: Mapping[str, list[Served]], requests: list[Request], expected: Mapping[int, str]
) -> dict[str, Any]:
    seconds = {name: [served.seconds for served in each] for name, each in runs.items()}
    tokens = sum(len(sequence) for one in requests for invoke in one.invokes for sequence in invoke.sequences)
    parts = [served.busy_by_stage(config.stages) for served in runs["parts"]]
    least = [max(max(busy), sum(busy) / _cores()) for busy in parts]
    figures: dict[str, Any] = {
        "requests": len(requests),
        "tokens": tokens,
        "one pass / uniform": asdict(ratio(seconds["one pass"], seconds["uniform"])),
        "sum of the parts / uniform": asdict(ratio(least, seconds["uniform"])),
        "bound by": "the slowest stage" if max(map(max, parts)) > min(map(sum, parts)) / _cores() else "the cores",
        "tokens_per_s": {name: tokens / statistics.median(each) for name, each in seconds.items()},
        "passes": {name: len(each[-1].results) for name, each in runs.items()},
        "idle_by_stage": {name: _idle(config, each) for name, each in runs.items()},
        "cores_used": {
            name: statistics.median(served.core_seconds / served.seconds for served in each)
            for name, each in runs.items()
        },
        "same_bits_as_one_process_alone": all(served.digests == expected for each in runs.values() for served in each),
    }
    if "greedy" in runs:
        figures["greedy / uniform"] = asdict(ratio(seconds["greedy"], seconds["uniform"]))
    return figures


def _idle(config: OverlapConfig, runs: list[Served]) -> list[float]:
    """By stage: the median share of the time in which it had nothing to do."""
    by_run = [[1 - busy / served.seconds for busy in served.busy_by_stage(config.stages)] for served in runs]
    return [round(statistics.median(each), 3) for each in zip(*by_run, strict=True)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every run gave the bits of one process."""
    return all(figures[load]["same_bits_as_one_process_alone"] for load in ("clients", "sweep"))


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = []
    for load in ("clients", "sweep"):
        own = figures[load]

        def shown(name: str, own: Mapping[str, Any] = own) -> str:
            return "{median:.2f}x ({low:.2f} to {high:.2f})".format(**own[name])

        lines.append(f"{load}: {own['requests']} requests, {own['tokens']} tokens, {figures['cores']} cores")
        lines.append(f"  one pass in flight against uniform ones: {shown('one pass / uniform')}")
        if "greedy / uniform" in own:
            lines.append(f"  greedy ones in flight against uniform:   {shown('greedy / uniform')}")
        lines.append(
            f"  sum of the parts against uniform:        {shown('sum of the parts / uniform')}, {own['bound by']}"
        )
        for name, rate in own["tokens_per_s"].items():
            idle = ", ".join(f"{share:.0%}" for share in own["idle_by_stage"][name])
            lines.append(
                f"  {name:9} {rate:8,.0f} tokens/s in {own['passes'][name]:3} passes on {own['cores_used'][name]:.1f} "
                f"cores; stages idle {idle}"
            )
        lines.append(f"  the bits of one process alone: {own['same_bits_as_one_process_alone']}")
    return "\n".join(lines)


def config_for(folder: Path, *, quick: bool) -> OverlapConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    if quick:
        return OverlapConfig(
            model=str(folder),
            rounds=1,
            clients=8,
            requests=12,
            tokens=(8, 24),
            budget_tokens=512,
            least_tokens=32,
            sweep_invokes=20,
        )
    return OverlapConfig()


def stretches(served: Served, *, start_s: float, stop_s: float) -> list[Stretch]:
    """What each stage did from one second of a run to another."""
    began = min(result.began for _, results in served.results for result in results)
    found = []
    for number, (_, results) in enumerate(served.results):
        for result in results:
            at = result.began - began
            for phase, seconds in result.phases:
                if at + seconds > start_s and at < stop_s and seconds > 0:
                    clipped = max(at, start_s) - start_s, min(at + seconds, stop_s) - start_s
                    found.append(Stretch(stage=result.stage, phase=phase.value, at=clipped, number=number))
                at += seconds
    return found


def draw(path: Path, config: OverlapConfig, told: Callable[[str], None] = print) -> None:
    """The picture: the clients' load, in one pass at a time and as the product does it."""
    with running(config) as stages:
        by_name = contenders(config)
        clients = stages.work_out(by_name["uniform"], stages.loads()["clients"])
        stages.serve(by_name["uniform"], clients)  # not drawn
        served = {name: stages.serve(by_name[name], clients) for name in ("one pass", "greedy", "uniform")}
    longest = served["one pass"].seconds
    panels = []
    for name, title in (
        ("greedy", f"{passes_in_flight(config.stages)} passes may be in flight, each with all that waits"),
        ("uniform", "what waits is cut into equal passes"),
    ):
        one = served[name]
        idle = statistics.mean(1 - busy / one.seconds for busy in one.busy_by_stage(config.stages))
        told(f"{name}: {one.seconds:.2f} s, stages idle for {idle:.0%}")
        panels.append(
            (f"{title}: {one.seconds:.1f} s, stages idle for {idle:.0%}", stretches(one, start_s=0, stop_s=longest))
        )
    pictures.draw_timeline(
        path,
        panels=panels,
        phases=[phase.value for phase in (Phase.COMPUTING, Phase.WAITING, Phase.SENDING, Phase.SAVING)],
        title=f"{config.requests} requests of {config.clients} clients on {config.stages} stages, {_cores()} cores",
    )


def _request(model: Any, rng: random.Random, config: OverlapConfig) -> Any:
    """Changes a layer, and saves a later one and the last logits."""
    tokens = [rng.randrange(3, model.config["vocab_size"]) for _ in range(rng.randint(*config.tokens))]
    layers = model.model.layers
    middle = len(layers) // 2
    with model.trace([tokens], run=False) as tracer:
        layers[1].output[0][:, -1] *= 1.5
        layers[middle].output[0].save()
        model.lm_head.output[:, -1].save()
    return tracer.built_request()


def _sweep(model: Any, rng: random.Random, config: OverlapConfig) -> Any:
    """Prompts that have nothing in common, each changed at its first layer."""
    low, high = config.tokens
    with model.trace(run=False) as tracer:
        for _ in range(config.sweep_invokes):
            tokens = [rng.randrange(3, model.config["vocab_size"]) for _ in range((low + high) // 2)]
            with tracer.invoke([tokens]):
                model.model.layers[0].output[0][:, -1] *= 1.5
                model.lm_head.output[:, -1].save()
    return tracer.built_request()


def _digest(program: Program) -> str:
    """Of a result file, which is not needed any more."""
    path = Path(str(program.result_file))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    return digest


def main() -> None:
    """The picture."""
    parser = argparse.ArgumentParser(prog="python -m bench.overlap", description="what each stage did when")
    parser.add_argument("path", type=Path, help="of the PNG file")
    draw(parser.parse_args().path, OverlapConfig())


if __name__ == "__main__":
    main()
