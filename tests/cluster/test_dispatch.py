"""Stored requests go through the loop and come out as result files: real store, engine and scheduler, one process."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from api import figures
from api.handover import MAX_ATTEMPTS
from api.status import RequestState, RequestStatus
from api.store import Store
from cluster.dispatch import Dispatcher
from cluster.requests import DeploymentState
from engine.loading import meta_model
from engine.local import LocalBackend
from engine.shapes import infer
from polytrace.codec import to_json
from polytrace.errors import CancelledError, PolytraceError, RunError, ServiceError
from polytrace.graph import Constant, Graph, Invoke, NodeId, Op, Port, Read, Ref, Request, Save, Site
from polytrace.tensors import RawTensor
from polytrace.wire import decode_result, encode_request
from scheduling.plan import PassTooLargeError, Plan, RequestId, ShardResult
from scheduling.policy import PassPolicy

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
WHERE = "experiment.py:7"


class World:
    """A tiny model with its store and its loop."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
        self.plain = LlamaForCausalLM(config).eval()
        self.plain.save_pretrained(folder / "model")
        self.backend = LocalBackend(str(folder / "model"), name="m", threads=1)
        self.meta = meta_model(str(folder / "model"))
        self.store = Store(folder / "store")
        self.store.set_state("m", DeploymentState.READY, "ready")

    def submit(self, request: Request) -> RequestId:
        name = self.store.new_id()
        self.store.request_path(name).write_bytes(b"".join(encode_request(request)))
        facts = json.dumps(to_json(infer(self.backend.description, request, self.meta))).encode()
        self.store.add(name, "m", facts, work=1, max_open=1000)
        return name

    def wait(self, *names: RequestId) -> list[RequestStatus]:
        deadline = time.monotonic() + 30
        while True:
            statuses = self.store.statuses(names)
            if all(status.state.is_final for status in statuses.values()):
                return [statuses[name] for name in names]
            assert time.monotonic() < deadline, statuses
            time.sleep(0.005)

    def hidden(self, name: RequestId) -> torch.Tensor:
        values, receipt = decode_result(self.store.result_path(name).read_bytes())
        assert receipt.request == name and receipt.model == "m"
        raw = values["out"]
        return torch.frombuffer(bytearray(raw.data), dtype=torch.float32).reshape(raw.shape)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("dispatch"))
    yield world
    world.store.close()
    world.backend.close()


@pytest.fixture
def run(world: World) -> Iterator[Callable[..., Dispatcher]]:
    """Starts loops over the world's store; they are stopped at the end."""
    started: list[tuple[Dispatcher, threading.Thread]] = []

    def start(shards: object | None = None, max_active: int = 100, awake: threading.Event | None = None) -> Dispatcher:
        dispatcher = Dispatcher(
            world.store,
            world.backend.description,
            shards or world.backend.shards,  # type: ignore[arg-type]
            PassPolicy(),
            awake=threading.Event() if awake is None else awake,
            max_active=max_active,
        )
        thread = threading.Thread(target=dispatcher.run_forever)
        thread.start()
        started.append((dispatcher, thread))
        return dispatcher

    yield start
    for dispatcher, thread in started:
        dispatcher.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


def read_layer(layer: int, *more: Op) -> Request:
    site = Site(module=f"model.layers.{layer}", port=Port.OUTPUT)
    nodes = (Read(site=site, invoke=0, where=WHERE), *more)
    return Request(
        graph=Graph(nodes=(*nodes, Save(name="out", value=Ref(NodeId(len(nodes) - 1)), where=WHERE))),
        invokes=(Invoke(sequences=(PROMPT,)),),
        constants={},
    )


def read_token_out_of_range() -> Request:
    """Fails while it runs: which row it wants is in a constant, so nobody knows before."""
    site = Site(module="model.layers.1", port=Port.OUTPUT)
    return Request(
        graph=Graph(
            nodes=(
                Read(site=site, invoke=0, where=WHERE),
                Constant(name="row", where=WHERE),
                Op(name="index_select", args=(Ref(NodeId(0)), 1, Ref(NodeId(1))), where=WHERE),
                Save(name="out", value=Ref(NodeId(2)), where=WHERE),
            )
        ),
        invokes=(Invoke(sequences=(PROMPT,)),),
        constants={"row": RawTensor(dtype="int64", shape=(1,), data=memoryview(struct.pack("<q", 500)))},
    )


