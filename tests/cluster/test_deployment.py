"""A deployment on a real Ray cluster of this machine: starts, runs merged passes, loses shards and gets them back."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util import placement_group_table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from cluster.deployment import Deployment, DeploymentConfig, plan_placement
from cluster.gang import RayShards
from engine.direct import DirectBackend
from engine.loading import meta_model
from polytrace.certificate import Token
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError, ServiceError
from polytrace.graph import (
    Generation,
    Graph,
    Invoke,
    Node,
    NodeId,
    Op,
    Port,
    Read,
    Ref,
    Request,
    Sampling,
    Save,
    Site,
    Write,
)
from polytrace.model import Model
from scheduling.loop import step
from scheduling.plan import Program
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Progress, Scheduler

LAYER, LATER = "model.layers.1", "model.layers.3"
NEW_TOKENS = 8


@dataclass(kw_only=True)
class Running:
    """A deployment that has started, and what it said on the way."""

    source: str
    deployment: Deployment
    description: ModelDescription
    lines: list[str]
    awake: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.shards = self.deployment.shards(self.awake.set)

    def programs(self, prompts: list[tuple[int, ...]], scale: float) -> list[Program]:
        compiler = DirectBackend(self.source, self.shards, self.description, meta_model(self.source))
        return [compiler.work_out(request(prompt, scale)) for prompt in prompts]

    def run(self, programs: list[Program], *, budget_tokens: int) -> tuple[list[Outcome], int]:
        """Outcomes in the programs' order, and the most passes that were in flight at once."""
        scheduler = Scheduler(self.description, PassPolicy(budget_tokens=budget_tokens))
        counting = CountingShards(self.shards)
        for program in programs:
            scheduler.add(program)
        outcomes: dict[str, Outcome] = {}
        while len(outcomes) < len(programs):
            self.awake.clear()
            step(scheduler, counting)
            outcomes.update((outcome.request, outcome) for outcome in scheduler.take_outcomes())
            if len(outcomes) < len(programs) and not (scheduler.has_work() and counting.have_room()):
                assert self.awake.wait(60)
        return [outcomes[program.request] for program in programs], counting.most_in_flight


class CountingShards:
    """Shards that count."""

    def __init__(self, shards: RayShards) -> None:
        self._shards = shards
        self._in_flight = self.most_in_flight = 0
        self.have_room = shards.have_room

    def submit(self, plan):  # type: ignore[no-untyped-def]
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        self._shards.submit(plan)

    def finished(self):  # type: ignore[no-untyped-def]
        for each in self._shards.finished():
            self._in_flight -= 1
            yield each


def request(prompt: tuple[int, ...], scale: float) -> Request:
    """Scales one layer's output; saves a later layer's and the logits."""
    nodes = (
        Read(site=Site(module=LAYER, port=Port.OUTPUT), invoke=0, where="t:1"),
        Op(name="mul", args=(Ref(NodeId(0)), scale), where="t:1"),
        Write(site=Site(module=LAYER, port=Port.OUTPUT), invoke=0, value=Ref(NodeId(1)), in_place=False, where="t:1"),
        Read(site=Site(module=LATER, port=Port.OUTPUT), invoke=0, where="t:2"),
        Save(name="later", value=Ref(NodeId(3)), where="t:2"),
        Read(site=Site(module="lm_head", port=Port.OUTPUT), invoke=0, where="t:3"),
        Save(name="logits", value=Ref(NodeId(5)), where="t:3"),
    )
    return Request(graph=Graph(nodes=nodes), invokes=(Invoke(sequences=(prompt,)),), constants={})


def by_hand(source: str, prompt: tuple[int, ...], scale: float) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(source)
    seen: dict[str, Tensor] = {}
    model.get_submodule(LAYER).register_forward_hook(lambda _m, _a, output: output * scale)
    model.get_submodule(LATER).register_forward_hook(lambda _m, _a, output: seen.update(later=output))
    with torch.no_grad():
        seen["logits"] = model(torch.tensor([prompt]), use_cache=False).logits
    return seen


def group_states() -> set[str]:
    return {group["state"] for group in placement_group_table().values()}


