"""Limits of one request, at their edges, over HTTP through the gateway with the checkers that a service has.

What a refusal names is sent too: it is taken, and one more is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import GatewayService
from services import make_model

from api.limits import TenantLimits, text_of
from api.worker import CheckerPool
from engine.local import LocalBackend
from polytrace.certificate import Certificate
from polytrace.codec import from_json
from polytrace.graph import (
    Backward,
    Generation,
    Grad,
    Graph,
    Invoke,
    Node,
    NodeId,
    Op,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Site,
    Write,
)
from polytrace.wire import encode_request

WHERE = "experiment.py:12"
LAYERS = 4
TAPE_BYTES = 400_000


class World:
    """A gateway whose workers check for real; nothing runs."""

    def __init__(self, folder: Path) -> None:
        make_model(folder / "model")
        backend = LocalBackend(str(folder / "model"), name="m", threads=1)
        description = backend.describe()
        description = replace(description, limits=replace(description.limits, tape_bytes=TAPE_BYTES))
        backend.close()
        pool = CheckerPool(folder / "store", 1)
        self.service = GatewayService(folder / "store", pool, description, source=str(folder / "model"))

    def limit(self, **limits: int) -> None:
        """The tenant's limits from now on."""
        store = self.service.store
        with store._db.transaction() as db:
            db.execute("DELETE FROM tenants")
            db.execute(
                "INSERT INTO tenants (name, created, limits) VALUES ('default', 0, ?)",
                (text_of(TenantLimits(**limits)),),
            )
        self.forget()

    def forget(self) -> None:
        """The gateway looks limits up again, as it does every few seconds."""
        self.service.gateway._admission.forget()

    def submit(self, request: Request) -> httpx.Response:
        return self.service.http.post("/v1/models/m/requests", content=b"".join(encode_request(request)))

    def validate(self, request: Request) -> Certificate:
        answer = self.service.http.post("/v1/models/m/validate", content=b"".join(encode_request(request)))
        assert answer.status_code == 200, answer.text
        return from_json(Certificate, answer.json())

    def refusal(self, request: Request) -> str:
        answer = self.submit(request)
        assert answer.status_code == 413 and answer.json()["code"] == "too-large", answer.text
        return str(answer.json()["detail"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("admission"))
    yield world
    world.service.close()


@pytest.fixture(autouse=True)
def without_limits(world: World) -> Iterator[None]:
    yield
    world.limit()
    with world.service.store._db.transaction() as db:
        db.execute("UPDATE deployments SET limits = '{}'")
    world.forget()


def test_a_request_at_the_limit_is_taken_and_one_beyond_it_is_refused_with_both_numbers(world: World) -> None:
    takes = world.validate(separate(3))
    for what in ("token_layers", "passes", "result_bytes", "request_bytes"):
        needed = getattr(takes, what)
        assert needed > 0
        world.limit(**{what: needed})
        assert world.submit(separate(3)).status_code == 202, what
        world.limit(**{what: needed - 1})
        told = world.refusal(separate(3))
        assert "tenant default" in told and f"{needed:,}" in told.replace(str(needed), f"{needed:,}"), told


@pytest.mark.parametrize("spare", [0, 1, 7])
def test_so_many_prompts_as_a_refusal_names_are_taken_and_one_more_is_not(world: World, spare: int) -> None:
    """Prompts of their own, whose results are stacked: the stack loses those that are left out."""
    world.limit(token_layers=40 * LAYERS + spare)
    assert world.validate(separate(20)).token_layers == 20 * 5 * LAYERS
    named = number(world.refusal(separate(20)), r"(\d+) of these 20 prompts would fit")
    assert named == 8
    assert world.submit(separate(named)).status_code == 202
    assert "7 of" not in world.refusal(separate(named + 1))


def test_of_one_list_of_prompts_the_first_are_named(world: World) -> None:
    world.limit(token_layers=30 * LAYERS)
    told = world.refusal(together(16))
    assert told.startswith("takes 320 token-layers, tenant default may take 120 at once"), told
    named = number(told, r"(\d+) of these 16 prompts would fit")
    assert named == 6
    assert world.submit(together(named)).status_code == 202
    world.refusal(together(named + 1))


def test_a_sweep_with_a_clean_run_is_named_by_its_first_prompts(world: World) -> None:
    """Each patched run needs the clean one, which is the first: what is named keeps it."""
    world.limit(token_layers=world.validate(sweep(5)).token_layers)
    named = number(world.refusal(sweep(12)), r"(\d+) of these 13 prompts would fit")
    assert named == 6
    assert world.submit(sweep(named - 1)).status_code == 202
    world.refusal(sweep(named))


def test_of_a_program_whose_first_prompt_needs_its_last_nothing_is_named(world: World) -> None:
    nodes: list[Node] = [
        Read(site=layer(1), invoke=1, where=WHERE),
        Write(site=layer(2), invoke=0, value=Ref(NodeId(0)), in_place=False, where=WHERE),
        Read(site=layer(3), invoke=0, where=WHERE),
        Save(name="out", value=Ref(NodeId(2)), where=WHERE),
    ]
    request = made(nodes, [prompt(0), prompt(1)])
    world.limit(token_layers=3)
    assert "would fit" not in world.refusal(request)


def test_of_a_generation_new_tokens_are_named(world: World) -> None:
    world.limit(token_layers=12 * LAYERS)
    named = number(world.refusal(generation(30)), r"max_new_tokens=(\d+) would fit instead of 30")
    assert named == 8  # 5 of the prompt, and a row for each token but the last
    assert world.submit(generation(named)).status_code == 202
    world.refusal(generation(named + 1))


def test_of_one_long_prompt_its_first_tokens_are_named(world: World) -> None:
    world.limit(token_layers=31 * LAYERS)
    assert number(world.refusal(long(100)), r"the first (\d+) of its 100 tokens would fit") == 31
    assert world.submit(long(31)).status_code == 202
    world.refusal(long(32))


def test_of_a_large_result_the_features_are_named_that_fit(world: World) -> None:
    world.limit(result_bytes=1500)  # 5 rows of 32 features and a little of 64 logits for each
    told = world.refusal(saving(32, 64))
    assert told.startswith("result of 1.92 KB, tenant default may have 1.5 KB: ")
    named = number(told, r"'logits' of experiment.py:12 is \[1, 5, 64\]; save \[..., :(\d+)\] of it")
    assert 5 * 4 * (32 + named) <= 1500 < 5 * 4 * (32 + named + 1)
    assert world.submit(saving(32, named)).status_code == 202
    world.refusal(saving(32, named + 1))


def test_the_deployments_own_limits_hold_for_everybody(world: World) -> None:
    put = world.service.http.put("/v1/models/m/limits", json={"token_layers": 11 * LAYERS})
    assert put.status_code == 200, put.text
    world.forget()
    world.limit(token_layers=50 * LAYERS)
    told = world.refusal(separate(4))
    assert "deployment m may take 44 at once: 2 of these 4 prompts would fit" in told
    wrong = world.service.http.put("/v1/models/m/limits", json={"tokens_a_day": 5})
    assert wrong.status_code == 400 and "tokens_a_day" in wrong.text
    assert world.service.http.put("/v1/models/nobody/limits", json={}).status_code == 404


def test_a_limit_of_the_deployment_that_nobody_set_names_what_would_fit_too(world: World) -> None:
    """Memory for gradients: an error of the plan, not a tenant's limit."""
    told = world.refusal(gradients(60))
    assert "the gradients of this request keep" in told and "tenant" not in told
    named = number(told, r"(\d+) of these 60 prompts would fit")
    assert world.submit(gradients(named)).status_code == 202
    world.refusal(gradients(named + 1))
    tape = world.validate(gradients(named)).tape_bytes
    world.limit(tape_bytes=tape // 2)
    fewer = number(world.refusal(gradients(named)), rf"(\d+) of these {named} prompts would fit")
    assert 0 < fewer < named and world.submit(gradients(fewer)).status_code == 202


def test_validate_tells_limits_and_whether_it_would_be_taken(world: World) -> None:
    world.limit(token_layers=30 * LAYERS, tokens_a_day=100_000, requests_in_flight=1_000)
    fits, beyond = world.validate(together(2)), world.validate(together(16))
    assert fits.is_admitted and not beyond.is_admitted
    assert {line.what for line in fits.limits} == {"token_layers", "tokens_a_day", "requests_in_flight"}
    assert all(line.is_within for line in fits.limits)
    assert [line.what for line in beyond.limits if not line.is_within] == ["token_layers"]
    assert beyond.refusal == world.refusal(together(16)) and "6 of these 16 prompts would fit" in beyond.refusal
    assert "would be taken now" in str(fits) and "would be refused" in str(beyond)


def test_questions_have_a_rate_of_their_own(world: World) -> None:
    with world.service.store._db.transaction() as db:
        db.execute("UPDATE requests SET created = created - 3600")  # those of other tests
    world.limit(requests_a_minute=3)
    for _ in range(3):
        assert world.validate(together(1)).token_layers > 0
    content = b"".join(encode_request(together(1)))
    for path in ("validate", "sites"):
        answer = world.service.http.post(f"/v1/models/m/{path}", content=content)
        assert answer.status_code == 429 and 0 < int(answer.headers["retry-after"]) <= 20
        assert "tenant default may ask 3 questions a minute" in answer.json()["detail"]
    assert world.submit(together(1)).status_code == 202, "they take nothing of its requests'"


@pytest.mark.parametrize("is_announced", [True, False])
def test_an_upload_ends_where_the_limit_is_whatever_it_says_of_its_length(world: World, is_announced: bool) -> None:
    world.limit(request_bytes=100_000)
    before, sent = set((world.service.store.folder / "requests").glob("*")), 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(2000):
            sent += 10_000
            yield b"\0" * 10_000

    headers = {"Content-Length": str(2000 * 10_000)} if is_announced else {}
    answer = world.service.http.post("/v1/models/m/requests", content=pieces(), headers=headers)
    assert answer.status_code == 413 and "tenant default may send at most 100000" in answer.text
    assert set((world.service.store.folder / "requests").glob("*")) == before and sent > 100_000


def test_a_json_body_ends_where_the_limit_is(world: World) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"hashes": ["'
        for _ in range(20):
            yield b"0" * (1 << 20)

    answer = world.service.http.post(
        "/v1/constants/missing", content=pieces(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413 and answer.json()["code"] == "too-large"


def number(told: str, pattern: str) -> int:
    found = re.search(pattern, told)
    assert found is not None, told
    return int(found[1])


def layer(number: int, port: Port = Port.OUTPUT) -> Site:
    return Site(module=f"model.layers.{number}", port=port)


def prompt(seed: int, tokens: int = 5) -> tuple[int, ...]:
    """Prompts of different seeds have no row in common."""
    return tuple((1 + seed + place * 7) % 64 for place in range(tokens))


def made(nodes: list[Node], prompts: list[tuple[int, ...]], **more: Any) -> Request:
    invokes = tuple(Invoke(sequences=(each,), **more) for each in prompts)
    return Request(graph=Graph(nodes=tuple(nodes)), invokes=invokes, constants={})


def separate(count: int) -> Request:
    """A read of each prompt, stacked."""
    nodes: list[Node] = [Read(site=layer(3), invoke=number, where=WHERE) for number in range(count)]
    nodes.append(Op(name="stack", args=(tuple(Ref(NodeId(number)) for number in range(count)),), where=WHERE))
    nodes.append(Save(name="all", value=Ref(NodeId(count)), where=WHERE))
    return made(nodes, [prompt(number) for number in range(count)])


def together(count: int) -> Request:
    """One list of prompts, one read."""
    nodes = (Read(site=layer(3), invoke=0, where=WHERE), Save(name="out", value=Ref(NodeId(0)), where=WHERE))
    invoke = Invoke(sequences=tuple(prompt(number) for number in range(count)))
    return Request(graph=Graph(nodes=nodes), invokes=(invoke,), constants={})


def sweep(count: int) -> Request:
    """A clean run, and runs that are given its output of a layer."""
    nodes: list[Node] = [Read(site=layer(1), invoke=0, where=WHERE)]
    for number in range(1, count + 1):
        nodes.append(Write(site=layer(1), invoke=number, value=Ref(NodeId(0)), in_place=False, where=WHERE))
        nodes.append(Read(site=layer(3), invoke=number, where=WHERE))
        nodes.append(Save(name=f"out{number}", value=Ref(NodeId(len(nodes) - 1)), where=WHERE))
    return made(nodes, [prompt(number) for number in range(count + 1)])


def gradients(count: int) -> Request:
    """Of the sum of a list's last hidden states with regard to an early layer."""
    nodes: list[Node] = [
        Read(site=layer(0), invoke=0, where=WHERE),
        Read(site=layer(3), invoke=0, where=WHERE),
        Op(name="sum", args=(Ref(NodeId(1)),), where=WHERE),
        Backward(loss=Ref(NodeId(2)), gradient=None, where=WHERE),
        Grad(of=Ref(NodeId(0)), backward=Ref(NodeId(3)), where=WHERE),
        Save(name="g", value=Ref(NodeId(4)), where=WHERE),
    ]
    invoke = Invoke(sequences=tuple(prompt(number) for number in range(count)))
    return Request(graph=Graph(nodes=tuple(nodes)), invokes=(invoke,), constants={})


def generation(new_tokens: int) -> Request:
    nodes: list[Node] = [Read(site=layer(3), invoke=0, where=WHERE), Save(name="h", value=Ref(NodeId(0)), where=WHERE)]
    return made(nodes, [prompt(3)], generation=Generation(max_new_tokens=new_tokens))


def long(tokens: int) -> Request:
    nodes: list[Node] = [Read(site=layer(3), invoke=0, where=WHERE), Save(name="h", value=Ref(NodeId(0)), where=WHERE)]
    return made(nodes, [prompt(3, tokens)])


def saving(features: int, logits: int) -> Request:
    """So many features of hidden states and of logits."""
    nodes: list[Node] = []
    for name, site, size in (
        ("hidden", layer(3), features),
        ("logits", Site(module="lm_head", port=Port.OUTPUT), logits),
    ):
        nodes.append(Read(site=site, invoke=0, where=WHERE))
        nodes.append(Op(name="getitem", args=(Ref(NodeId(len(nodes) - 1)), (Ellipsis, slice(None, size))), where=WHERE))
        nodes.append(Save(name=name, value=Ref(NodeId(len(nodes) - 1)), where=WHERE))
    return made(nodes, [prompt(1)])