def plain_hidden(world: World, layer: int) -> torch.Tensor:
    with torch.no_grad():
        hidden = world.plain(torch.tensor([PROMPT]), output_hidden_states=True, use_cache=False).hidden_states
    return hidden[layer + 1]


def test_stored_requests_come_out_as_result_files_equal_to_plain_hugging_face(
    world: World, run: Callable[..., Dispatcher]
) -> None:
    before = [world.submit(read_layer(layer)) for layer in range(3)]  # waiting when the loop begins
    run()
    after = [world.submit(read_layer(layer)) for layer in range(3)]
    for status in world.wait(*before, *after):
        assert status.state is RequestState.DONE, status.error
    for layer in range(3):
        expected = plain_hidden(world, layer)
        for name in (before[layer], after[layer]):
            assert (world.hidden(name) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_what_is_counted_is_what_the_receipts_say(world: World, run: Callable[..., Dispatcher]) -> None:
    counters = (figures.PASSES, figures.PASS_ROWS, figures.TOKEN_LAYERS, figures.TOKEN_LAYERS_ALONE)
    counters += (figures.TOKEN_LAYERS_SAVED, figures.MOVED)
    spreads = (figures.PASS_USERS, figures.PASS_SECONDS)

    def counted() -> list[float]:
        tally = world.store.tally
        found = [tally.counts(one).get(("m",), 0.0) for one in counters]
        return found + [tally.spreads(one).get(("m",), (0.0, []))[0] for one in spreads]

    before = counted()
    names = [world.submit(read_layer(layer)) for layer in range(3)]
    run()
    world.wait(*names)
    receipts = [decode_result(world.store.result_path(name).read_bytes())[1] for name in names]
    passes = {entry.pass_id: entry for receipt in receipts for entry in receipt.passes}.values()
    charged = sum(receipt.token_layers for receipt in receipts)
    alone = sum(receipt.token_layers_alone for receipt in receipts)
    assert 0 < charged <= alone and sum(receipt.moved_bytes for receipt in receipts) > 0
    expected = [
        len(passes),
        sum(entry.tokens for entry in passes),
        charged,
        alone,
        alone - charged,
        sum(receipt.moved_bytes for receipt in receipts),
        sum(entry.requests for entry in passes),
        sum(entry.seconds for entry in passes),
    ]
    deadline = time.monotonic() + 30
    while (more := [now - then for now, then in zip(counted(), before, strict=True)]) != pytest.approx(expected):
        assert time.monotonic() < deadline, (more, expected)  # they are counted behind the states
        time.sleep(0.005)
    assert world.store.tally.counts(figures.STAGE_BUSY)[("m", "0")] > 0


def test_a_failing_request_keeps_its_line_and_leaves_its_neighbours_unchanged(
    world: World, run: Callable[..., Dispatcher]
) -> None:
    alone = world.submit(read_layer(2))
    run()
    world.wait(alone)
    good, bad, also_good = (
        world.submit(read_layer(2)),
        world.submit(read_token_out_of_range()),
        world.submit(read_layer(2)),
    )
    statuses = world.wait(good, bad, also_good)
    assert isinstance(statuses[1].error, RunError)
    assert statuses[1].error.where == WHERE
    assert torch.equal(world.hidden(good), world.hidden(alone))
    assert torch.equal(world.hidden(also_good), world.hidden(alone))


def test_more_requests_than_fit_into_memory_wait_in_the_store(world: World, run: Callable[..., Dispatcher]) -> None:
    names = [world.submit(read_layer(1)) for _ in range(9)]
    run(max_active=2)
    assert {status.state for status in world.wait(*names)} == {RequestState.DONE}


def test_a_stored_request_that_was_damaged_fails_alone(world: World, run: Callable[..., Dispatcher]) -> None:
    damaged, good = world.submit(read_layer(1)), world.submit(read_layer(1))
    world.store.request_path(damaged).write_bytes(b"not a request any more")
    run()
    first, second = world.wait(damaged, good)
    assert isinstance(first.error, ServiceError) and "cannot be read" in first.error.message
    assert second.state is RequestState.DONE


class Stuck:
    """Shards whose passes do not end until they are told to."""

    def __init__(self, world: World) -> None:
        self.inner = world.backend.shards
        self.plans: list[Plan] = []
        self.is_open = threading.Event()

    def have_room(self) -> bool:
        return not self.plans

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...]]]:
        if self.is_open.is_set():
            for plan in self.plans:
                self.inner.submit(plan)
                yield from self.inner.finished()
            self.plans = []