def comes_true(condition: Callable[[], bool], timeout_s: float = 60) -> bool:
    until = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.1)
    return condition()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="pt", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")  # a cluster of this machine's loopback, gone after the tests
        ray.init(num_cpus=4, include_dashboard=False, _temp_dir=folder, object_store_memory=128 << 20)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def running(cluster: None, source: str) -> Iterator[Running]:
    lines: list[str] = []
    deployment = Deployment(
        DeploymentConfig(name="tiny", source=source, stages=2, ranks=2, device="cpu", hang_timeout_s=20)
    )
    description = deployment.start(lines.append)
    yield Running(source=source, deployment=deployment, description=description, lines=lines)
    deployment.stop()


def test_a_deployment_says_how_far_it_is_and_what_it_serves(running: Running) -> None:
    assert (running.description.stages, running.description.ranks) == (2, 2)
    assert {info.stage for info in running.description.sites} == {0, 1}
    assert any("4 of 4 shard processes are up" in line for line in running.lines)
    for place in ("stage 0 rank 0", "stage 0 rank 1", "stage 1 rank 0", "stage 1 rank 1"):
        assert any(line.startswith(f"{place}: loaded") for line in running.lines)
    assert len({os.getpid(), *running.deployment.process_ids()}) == 5


def test_merged_requests_over_two_stages_and_two_ranks_equal_plain_hugging_face(running: Running) -> None:
    prompts = [tuple(range(3 + i, 12 + 2 * i)) for i in range(5)]
    outcomes, _ = running.run(running.programs(prompts, 3.0), budget_tokens=4096)
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        expected, unedited = by_hand(running.source, prompt, 3.0), by_hand(running.source, prompt, 1.0)
        for name, value in expected.items():
            assert (outcome.values[name] - value).abs().max() <= 1e-5 * max(1, value.abs().max())
            assert (unedited[name] - value).abs().max() > 1e-3


def test_passes_are_in_flight_over_two_stages_with_the_bits_of_one(running: Running) -> None:
    prompts = [tuple(range(2 + i, 22 + i)) for i in range(8)]
    together, _ = running.run(running.programs(prompts, 0.5), budget_tokens=4096)
    apart, most_in_flight = running.run(running.programs(prompts, 0.5), budget_tokens=20)
    assert most_in_flight == 3, "one a stage, and one that waits"
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.values["logits"], other.values["logits"])


def test_a_model_that_cannot_be_split_so_is_refused_before_anything_starts(cluster: None, source: str) -> None:
    for stages, ranks, message in ((5, 1, "use 1 to 4"), (1, 3, "use ranks 1, 2, 4")):
        with pytest.raises(ServiceError, match=message):
            Deployment(DeploymentConfig(name="no", source=source, stages=stages, ranks=ranks)).start()
    too_large = Deployment(DeploymentConfig(name="no", source=source, device="cpu", placement_timeout_s=0.4, cpus=99))
    with pytest.raises(ServiceError, match="no room within 0 s; it waits for room for 1 of 1 shards of CPU 99 each"):
        too_large.start()
    assert comes_true(lambda: group_states() <= {"CREATED", "REMOVED"})


