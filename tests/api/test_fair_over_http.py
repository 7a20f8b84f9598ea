"""Two backlogged tenants of equal weight on a real service, 2 stages x 2 ranks, and another's single trace beside them;
what a receipt and a price say of another tenant's prompt, with both settings of `share_across`.
"""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from laptops import Laptop
from services import Guest, Service, wait_until

import polytrace
from polytrace.certificate import Receipt
from polytrace.graph import Graph, Invoke, Node, NodeId, Op, Port, Read, Ref, Request, Save, Site, Write
from polytrace.wire import decode_result, encode_request

WHERE = "experiment.py:1"


def sweep(seed: int, invokes: int, tokens: int) -> bytes:
    """A patch at the first layer in each of so many prompts that have nothing in common."""
    nodes: list[Node] = []
    for invoke in range(invokes):
        first, last = (Site(module=f"model.layers.{layer}", port=Port.OUTPUT) for layer in (0, 3))
        begin = len(nodes)
        nodes += [
            Read(site=first, invoke=invoke, where=WHERE),
            Op(name="mul", args=(Ref(NodeId(begin)), 1.5), where=WHERE),
            Write(site=first, invoke=invoke, value=Ref(NodeId(begin + 1)), in_place=True, where=WHERE),
            Read(site=last, invoke=invoke, where=WHERE),
            Save(name=f"out{invoke}", value=Ref(NodeId(begin + 3)), where=WHERE),
        ]
    prompts = [
        tuple((seed * 7 + invoke * 11 + place * (3 + seed % 5)) % 64 for place in range(tokens))
        for invoke in range(invokes)
    ]
    request = Request(
        graph=Graph(nodes=tuple(nodes)),
        invokes=tuple(Invoke(sequences=(prompt,)) for prompt in prompts),
        constants={},
    )
    return b"".join(encode_request(request))


class Caller:
    """A tenant's user."""

    def __init__(self, service: Service, tenant: str) -> None:
        made = service.http.put(f"/v1/tenants/{tenant}", json={})
        assert made.status_code == 201, made.text
        key = service.http.post("/v1/keys", json={"tenant": tenant, "user": "someone"}).json()["secret"]
        self.key, self.url = key, str(service.http.base_url)
        self.http = httpx.Client(
            base_url=service.http.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=120
        )

    def submit(self, content: bytes) -> dict[str, Any]:
        posted = self.http.post("/v1/models/tiny/requests", content=content)
        assert posted.status_code == 202, posted.text
        return dict(posted.json())

    def run(self, content: bytes) -> Receipt:
        answered = self.http.post("/v1/models/tiny/requests", content=content, headers={"Prefer": "wait=60"})
        assert answered.status_code == 200, answered.text
        return decode_result(answered.content)[1]

    def receipt(self, request: str) -> Receipt:
        def state() -> str:
            return str(self.http.get(f"/v1/requests/{request}", params={"wait": 30}).json()["state"])

        while (now := state()) in ("queued", "running"):
            pass
        assert now == "done"
        return decode_result(self.http.get(f"/v1/requests/{request}/result").content)[1]


@pytest.fixture(scope="module")
def service(laptop: Laptop) -> Service:
    return laptop.service


@pytest.fixture
def open_to_all(laptop: Laptop) -> Iterator[Guest]:
    """Another deployment of its model, in which tenants share."""
    guest = Guest(laptop.url, laptop.folder / "model", name="open", key=laptop.key, share_across="deployment")
    try:
        wait_until(lambda: guest.is_ready("open"), 240, guest)
        yield guest
    finally:
        guest.kill_all()


@pytest.fixture
def callers(service: Service) -> Iterator[Callable[[str], Caller]]:
    found: list[Caller] = []

    def caller(tenant: str) -> Caller:
        found.append(Caller(service, tenant))
        return found[-1]

    yield caller
    for one in found:
        one.http.close()


def generated(caller: Caller, deployment: str, prompt: list[int]) -> tuple[Any, Receipt]:
    """The price of a generation, and its receipt once it has run."""
    with polytrace.connect(caller.url, deployment, key=caller.key) as model:
        with model.generate([prompt], max_new_tokens=2, eos=(), run=False) as asked:
            pass
        price = model.validate(asked)
        with model.generate([prompt], max_new_tokens=2, eos=()) as tracer:
            pass
        assert tracer.receipt is not None
        return price, tracer.receipt