def test_a_running_request_is_cancelled_and_its_neighbour_is_not(world: World, run: Callable[..., Dispatcher]) -> None:
    cancelled, kept = world.submit(read_layer(1)), world.submit(read_layer(1))
    shards = Stuck(world)
    awake = threading.Event()
    run(shards, awake=awake)
    while not shards.plans:
        time.sleep(0.005)
    waiting = world.submit(read_layer(1))  # claimed, but in no pass
    while world.store.open_requests()["m"].get(RequestState.QUEUED):
        time.sleep(0.005)
    world.store.cancel(waiting)
    assert isinstance(world.wait(waiting)[0].error, CancelledError)
    world.store.cancel(cancelled)
    time.sleep(0.05)
    shards.is_open.set()
    awake.set()
    first, second = world.wait(cancelled, kept)
    assert first.state is RequestState.CANCELLED
    assert second.state is RequestState.DONE


def test_a_loop_that_sleeps_uses_no_time(world: World, run: Callable[..., Dispatcher]) -> None:
    run()
    world.wait(world.submit(read_layer(1)))
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.25


def test_what_the_loop_cannot_mend_ends_it(world: World) -> None:
    class Broken(Stuck):
        def submit(self, plan: Plan) -> None:
            raise ServiceError("the shards are gone")

    dispatcher = Dispatcher(
        world.store, world.backend.description, Broken(world), PassPolicy(), awake=threading.Event(), max_active=9
    )
    name = world.submit(read_layer(1))
    with pytest.raises(ServiceError, match="gone"):
        dispatcher.run_forever()
    assert (
        world.store.status(name) is not None and world.store.requeue("m", is_clean=True) == 1
    )  # for the next controller
    world.store.cancel(name)


class Breakable(Stuck):
    """Shards that die of one request."""

    def __init__(self, world: World, poison: RequestId) -> None:
        super().__init__(world)
        self.poison = poison
        self.awake = threading.Event()
        self.loss: PolytraceError | None = None
        self.num_recoveries = 0
        self.num_in_company = 0  # passes that they died of, in which others were too

    def submit(self, plan: Plan) -> None:
        self.is_open.set()
        super().submit(plan)
        if any(member.program.request == self.poison for member in plan.members):
            self.loss = ServiceError("the shard stage 0 rank 0 died")
            self.num_in_company += len(plan.members) > 1

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:  # type: ignore[override]
        if self.loss is None:
            yield from super().finished()
            return
        if not self.plans:
            raise self.loss
        for plan in self.plans:
            yield plan, self.loss
        self.plans = []
        self.awake.set()

    def recover(self, loss: PolytraceError) -> None:
        assert loss is self.loss
        self.loss = None
        self.num_recoveries += 1


def run_until_ended(world: World, dispatcher: Dispatcher, *names: RequestId) -> list[RequestStatus]:
    """Runs the loop until the requests have ended; how they did."""
    thread = threading.Thread(target=dispatcher.run_forever)
    thread.start()
    statuses = world.wait(*names)
    dispatcher.stop()
    thread.join()
    return statuses