def bytes_read(pid: int) -> int:
    """What a process has read so far, from wherever."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"])


def kill_during(running: Running, pid: int, *, with_signal: signal.Signals = signal.SIGKILL) -> list[Outcome]:
    """Requests over two passes in flight, while a shard is killed."""
    programs = running.programs([tuple(range(2, 40))] * 2, 1.0)
    os.kill(pid, with_signal)
    outcomes, _ = running.run(programs, budget_tokens=38)
    return outcomes


def test_a_killed_shard_fails_its_passes_by_name_and_comes_back_while_the_others_keep_their_weights(
    running: Running,
) -> None:
    (before,), _ = running.run(running.programs([tuple(range(2, 40))], 1.0), budget_tokens=4096)
    weights = sum(p.nbytes for p in meta_model(running.source).parameters()) // 4  # about what a shard has
    for killed in (3, 0):  # the first shard holds the meeting point
        pids = running.deployment.process_ids()
        read = {pid: bytes_read(pid) for pid in pids}
        for outcome in kill_during(running, pids[killed]):
            assert isinstance(outcome.error, PolytraceError)
            assert f"stage {killed // 2} rank {killed % 2} died" in str(outcome.error)
        assert not running.shards.have_room()
        with pytest.raises(ServiceError, match="died"):
            list(running.shards.finished())
        lines: list[str] = []
        running.deployment.recover(lines.append)
        # On a crowded machine a survivor may be late to leave its old world: then it is named, and started again too.
        late = [line for line in lines if "did not leave within" in line]
        gone = [
            place
            for place, name in enumerate(f"stage {place // 2} rank {place % 2}" for place in range(4))
            if place == killed or any(name in line for line in late)
        ]
        loaded = {line.partition(":")[0] for line in lines if ": loaded" in line}
        assert loaded == {f"stage {place // 2} rank {place % 2}" for place in gone}, lines
        again = running.deployment.process_ids()
        assert [pid for pid in again if pid in pids] == [pid for place, pid in enumerate(pids) if place not in gone]
        for pid in again:
            if pid in read:
                assert bytes_read(pid) - read[pid] < weights / 2, "a survivor read its file again"
        (after,), _ = running.run(running.programs([tuple(range(2, 40))], 1.0), budget_tokens=4096)
        for name, value in before.values.items():
            assert torch.equal(after.values[name], value)


def test_a_shard_that_hangs_is_ended_and_comes_back_though_nobody_runs_a_pass(running: Running) -> None:
    pids = running.deployment.process_ids()
    running.awake.clear()
    os.kill(pids[2], signal.SIGSTOP)
    assert running.awake.wait(90)
    with pytest.raises(ServiceError, match="stage 1 rank 0 did not answer for 20 s and was ended"):
        list(running.shards.finished())
    running.deployment.recover()
    assert pids[2] not in running.deployment.process_ids()
    outcomes, _ = running.run(running.programs([(1, 2, 3)], 1.0), budget_tokens=4096)
    assert outcomes[0].error is None


def test_a_shard_that_dies_while_it_loads_is_started_again(cluster: None, source: str) -> None:
    deployment = Deployment(DeploymentConfig(name="twice", source=source, stages=2, device="cpu"))
    lines: list[str] = []
    killed: list[int] = []

    def report(line: str) -> None:
        lines.append(line)
        if "opening" in line and len(killed) < 2:
            killed.append(shard_processes()[-1])
            os.kill(killed[-1], signal.SIGKILL)

    def shard_processes() -> list[int]:
        return sorted(set(shard_pids(deployment.config.name)))

    try:
        deployment.start(report)
        assert len(killed) == 2 and not set(killed) & set(deployment.process_ids())
        assert sum("starting again what was lost" in line for line in lines) >= 1
    finally:
        deployment.stop()


def shard_pids(deployment: str) -> list[int]:
    """Processes of a deployment's shards. Other tests have shards on this machine too: the environment tells whose."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name = (folder / "cmdline").read_bytes()
                environment = (folder / "environ").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::ShardActor") and f"POLYTRACE_SHARD={deployment} ".encode() in environment:
                found.append(int(folder.name))
    return found


