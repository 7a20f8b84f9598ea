"""A request that is like one before has the verdict that it would have by itself."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from services import make_model

from api import worker
from api.remembered import Remembered
from api.served import _serve
from api.store import Store
from api.worker import Verdict
from cluster.likeness import likeness
from cluster.requests import DeploymentState, Published
from engine.local import LocalBackend
from polytrace.codec import to_json
from polytrace.graph import Constant, Graph, Invoke, NodeId, Op, Options, Port, Read, Ref, Request, Save, Site, Write
from polytrace.tensors import RawTensor
from polytrace.wire import encode_request

WHERE = "experiment.py:12"
PROMPT = (1, 2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alike")
    make_model(folder / "model")
    backend = LocalBackend(str(folder / "model"), name="m", threads=1)
    body = json.dumps(to_json(backend.describe())).encode()
    backend.close()
    store = Store(folder / "store")
    store.set_state("m", DeploymentState.STARTING, "")
    store.publish("m", Published(source=str(folder / "model"), dtype="auto", description=body, tokenizer=None))
    store.close()
    return folder


class Checking:
    """What a gateway remembers, before a checking process that is this one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = folder / "request"
        monkeypatch.setattr(worker, "_worker", worker._Worker(folder / "store", None))
        store = Store(folder / "store")
        published = store.published("m")
        store.close()
        assert published is not None
        self._served = _serve(published, 1)
        self._remembered = Remembered(self)  # type: ignore[arg-type]
        self.num_checked = 0

    def verdict(self, request: Request) -> Verdict:
        self._file.write_bytes(content(request))
        answer = self._remembered.check("m", self._served, self._file, contents=self._file.parent, certify=False)
        return asyncio.run(answer)

    async def check(self, model: str, version: str, path: Path, *, contents: Path, certify: bool) -> Verdict:
        self.num_checked += 1
        return worker._check(model, version, str(path), str(contents), certify)

    @property
    def num_remembered(self) -> int:
        return len(self._remembered._known)