def test_a_request_that_breaks_the_shards_thrice_is_refused_and_its_neighbours_are_answered(world: World) -> None:
    before, poison, after = (world.submit(read_layer(1)) for _ in range(3))
    shards = Breakable(world, poison)
    dispatcher = Dispatcher(
        world.store,
        world.backend.description,
        shards,
        PassPolicy(),
        awake=shards.awake,
        recover=shards.recover,
        max_active=9,
    )
    statuses = run_until_ended(world, dispatcher, before, poison, after)
    assert [status.state for status in statuses] == [RequestState.DONE, RequestState.FAILED, RequestState.DONE]
    assert "shards died in 3 passes with this request alone" in str(statuses[1].error)
    assert shards.num_recoveries == 3 + shards.num_in_company  # company proves nothing


class Small(Stuck):
    """Shards on which a pass of more than so many rows does not fit: lost then, and whole at once."""

    def __init__(self, world: World, most_rows: int) -> None:
        super().__init__(world)
        self.most_rows = most_rows
        self.awake = threading.Event()
        self.loss: PolytraceError | None = None
        self.num_losses = 0

    def have_room(self) -> bool:
        return self.loss is None and super().have_room()

    def submit(self, plan: Plan) -> None:
        self.is_open.set()
        super().submit(plan)
        if max(plan.layer_rows) > self.most_rows:
            self.loss = PassTooLargeError("the shard is full")

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:  # type: ignore[override]
        if self.loss is None:
            yield from super().finished()
        elif self.plans:
            yield self.plans.pop(), self.loss
            self.awake.set()
        else:
            raise self.loss

    def recover(self, loss: PolytraceError) -> None:
        assert loss is self.loss
        self.loss = None
        self.num_losses += 1


def test_a_stored_sweep_whose_pass_is_too_large_alone_is_worked_out_for_smaller_ones(world: World) -> None:
    names = [world.submit(sweep_of(invokes)) for invokes in (80, 1)]
    shards = Small(world, most_rows=300)  # 80 prompts of eight tokens are 640 rows
    policy = PassPolicy(least_tokens=64)
    dispatcher = Dispatcher(
        world.store, world.backend.description, shards, policy, awake=shards.awake, recover=shards.recover, max_active=9
    )
    sweep, one = run_until_ended(world, dispatcher, *names)
    assert (sweep.state, one.state) == (RequestState.DONE, RequestState.DONE), sweep.error
    values, receipt = decode_result(world.store.result_path(names[0]).read_bytes())
    assert len(receipt.passes) > 1 and len(values) == 80 and 1 <= shards.num_losses <= 3
    expected = values["out0"].data
    assert expected == decode_result(world.store.result_path(names[1]).read_bytes())[0]["out0"].data


def sweep_of(invokes: int) -> Request:
    """As many prompts that have nothing in common, and of each a layer."""
    site = Site(module="model.layers.2", port=Port.OUTPUT)
    nodes: list[Read | Save] = []
    for invoke in range(invokes):
        nodes.append(Read(site=site, invoke=invoke, where=WHERE))
        nodes.append(Save(name=f"out{invoke}", value=Ref(NodeId(2 * invoke)), where=WHERE))
    prompts = [Invoke(sequences=(tuple((5 * token + invoke) % 64 for token in range(8)),)) for invoke in range(invokes)]
    return Request(graph=Graph(nodes=tuple(nodes)), invokes=tuple(prompts), constants={})


def test_a_request_that_breaks_controllers_takes_no_neighbour_along(world: World) -> None:
    before, poison, after = (world.submit(read_layer(1)) for _ in range(3))
    description = world.backend.description
    for _ in range(MAX_ATTEMPTS):  # each a controller, until nothing breaks any more
        shards = Breakable(world, poison)
        dispatcher = Dispatcher(world.store, description, shards, PassPolicy(), awake=shards.awake, max_active=9)
        with pytest.raises(ServiceError, match="died"):
            dispatcher.run_forever()
        world.store.requeue("m", is_clean=False)
    dispatcher = Dispatcher(
        world.store, description, Breakable(world, poison), PassPolicy(), awake=threading.Event(), max_active=9
    )
    statuses = run_until_ended(world, dispatcher, before, poison, after)
    assert [status.state for status in statuses] == [RequestState.DONE, RequestState.FAILED, RequestState.DONE]
    assert isinstance(statuses[1].error, ServiceError)
