"""The simulator: the bound of fair shares holds in it and breaks without them, and its cost model is a roofline."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from families import model_of

from bench.simulator.books import Books
from bench.simulator.deployment import SimulatedDeployment
from bench.simulator.description import describe
from bench.simulator.experiments import EXPERIMENTS
from bench.simulator.figures import figures
from bench.simulator.policies import POLICIES
from bench.simulator.population import STANDING, Asked, asked, population
from bench.simulator.simulation import TEXT_TOKENS, Run, Simulation
from bench.simulator.stages import Clock, SimulatedStages
from cluster.planning.hardware import hardware_of
from cluster.planning.planner import census_of
from cluster.planning.roofline import Roofline
from engine.local import LocalBackend
from scheduling.plan import RequestId
from scheduling.policy import PassPolicy
from scheduling.scheduler import Scheduler

SHAPE = {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> SimulatedDeployment:
    """A small Llama's configuration, without weights, on 2 stages x 2 ranks."""
    folder = tmp_path_factory.mktemp("llama")
    config = {**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    config |= {"num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return SimulatedDeployment(model=str(folder), stages=2, ranks=2, nodes=1)


def test_sites_are_described_as_a_loaded_model_describes_them(tmp_path: Path) -> None:
    """But for gradients, which are not simulated."""
    model_of("llama").save_pretrained(tmp_path)
    backend = LocalBackend(str(tmp_path), threads=1)
    described = describe(census_of(str(tmp_path)), name="tiny", stages=1, ranks=1, trunk_bytes=1 << 30)
    real = backend.describe()
    backend.close()
    assert len(real.sites) > 50
    for ours, theirs in zip(described.sites, real.sites, strict=True):
        leaves = tuple(replace(leaf, gradient_refusal=None) for leaf in theirs.leaves)
        assert ours == replace(theirs, leaves=leaves)


def several(tenant: str, experiment: str, length: int, count: int, at: float = 0.0) -> list[Asked]:
    rng = Random(tenant)
    return [Asked(at, tenant, number, experiment, length, rng.randrange(TEXT_TOKENS), False) for number in range(count)]


def simulated(deployment: SimulatedDeployment, policy: str, requests: Sequence[Asked], budget: int = 2048) -> Run:
    tenants = sorted({one.tenant for one in requests})
    own = POLICIES[policy]
    own = replace(own, pass_policy=replace(own.pass_policy, budget_tokens=budget))
    return Simulation(deployment, own, tenants, requests).run()


def two_backlogged() -> list[Asked]:
    """One whose requests fill a pass each came a moment before one with many small ones."""
    return [*several("large", "activations", 512, 50), *several("small", "patch", 96, 600, at=1e-9)]


def test_two_backlogged_tenants_stay_within_two_of_the_largest_passes_and_without_shares_they_do_not(
    deployment: SimulatedDeployment,
) -> None:
    fair = simulated(deployment, "fair", two_backlogged()).books
    assert len(fair.times) > 50, "many passes were planned"
    assert fair.largest_gap <= 2 * fair.largest_pass
    unfair = simulated(deployment, "fcfs", two_backlogged()).books
    assert unfair.largest_gap > 10 * unfair.largest_pass


@pytest.fixture(scope="module")
def crowd(deployment: SimulatedDeployment) -> tuple[list[Asked], Run]:
    """All kinds of tenants and experiments, served fairly."""
    requests = crowd_of(seed=3)
    return requests, run_crowd(deployment, requests)


def crowd_of(seed: int) -> list[Asked]:
    return asked(population(240, 24, 1.0), 240, 1.0, seed, TEXT_TOKENS)


def run_crowd(deployment: SimulatedDeployment, requests: list[Asked], policy: str = "fair") -> Run:
    names = [tenant.name for tenant in population(240, 24, 1.0)]
    return Simulation(deployment, POLICIES[policy], names, requests, watched=STANDING).run()


def test_every_request_ends_exactly_once_and_after_it_has_come(crowd: tuple[list[Asked], Run]) -> None:
    requests, run = crowd
    assert {one.experiment for one in requests} == set(EXPERIMENTS)
    assert sorted(one.asked for one in run.ended) == requests
    assert all(one.error is None and one.asked.at <= one.started < one.ended for one in run.ended)
    assert sum(one.token_layers for one in run.ended) < sum(one.token_layers_alone for one in run.ended)


def test_a_run_is_the_same_again_and_another_seed_is_another_run(
    deployment: SimulatedDeployment, crowd: tuple[list[Asked], Run]
) -> None:
    requests, run = crowd
    again = run_crowd(deployment, crowd_of(seed=3))
    assert [(one.asked, one.started, one.ended) for one in again.ended] == [
        (one.asked, one.started, one.ended) for one in run.ended
    ]
    assert figures(again) == figures(run) and again.books.gaps == run.books.gaps
    assert crowd_of(seed=4) != requests


def test_all_that_is_served_is_charged(crowd: tuple[list[Asked], Run]) -> None:
    _, run = crowd
    moved = run.books.served.sum() - sum(one.token_layers for one in run.ended)
    assert 0 < moved < 0.2 * run.books.served.sum(), "beside token-layers there are bytes that moved"


def test_a_tenant_alone_has_all_there_is_and_a_stage_is_always_busy(deployment: SimulatedDeployment) -> None:
    requests = several("one", "ablation", 512, 64)
    fair, plain = simulated(deployment, "fair", requests), simulated(deployment, "fcfs", requests)
    assert fair.seconds == plain.seconds and fair.busy_s == plain.busy_s
    assert max(fair.busy_s) > 0.8 * fair.seconds
    slow = simulated(deployment, "one", requests)
    assert slow.seconds > 1.5 * fair.seconds, "one request at a time leaves a stage idle"
    assert slow.passes == len(requests)


def test_nobody_has_to_wait_while_there_is_room(deployment: SimulatedDeployment) -> None:
    """Beside a tenant that has more than its share, one with little work takes nothing away that it does not use."""
    much, little = several("much", "ablation", 512, 48), several("little", "patch", 96, 4)
    both = simulated(deployment, "fair", [*much, *little])
    apart = [simulated(deployment, "fair", own).seconds for own in (much, little)]
    assert both.seconds <= 1.05 * sum(apart)
    ends = {one.asked.tenant: one.ended for one in both.ended}
    assert ends["little"] < 0.25 * ends["much"]


def test_a_stage_of_405b_takes_what_the_roofline_says_by_hand() -> None:
    census, h100 = census_of("meta-llama/Llama-3.1-405B"), hardware_of("h100")
    roofline = Roofline(census, h100, 8, stages=8, ranks=2)
    hidden, wide, kv = 16384, 53248, 8 * 128
    weights = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * wide  # of a layer's matrices
    # 1) few rows: every weight is read once, half of them on each rank; norms are on both
    few = roofline.seconds(3, rows=[8] * 16, pairs=[0] * 16)
    assert few.work_s == pytest.approx(16 * 2 * (weights / 2 + 2 * hidden) / 3.35e12)
    # 2) many: arithmetic; a query and a key take 4 operations a head and feature
    rows, context = 4096, 600
    many = roofline.seconds(3, rows=[rows] * 16, pairs=[rows * context] * 16, sent_rows=rows)
    assert many.work_s == pytest.approx(16 * rows * (weights + 4 * context * 64 * 128) / 989e12)
    # 3) each rank gets the other's part of two sums a layer; the rows go to the next stage, here in another machine
    assert many.sum_s == pytest.approx(16 * rows * 2 * hidden * 2 / 450e9)
    assert many.send_s == pytest.approx(rows * hidden * 2 / 50e9)
    assert roofline.seconds(2, rows=[rows] * 16, pairs=[0] * 16, sent_rows=rows).send_s == pytest.approx(
        rows * hidden * 2 / 450e9
    )
    # 4) layers that nobody needs cost nothing; the head's vocabulary is split over the ranks
    half = roofline.seconds(3, rows=[8] * 8 + [0] * 8, pairs=[0] * 16)
    assert half.work_s == pytest.approx(few.work_s / 2)
    head = roofline.seconds(7, rows=[0] * 15, pairs=[0] * 15, head_rows=1)
    assert head.work_s == pytest.approx((128256 * hidden / 2 + hidden) * 2 / 3.35e12)
    # 5) keys of steps are read from the store: two float32 numbers for each of four heads and 128 features
    step = roofline.seconds(3, rows=[8] * 16, pairs=[0] * 16, keys=[1e6] * 16)
    assert step.work_s - few.work_s == pytest.approx(16 * 1e6 * 2 * 4 * 128 * 4 / 3.35e12)


def test_a_plan_costs_its_rows_and_passes_follow_one_another(deployment: SimulatedDeployment) -> None:
    clock = Clock()
    stages = SimulatedStages(deployment.costs, clock, depth=3)
    scheduler = Scheduler(deployment.description, PassPolicy(max_members=1), clock=clock)
    worked = deployment.worked["ablation"][128]
    for name in ("a", "b"):
        scheduler.add(worked.of(RequestId(name), Random(name).sample(range(4096), 129), name, is_interactive=True))
    first, second = scheduler.next_pass(), scheduler.next_pass()
    costs, share = deployment.costs.seconds(first), deployment.roofline.shares[0]
    pairs = [128 * 129 / 2] * len(share.layers)
    rows = [128] * len(share.layers)
    alone = deployment.roofline.seconds(0, rows=rows, pairs=pairs, keys=rows, sent_rows=128)
    assert costs[0] == pytest.approx(alone.all_s)
    assert deployment.costs.seconds(second) == costs
    stages.submit(first)
    stages.submit(second)
    assert stages.next_end == pytest.approx(sum(costs)), "it went through both stages"
    clock.now = sum(costs) + max(costs) * (1 - 1e-9)
    assert [plan for plan, _ in stages.finished()] == [first], "the second waits for the slower stage"
    clock.now = sum(costs) + max(costs) * (1 + 1e-9)
    assert [plan for plan, _ in stages.finished()] == [second]


def test_books_look_at_pairs_only_while_both_are_backlogged() -> None:
    stored: list[str] = []

    def in_store() -> Iterable[str]:
        return stored

    books = Books(["a", "b", "c"], lambda: 0.0, in_store=in_store)
    books.went({"a": 10.0}, ["a"])  # b does not wait yet
    books.went({"a": 10.0}, ["a", "b"])
    assert books.largest_gap == 10.0
    books.went({"b": 25.0}, ["a", "b"])
    assert books.largest_gap == 25.0, "from a's lead of 10 to b's of 15"
    books.went({"b": 100.0}, ["b"])  # a has no more: what b gets counts no more between them
    stored.append("c")
    books.went({"c": 1.0}, ["a"])
    assert books.largest_gap == 25.0 and books.largest_pass == 100.0
    books.went({"a": 50.0}, ["a"])
    assert books.largest_gap == 50.0, "c waits in the store"