@pytest.fixture
def checking(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Checking:
    return Checking(folder, monkeypatch)


def alone(folder: Path, request: Request) -> Verdict:
    with pytest.MonkeyPatch.context() as patch:
        return Checking(folder, patch).verdict(request)


def content(request: Request) -> bytes:
    return b"".join(bytes(part) for part in encode_request(request))


def raw(dtype: str, shape: tuple[int, ...], data: bytes) -> RawTensor:
    return RawTensor(dtype=dtype, shape=shape, data=memoryview(data))


def steered(vector: float, prompts: Sequence[tuple[int, ...]] = (PROMPT,), seed: int = 0) -> Request:
    """A constant is added to a layer's output of each prompt, and a later one is saved."""
    site, later = Site(module="model.layers.1", port=Port.OUTPUT), Site(module="model.layers.2", port=Port.OUTPUT)
    nodes: list[object] = []
    constants = {}
    for place, _ in enumerate(prompts):
        start = len(nodes)
        constants[f"v{place}"] = raw("float32", (32,), struct.pack("<32f", *[vector] * 32))
        nodes += [
            Read(site=site, invoke=place, where=WHERE),
            Constant(name=f"v{place}", where=WHERE),
            Op(name="add", args=(Ref(NodeId(start)), Ref(NodeId(start + 1))), where=WHERE),
            Write(site=site, invoke=place, value=Ref(NodeId(start + 2)), in_place=False, where=WHERE),
            Read(site=later, invoke=place, where=WHERE),
            Save(name=f"out{place}", value=Ref(NodeId(start + 4)), where=WHERE),
        ]
    return Request(
        graph=Graph(nodes=tuple(nodes)),  # type: ignore[arg-type]
        invokes=tuple(Invoke(sequences=(tokens,)) for tokens in prompts),
        constants=constants,
        options=Options(seed=seed),
    )


def chosen(places: tuple[int, ...]) -> Request:
    """Columns of a layer's output, by an integer constant: which rows run follows from its values."""
    data = struct.pack(f"<{len(places)}q", *places)
    nodes = (
        Read(site=Site(module="model.layers.1", port=Port.OUTPUT), invoke=0, where=WHERE),
        Constant(name="places", where=WHERE),
        Op(name="index_select", args=(Ref(NodeId(0)), 1, Ref(NodeId(1))), where=WHERE),
        Save(name="out", value=Ref(NodeId(2)), where=WHERE),
    )
    return Request(
        graph=Graph(nodes=nodes),
        invokes=(Invoke(sequences=(PROMPT,)),),
        constants={"places": raw("int64", (len(places),), data)},
    )


def masked(values: tuple[float, ...]) -> Request:
    """As many columns as a floating-point constant has positive values."""
    nodes = (
        Read(site=Site(module="model.layers.1", port=Port.OUTPUT), invoke=0, where=WHERE),
        Constant(name="values", where=WHERE),
        Op(name="gt", args=(Ref(NodeId(1)), 0), where=WHERE),
        Op(name="getitem", args=(Ref(NodeId(0)), (slice(None), Ref(NodeId(2)))), where=WHERE),
        Save(name="out", value=Ref(NodeId(3)), where=WHERE),
    )
    return Request(
        graph=Graph(nodes=nodes),
        invokes=(Invoke(sequences=(PROMPT,)),),
        constants={"values": raw("float32", (len(values),), struct.pack(f"<{len(values)}f", *values))},
    )


def test_other_tokens_vectors_and_seeds_are_worked_out_once(folder: Path, checking: Checking) -> None:
    like = [steered(1.0), steered(2.0), steered(2.0, [(60, 1, 60, 1, 60, 1)]), steered(1.0, seed=7)]
    verdicts = [checking.verdict(request) for request in like]
    assert checking.num_remembered == checking.num_checked == 1
    assert verdicts == [alone(folder, request) for request in like]
    assert verdicts[2].demand.request_bytes > verdicts[1].demand.request_bytes, "each its own size"


def test_what_a_verdict_follows_from_makes_another_one(folder: Path, checking: Checking) -> None:
    unlike = [chosen((0, 1)), chosen((4, 5)), chosen((5,)), steered(1.0), steered(1.0, [PROMPT[:5]])]
    verdicts = [checking.verdict(request) for request in unlike]
    assert checking.num_remembered == len(unlike)
    assert verdicts == [alone(folder, request) for request in unlike]


def test_what_values_may_decide_is_worked_out_each_time(folder: Path, checking: Checking) -> None:
    several = [(PROMPT, PROMPT), (PROMPT, (9, 9, 9, 9, 9, 9))]  # alike ones share their rows
    requests = [masked((1, -1, 1, -1, -1, -1)), masked((1, 1, 1, 1, 1, -1)), *(steered(1.0, two) for two in several)]
    verdicts = [checking.verdict(request) for request in requests]
    assert checking.num_remembered == 0
    assert verdicts == [alone(folder, request) for request in requests]
    assert [json.loads(one.facts or b"")[3]["shape"] for one in verdicts[:2]] == [[1, 2, 32], [1, 5, 32]]
    assert verdicts[2].work != verdicts[3].work


def test_tokens_and_bytes_of_like_requests_are_checked(checking: Checking) -> None:
    assert checking.verdict(steered(1.0)).error is None
    refused = checking.verdict(steered(1.0, [(1, 2, 3, 4, 5, 64)]))
    assert refused.error is not None and "64" in refused.error["message"]
    body = content(steered(1.0))
    for number in (1, 64, len(body) - 3):
        with pytest.raises(Exception, match=r"cut off|header|bytes"):
            likeness("m", "1", "lab~ada", body[:number])


def test_requests_of_another_owner_or_to_another_deployment_or_version_are_not_alike() -> None:
    body = content(steered(1.0))
    of = [("m", "1", "lab~ada"), ("m", "1", "lab~bob"), ("m", "2", "lab~ada"), ("n", "1", "lab~ada")]
    found = {likeness(*one, body) for one in of}
    assert len(found) == 4 and None not in found