def test_a_pass_that_one_shard_has_no_memory_for_is_cut_and_no_process_is_lost(cluster: None, tmp_path: Path) -> None:
    wide = LlamaConfig(  # a row takes 3 MiB in each layer
        vocab_size=64,
        hidden_size=16,
        intermediate_size=1 << 18,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    wide.architectures = ["LlamaForCausalLM"]
    wide.save_pretrained(tmp_path)
    config = DeploymentConfig(
        name="wide", source=str(tmp_path), stages=2, device="cpu", dtype="float32", random_weights_seed=1
    )
    deployment = Deployment(config)
    try:
        running = Running(source=str(tmp_path), deployment=deployment, description=deployment.start(), lines=[])
        site = Site(module="model.layers.1", port=Port.OUTPUT)
        asked = [
            Request(
                graph=Graph(
                    nodes=(Read(site=site, invoke=0, where="t:1"), Save(name="out", value=Ref(NodeId(0)), where="t:1"))
                ),
                invokes=(Invoke(sequences=(tuple(range(first, first + 40)),)),),
                constants={},
            )
            for first in range(16)
        ]
        compiler = DirectBackend(str(tmp_path), running.shards, running.description, meta_model(str(tmp_path)))
        alone = [running.run([compiler.work_out(one)], budget_tokens=4096)[0][0] for one in asked]
        pids = deployment.process_ids()
        limit_memory(pids[1], more_bytes=5 << 28)  # the self-test takes half of it
        scheduler = Scheduler(running.description, PassPolicy(budget_tokens=4096, least_tokens=4096))
        programs = [compiler.work_out(one) for one in asked]
        for program in programs:
            scheduler.add(program)
        outcomes, losses = run_with_recoveries(running, scheduler, len(programs))
        assert 1 <= len(losses) <= 3, losses
        assert all("stage 1 rank 0: out of memory" in loss and "bytes more were asked for" in loss for loss in losses)
        assert deployment.process_ids() == pids
        for program, expected in zip(programs, alone, strict=True):
            assert torch.equal(outcomes[program.request].values["out"], expected.values["out"])
    finally:
        deployment.stop()


def limit_memory(pid: int, *, more_bytes: int) -> None:
    """Lets a process have only so much more than it has."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    most = int(status["VmSize"].split()[0]) * 1024 + more_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def generation(number: int) -> Request:
    """Sampled; at every step what the first stage has is added on the second one a step later, and the other way."""
    early, late = (Site(module=module, port=Port.OUTPUT) for module in (LAYER, LATER))
    nodes: list[Node] = []

    def put(node: Node) -> Ref:
        nodes.append(node)
        return Ref(NodeId(len(nodes) - 1))

    before: list[Ref] = []
    for at in range(NEW_TOKENS):
        seen = [put(Read(site=site, invoke=0, where="g:1", step=at)) for site in (early, late)]
        last = [put(Op(name="getitem", args=(value, (slice(None), slice(-1, None))), where="g:2")) for value in seen]
        for site, value, other in zip((late, early), reversed(seen), before, strict=False):
            changed = put(Op(name="add", args=(value, other), where="g:3"))
            put(Write(site=site, invoke=0, value=changed, in_place=True, where="g:3", step=at))
        put(Save(name=f"late{at}", value=last[1], where="g:4"))
        before = last
    sampling = Sampling(do_sample=True, seed=number)
    invoke = Invoke(
        sequences=(tuple(range(2 + number, 40)), (5, 6)),
        generation=Generation(max_new_tokens=NEW_TOKENS, sampling=sampling),
    )
    return Request(graph=Graph(nodes=tuple(nodes)), invokes=(invoke,), constants={})


def test_generations_go_on_behind_the_loss_of_a_shard_and_no_token_is_told_twice(running: Running) -> None:
    compiler = DirectBackend(running.source, running.shards, running.description, meta_model(running.source))
    undisturbed, _ = running.run([compiler.work_out(generation(number)) for number in range(6)], budget_tokens=4096)
    programs = [compiler.work_out(generation(number)) for number in range(6)]
    scheduler = Scheduler(running.description, PassPolicy(budget_tokens=4096))
    for program in programs:
        scheduler.add(program)
    told: dict[str, list[Token]] = {program.request: [] for program in programs}
    pids = running.deployment.process_ids()

    def hear(news: Progress | Outcome) -> None:
        told[news.request] += news.tokens
        if len(pids) == 4 and sum(map(len, told.values())) >= 40:
            os.kill(pids.pop(2), signal.SIGKILL)

    outcomes, losses = run_with_recoveries(running, scheduler, len(programs), hear)
    assert len(losses) == 1 and "stage 1 rank 0 died" in losses[0]
    shared = [[entry.requests for entry in one.receipt.passes] for one in outcomes.values() if one.receipt is not None]
    assert any(counts[0] == 1 and max(counts) > 1 for counts in shared)  # alone until they were behind where it died
    for program, before in zip(programs, undisturbed, strict=True):
        after, own = outcomes[program.request], told[program.request]
        assert after.error is None and after.receipt is not None and before.receipt is not None
        assert after.receipt.generated == before.receipt.generated
        assert all(torch.equal(after.values[name], value) for name, value in before.values.items())
        assert len(before.values) == NEW_TOKENS
        for one in after.receipt.generated:
            assert [(token.step, token.id) for token in own if token.sequence == one.sequence] == [*enumerate(one.ids)]
    running.run([compiler.work_out(request((1, 2, 3), 1.0))], budget_tokens=4096)  # of plans that name what is there


def gradients(model: Model, seed: int) -> Request:
    """Four backwards of one forward, each with its own loss: five passes."""
    lm: Any = model
    with lm.trace([[3 + seed, 1, 4, 1, 5], [9 + seed, 2]], run=False) as tracer:
        early = lm.model.layers[0].output
        late = lm.model.layers[2].mlp.output
        logits = lm.lm_head.output[:, -1]
        for number in range(4):
            with (logits[:, number : number + 9] * (seed + 1.0)).tanh().sum().backward():
                early.grad.save()
                late.grad.save()
    return tracer.built_request()


def test_gradients_on_their_way_back_begin_again_behind_the_loss_of_a_shard(running: Running) -> None:
    backend = DirectBackend(running.source, running.shards, running.description, meta_model(running.source))
    model = Model(backend)
    undisturbed, _ = running.run([backend.work_out(gradients(model, seed)) for seed in range(3)], budget_tokens=4096)
    programs = [backend.work_out(gradients(model, seed)) for seed in range(3)]
    scheduler = Scheduler(running.description, PassPolicy(budget_tokens=4096))
    for program in programs:
        scheduler.add(program)
    pids, done = running.deployment.process_ids(), []

    def hear(news: Progress | Outcome) -> None:
        if isinstance(news, Progress):
            done.append(news.passes_done)
            if len(pids) == 4 and news.passes_done >= 2:  # some have come back, others are to come
                os.kill(pids.pop(1), signal.SIGKILL)

    outcomes, losses = run_with_recoveries(running, scheduler, len(programs), hear)
    assert len(losses) == 1 and "stage 0 rank 1 died" in losses[0], losses
    assert 1 in done[done.index(2) :], "they began again"
    for program, before in zip(programs, undisturbed, strict=True):
        after = outcomes[program.request]
        assert after.error is None and after.receipt is not None and len(after.receipt.passes) == 5
        assert len(before.values) == 8 and any(value.any() for value in before.values.values())
        assert all(torch.equal(after.values[name], value) for name, value in before.values.items())
    assert scheduler._room.tapes.taken_bytes == 0


def hear_nothing(news: Progress | Outcome) -> None:
    pass


def run_with_recoveries(
    running: Running, scheduler: Scheduler, num: int, hear: Callable[[Progress | Outcome], None] = hear_nothing
) -> tuple[dict[str, Outcome], list[str]]:
    """As the dispatcher does: what is lost runs again when the deployment is whole. Outcomes, and what was lost."""
    outcomes: dict[str, Outcome] = {}
    losses: list[str] = []
    while len(outcomes) < num:
        running.awake.clear()
        while scheduler.has_work() and running.shards.have_room():
            running.shards.submit(scheduler.next_pass())
        try:
            for plan, results in running.shards.finished():
                if isinstance(results, PolytraceError):
                    scheduler.again(plan, results)
                else:
                    scheduler.complete(plan, results)
        except PolytraceError as loss:
            losses.append(loss.message)
            running.deployment.recover()
            continue
        for news in (*scheduler.take_progress(), *scheduler.take_outcomes()):
            hear(news)
            if isinstance(news, Outcome):
                outcomes[news.request] = news
        if len(outcomes) < num and not (scheduler.has_work() and running.shards.have_room()):
            assert running.awake.wait(60)
    return outcomes, losses


def test_a_stopped_deployment_leaves_nothing(running: Running) -> None:
    pids = running.deployment.process_ids()
    running.deployment.stop()
    assert comes_true(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert comes_true(lambda: group_states() == {"REMOVED"})


@pytest.mark.parametrize(
    ("cpus", "gpus", "device", "expected"),
    [
        (2, 0, "auto", ("cpu", "gloo", 0, 0.25, 1)),
        (64, 0, "auto", ("cpu", "gloo", 0, 1.0, 15)),
        (16, 8, "auto", ("cuda", "nccl", 1, 1.0, 3)),
        (16, 1, "auto", ("cuda", "gloo", 0.25, 1.0, 3)),
        (16, 3, "auto", ("cuda", "gloo", 0.5, 1.0, 3)),
        (16, 8, "cpu", ("cpu", "gloo", 0, 1.0, 3)),
    ],
)
def test_shards_get_gpus_when_there_are_any_and_little_of_the_cpus(
    cpus: float, gpus: float, device: str, expected: tuple[object, ...]
) -> None:
    config = DeploymentConfig(name="tiny", source="-", stages=2, ranks=2, device=device)
    found = plan_placement(config, cluster_cpus=cpus, cluster_gpus=gpus)
    assert (found.device, found.backend, found.gpus, found.cpus, found.threads) == expected


def test_a_gpu_that_is_not_there_is_said_so() -> None:
    wanted = DeploymentConfig(name="tiny", source="-", device="cuda")
    with pytest.raises(ServiceError, match="no GPU"):
        plan_placement(wanted, cluster_cpus=4, cluster_gpus=0)
