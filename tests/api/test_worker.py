"""Requests are checked in processes of their own: clear refusals, and a worker that dies takes nobody with it."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from model_kinds import KINDS
from services import make_model
from torch import nn

import polytrace
from api.checked_calls import CheckedCalls
from api.store import Store
from api.time_limits import within
from api.worker import CheckerPool, Verdict
from cluster.requests import DeploymentState, Published
from engine.local import LocalBackend
from polytrace.certificate import Certificate
from polytrace.codec import from_json, to_json
from polytrace.errors import GraphError, PolytraceError, TooLargeError, WireError, from_fields
from polytrace.graph import Given, Graph, Inputs, Invoke, NodeId, Op, Port, Read, Ref, Request, Save, Site
from polytrace.tensors import RawTensor
from polytrace.wire import encode_request

WHERE = "experiment.py:12"


@dataclass
class World:
    store: Store
    pool: CheckerPool
    loop: asyncio.AbstractEventLoop

    def check(self, content: bytes | Request, certify: bool = False, version: str = "1") -> Verdict:
        return self.loop.run_until_complete(self.checking(content, certify, version))

    async def checking(self, content: bytes | Request, certify: bool = False, version: str = "1") -> Verdict:
        path = self.store.request_path(self.store.new_id())
        path.write_bytes(content if isinstance(content, bytes) else b"".join(encode_request(content)))
        contents = self.store.contents.folder_of("default")
        return await self.pool.check("m", version, path, contents=contents, certify=certify)

    def refusal(self, content: bytes | Request, version: str = "1") -> PolytraceError:
        verdict = self.check(content, version=version)
        assert verdict.error is not None
        return from_fields(verdict.error)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("worker")
    make_model(folder / "model")
    backend = LocalBackend(str(folder / "model"), name="m", threads=1)
    store = Store(folder / "store")
    body = json.dumps(to_json(backend.describe())).encode()
    backend.close()
    store.set_state("m", DeploymentState.STARTING, "")
    store.publish("m", Published(source=str(folder / "model"), dtype="auto", description=body, tokenizer=None))
    world = World(store, CheckerPool(store.folder, 1), asyncio.new_event_loop())
    yield world
    world.pool.close()
    world.loop.close()
    store.close()


def test_a_name_that_a_called_model_had_may_be_a_language_models(world: World, tmp_path: Path) -> None:
    KINDS["vit"]()[0].save_pretrained(tmp_path / "vit")
    before = world.store.published("m")
    assert before is not None
    called = polytrace.load(str(tmp_path / "vit"))
    body = json.dumps(to_json(called.description)).encode()
    world.store.publish("m", Published(source=str(tmp_path / "vit"), dtype="auto", description=body, tokenizer=None))
    world.loop.run_until_complete(world.pool.warm("m", "2"))
    assert "is called with" in world.refusal(read("model.layers.2"), "2").message
    world.store.publish("m", before)
    assert world.check(read("model.layers.2")).error is None


def test_a_good_request_gets_facts_and_on_demand_a_certificate(world: World) -> None:
    verdict = world.check(read("model.layers.2"))
    assert verdict.error is None and verdict.certificate is None
    facts = json.loads(verdict.facts or b"")
    assert facts[0]["shape"] == [1, 3, 32] and facts[1] is None
    certificate = from_json(
        Certificate, json.loads(world.check(read("model.layers.2"), certify=True).certificate or b"")
    )
    assert certificate.saves["out"].shape == (1, 3, 32) and certificate.passes == 1


def test_a_layer_that_is_not_there_is_refused_with_the_line_and_what_there_is(world: World) -> None:
    error = world.refusal(read("model.layers.96"))
    assert isinstance(error, GraphError) and error.where == WHERE
    assert "96" in error.message


def test_a_misspelt_module_is_refused_with_the_nearest_name(world: World) -> None:
    error = world.refusal(read("model.layers.2.self_atn"))
    assert isinstance(error, GraphError)
    assert "self_attn" in error.message


def test_shapes_that_do_not_fit_are_refused(world: World) -> None:
    error = world.refusal(read("model.layers.2", Op(name="reshape", args=(Ref(NodeId(0)), (7, 7)), where="a.py:9")))
    assert isinstance(error, GraphError) and error.where == "a.py:9"


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(world: World) -> None:
    error = world.refusal(read("model.layers.2", tokens=(1,) * 129))
    assert isinstance(error, TooLargeError | GraphError)
    assert "129" in error.message and "128" in error.message


def test_a_token_that_the_model_does_not_know_is_refused(world: World) -> None:
    error = world.refusal(read("model.layers.2", tokens=(1, 64)))
    assert isinstance(error, GraphError)
    assert "64" in error.message


def test_bytes_that_are_no_request_are_refused(world: World) -> None:
    good = b"".join(encode_request(read("model.layers.2")))
    for bad in (b"", b"hello", b"\xff" * 100, good[:50]):
        assert isinstance(world.refusal(bad), WireError)


def test_a_worker_that_dies_takes_no_request_with_it(world: World) -> None:
    world.check(read("model.layers.2"))

    async def kill_while_busy() -> list[Verdict]:
        checks = [asyncio.ensure_future(world.checking(read("model.layers.2"))) for _ in range(8)]
        await asyncio.sleep(0)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        return await asyncio.gather(*checks)

    verdicts = world.loop.run_until_complete(kill_while_busy())
    assert [verdict.error for verdict in verdicts] == [None] * 8
    assert world.check(read("model.layers.2")).error is None


def read(module: str, *more: Op, tokens: tuple[int, ...] = (1, 2, 3)) -> Request:
    nodes = (Read(site=Site(module=module, port=Port.OUTPUT), invoke=0, where=WHERE), *more)
    return Request(
        graph=Graph(nodes=(*nodes, Save(name="out", value=Ref(NodeId(len(nodes) - 1)), where=WHERE))),
        invokes=(Invoke(sequences=(tokens,)),),
        constants={},
    )


class Endless(nn.Module):
    def forward(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        while steps:
            try:
                x = x + 1
            except Exception:  # noqa: BLE001  as code of models does
                continue
        return x


def test_a_call_that_never_ends_is_refused_in_time_and_the_next_is_answered() -> None:
    calls = CheckedCalls(Endless(), 1 << 20, patience_s=0.5)
    constants = {"x": RawTensor(dtype="float32", shape=(2,), data=memoryview(b""))}

    def call(steps: int) -> Inputs:
        return Inputs(args=(Given("x"), steps), kwargs={})

    with pytest.raises(TooLargeError, match=r"not found out within 0\.5 s: send fewer, or smaller ones"):
        calls.of(call(1), constants)
    sites, has_looked = calls.of(call(0), constants)
    assert [site.port for site in sites] == [Port.INPUT, Port.OUTPUT]
    assert not has_looked


def test_a_large_graph_is_checked_apart_and_nobody_waits_for_it(world: World) -> None:
    """A few hundred bytes may say a hundred thousand nodes."""
    large = exponents(100_000)
    assert len(b"".join(encode_request(large))) < 1_000

    async def both() -> tuple[Verdict, list[Verdict]]:
        first = asyncio.ensure_future(world.checking(large))
        others = [await world.checking(read("model.layers.1")) for _ in range(3)]
        assert not first.done(), "the others did not wait for it"
        return await first, others

    verdict, others = world.loop.run_until_complete(both())
    assert verdict.error is None and len(json.loads(verdict.facts or b"")) == 100_002
    assert all(other.error is None for other in others)


def test_a_graph_beyond_the_limit_is_refused_with_the_number_and_the_limit(world: World) -> None:
    file = b"".join(encode_request(exponents(100_000)))
    assert file.count(b"[100000, ") + file.count(b"[100000,") == 1
    error = world.refusal(file.replace(b"[100000,", b"[999999,"))
    assert "1000001 nodes; at most 1000000" in error.message


def test_a_check_that_takes_too_long_is_ended_whatever_the_program_handles() -> None:
    def endless() -> None:
        while True:
            try:
                time.sleep(0.001)
            except Exception:  # noqa: BLE001  as one that looks at users' operations does
                continue

    with pytest.raises(TooLargeError, match=r"takes longer than 0\.05 s"), within(0.05, "it takes longer than 0.05 s"):
        endless()
    with within(0.05, "late"):
        pass
    time.sleep(0.1)  # nothing rings later


def exponents(count: int) -> Request:
    nodes = [Op(name="exp", args=(Ref(NodeId(place)),), where=WHERE) for place in range(count)]
    first = Read(site=Site(module="model.layers.2", port=Port.OUTPUT), invoke=0, where=WHERE)
    last = Save(name="out", value=Ref(NodeId(count)), where=WHERE)
    return Request(graph=Graph(nodes=(first, *nodes, last)), invokes=(Invoke(sequences=((1, 2, 3),)),), constants={})


def test_a_time_limit_inside_of_another_leaves_it_its_own() -> None:
    with pytest.raises(TooLargeError, match="outer"), within(0.2, "outer"):
        with within(10.0, "inner"):
            pass
        while True:
            pass
    with pytest.raises(TooLargeError, match="inner"), within(10.0, "outer"), within(0.05, "inner"):
        while True:
            pass