def told(receipt: Receipt) -> tuple[Any, ...]:
    """What it says of cost and neighbours, without times."""
    passes = tuple((entry.requests, entry.tokens, entry.layer_rows) for entry in receipt.passes)
    return passes, receipt.token_layers, receipt.moved_bytes, receipt.loaded_bytes, receipt.notes


def served(receipts: list[Receipt]) -> dict[int, int]:
    """By pass: rows x layers that a tenant's requests had there."""
    return {entry.pass_id: sum(entry.layer_rows) for receipt in receipts for entry in receipt.passes}


def test_backlogged_tenants_stay_within_two_passes(callers: Callable[[str], Caller]) -> None:
    left, right, third = (callers(name) for name in ("many", "small", "third"))
    # 1) Both send more than the service keeps up with, one large requests, one small ones.
    with ThreadPoolExecutor(4) as pool:
        large = [pool.submit(left.submit, sweep(number, 10, 100)) for number in range(16)]
        small = [pool.submit(right.submit, sweep(number, 4, 50)) for number in range(80)]
        accepted = [[one.result()["id"] for one in many] for many in (large, small)]
    waiting = [
        caller.http.get(f"/v1/requests/{ids[-1]}").json() for caller, ids in zip((left, right), accepted, strict=True)
    ]
    # 2) A third one's trace does not stand behind them.
    single = third.run(sweep(1, 1, 20))
    receipts = [
        [caller.receipt(request) for request in ids] for caller, ids in zip((left, right), accepted, strict=True)
    ]
    assert all(one["state"] == "queued" or one["passes_done"] == 0 for one in waiting), "nobody was backlogged"
    begins = [min(passes) for passes in map(served, receipts)]
    ends = [max(passes) for passes in map(served, receipts)]
    assert max(begins) < single.passes[0].pass_id < min(ends), "it did not run among them"
    # 3) While both wait, what they are served differs by two passes at most.
    by_pass: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for place, passes in enumerate(map(served, receipts)):
        for pass_id, rows in passes.items():
            by_pass[pass_id][place] = rows
    since, until = single.passes[0].pass_id, min(ends)
    largest = max(sum(rows) for rows in by_pass.values())
    gaps, gap = [0], 0
    for pass_id in sorted(one for one in by_pass if since < one < until):
        gap += by_pass[pass_id][0] - by_pass[pass_id][1]
        gaps.append(gap)
    print(f"{len(gaps)} passes, largest {largest}, gaps {min(gaps)} to {max(gaps)}")
    assert len(gaps) > 50
    assert max(gaps) - min(gaps) <= 2 * largest


@pytest.mark.usefixtures("open_to_all")
def test_another_tenants_prompt_is_in_no_receipt_or_price_unless_tenants_share(
    service: Service, callers: Callable[[str], Caller]
) -> None:
    """The prober guesses which prompt the victim has just run: as often right as wrong, and each prompt once."""
    specs = [service.deployment(name)["spec"] for name in ("tiny", "open")]
    assert [spec["share_across"] for spec in specs] == ["tenant", "deployment"]
    victim, prober = callers("victim"), callers("prober")
    rng = random.Random(0)
    for deployment, has_told in (("tiny", False), ("open", True)):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        answers: dict[bool, list[tuple[Any, ...]]] = {True: [], False: []}
        prices = []
        for turn in range(12):
            secret, other = ([rng.randrange(64) for _ in range(100)] for _ in range(2))
            generated(victim, deployment, secret)
            is_right = turn % 2 == 0
            price, receipt = generated(prober, deployment, secret if is_right else other)
            prices.append(price.token_layers)
            answers[is_right].append(told(receipt))
            seconds[is_right].append(receipt.run_seconds)
        assert len(set(prices)) == 1, "the price knows nothing of what others ran"
        right, wrong = set(answers[True]), set(answers[False])
        assert len(right) == len(wrong) == 1
        assert (right != wrong) is has_told, (right, wrong)
        medians = {name: f"{statistics.median(values) * 1e3:.1f} ms" for name, values in seconds.items()}
        print(f"{deployment}: run at the median, by whether the guess was right: {medians}")
