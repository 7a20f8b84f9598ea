"""Edits that a service keeps by name: in the store for several owners, and over real HTTP with a real worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from small import WIDTH, small_llama

import polytrace
from api.database import Database, open_database
from api.edits import MAX_BYTES, KeptEdits, Limits
from api.gateway import Gateway
from api.server import GatewayServer, bind
from api.settings import GatewaySettings
from api.store import Store
from api.worker import CheckerPool
from cluster.requests import DeploymentState, Published
from engine.local import LocalBackend
from polytrace.codec import to_json
from polytrace.edits.sets import EditSet, encode_edits
from polytrace.errors import ConflictError, GraphError, NotFoundError, TooLargeError, WireError
from polytrace.graph import Node, NodeId, Op, Port, Read, Ref, Save, Site, Write
from polytrace.model import Model
from polytrace.wire import encode_request

ADA, BOB, EVE = "lab~ada", "lab~bob", "labs~eve"  # Eve is of another tenant
IDS = [3, 17, 42, 5]
KEY = "sesame"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = open_database(database_url)
    yield made
    made.close()


def test_an_edit_is_its_owners_alone_until_it_is_shared(database: Database) -> None:
    kept = KeptEdits(database)
    assert kept.put("m", ADA, "mine", b"1", is_shared=False) == 1
    with pytest.raises(NotFoundError, match="no edit 'mine' here; there are none"):
        kept.get("m", BOB, "mine", None)
    assert kept.known("m", BOB) == []
    assert kept.put("m", BOB, "mine", b"2", is_shared=False) == 1  # names are each owner's own
    assert kept.put("m", ADA, "ours", b"3", is_shared=True) == 1
    assert kept.get("m", BOB, "ours", None) == (1, b"3")
    assert kept.known("m", EVE) == []
    with pytest.raises(NotFoundError, match="no edit 'ours' here; there are none"):
        kept.get("m", EVE, "ours", None)
    assert kept.put("m", EVE, "ours", b"e", is_shared=True) == 1  # a name that is taken elsewhere
    assert [(known.name, known.is_shared, known.is_own) for known in kept.known("m", BOB)] == [
        ("mine", False, True),
        ("ours", True, False),
    ]
    with pytest.raises(NotFoundError):
        kept.delete("m", BOB, "ours", None)
    with pytest.raises(ConflictError, match="somebody shares an edit 'ours'"):
        kept.put("m", BOB, "ours", b"4", is_shared=True)
    kept.put("m", BOB, "ours", b"5", is_shared=False)
    assert kept.get("m", BOB, "ours", None) == (1, b"5")  # one's own before others'
    assert kept.get("m", ADA, "ours", None) == (1, b"3")
    with pytest.raises(NotFoundError, match="there are none"):
        kept.get("other", ADA, "mine", None)


def test_versions_count_up_whatever_is_deleted(database: Database) -> None:
    kept = KeptEdits(database)
    assert [kept.put("m", ADA, "e", bytes([number]), is_shared=False) for number in range(3)] == [1, 2, 3]
    kept.delete("m", ADA, "e", 3)
    assert kept.get("m", ADA, "e", None) == (2, b"\1")
    assert kept.put("m", ADA, "e", b"x", is_shared=False) == 4
    kept.delete("m", ADA, "e", None)
    assert kept.known("m", ADA) == []
    with pytest.raises(NotFoundError, match="no version 4 of edit 'e'"):
        kept.get("m", ADA, "e", 4)
    assert KeptEdits(database).put("m", ADA, "e", b"y", is_shared=False) == 5


def test_an_owner_keeps_so_many_and_so_much(database: Database) -> None:
    kept = KeptEdits(database, Limits(versions=3, num_bytes=10))
    kept.put("m", ADA, "a", b"12345678", is_shared=False)
    with pytest.raises(TooLargeError, match="would take 11 bytes; one owner has 10"):
        kept.put("m", ADA, "b", b"123", is_shared=False)
    kept.put("m", ADA, "b", b"1", is_shared=False)
    kept.put("other", ADA, "b", b"1", is_shared=False)
    with pytest.raises(TooLargeError, match="3 versions of edits are kept, the most"):
        kept.put("m", ADA, "c", b"", is_shared=False)
    kept.put("m", BOB, "b", b"12345678", is_shared=False)
    kept.delete("m", ADA, "a", 1)
    kept.put("m", ADA, "c", b"12345678", is_shared=False)


class Service:
    """A gateway with real workers, and nobody who runs what it takes."""

    def __init__(self, folder: Path) -> None:
        small_llama().save_pretrained(folder / "model")
        self.local = LocalBackend(str(folder / "model"), threads=1, name="m")
        self.store = Store(folder / "store")
        self.checker = CheckerPool(self.store.folder, 1)
        settings = GatewaySettings(store=str(self.store.folder))
        self.server = GatewayServer(Gateway(self.store, settings, self.checker, KEY), settings)
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        self.publish(str(folder / "model"))

    def publish(self, source: str) -> None:
        body = json.dumps(to_json(self.local.describe())).encode()
        self.store.set_state("m", DeploymentState.STARTING, "loading")
        self.store.publish("m", Published(source=source, dtype="auto", description=body, tokenizer=None))
        self.store.set_state("m", DeploymentState.READY, "ready")
        deadline = time.monotonic() + 60
        while self.http.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def post(self, name: str, data: bytes) -> httpx.Response:
        return self.http.post(f"/v1/models/m/edits/{name}", content=data)

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(timeout=10)
        self.store.close()
        self.local.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("service"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(service: Service) -> Any:
    return polytrace.connect(service.url, "m", key=KEY)


def test_an_edit_kept_over_http_is_what_other_clients_traces_start_from(service: Service, model: Any) -> None:
    vector = torch.randn(WIDTH)
    with model.edit("happy", shared=True) as edited:
        model.model.layers[1].output[0][:, -1] += vector
    with edited.trace(IDS, run=False) as tracer:
        edited.lm_head.output.save()
    other = polytrace.connect(service.url, "m", key=KEY)
    with other.trace(IDS, edits=["happy"], run=False) as again:
        other.lm_head.output.save()
    assert again.request.graph.nodes[:-2] == tracer.request.graph.nodes[:-2]
    assert other.validate(again).edits == ("happy@1",)
    (known,) = other.edits()
    assert (known.name, known.version, known.is_shared, known.is_own) == ("happy", 1, True, True)
    result = service.local.run(again.request)  # nobody runs requests here: what was sent, in this process
    here: Any = Model(service.local)
    with here.trace(IDS):
        logits = here.lm_head.output.save()
    assert result.receipt.edits == ("happy@1",)
    assert (result.values["0"] - logits).abs().max() > 0.1


def test_the_newest_version_is_asked_for_each_time_and_fetched_when_it_is_another(service: Service, model: Any) -> None:
    for factor in (2.0, 3.0):
        with model.edit("scaled"):
            model.model.layers[1].output[0][:] *= factor
        for _ in range(2):
            with model.trace(IDS, edits=["scaled"], run=False) as tracer:
                model.lm_head.output.save()
            assert factor in [node.args[1] for node in tracer.request.graph.nodes if isinstance(node, Op)]
    answer = service.http.get("/v1/models/m/edits/scaled")
    tag = answer.headers["ETag"]
    assert tag.startswith('"2-')
    assert service.http.get("/v1/models/m/edits/scaled", headers={"If-None-Match": tag}).status_code == 304
    model.delete_edit("scaled", version=2)
    with model.trace(IDS, edits=["scaled"], run=False) as tracer:
        model.lm_head.output.save()
    assert tracer.request.options.edits == ("scaled@1",)
    model.delete_edit("scaled")
    with pytest.raises(NotFoundError, match="no edit 'scaled'"):
        model.edited("scaled")


def test_what_is_no_edit_of_this_model_is_refused_before_it_is_kept(service: Service, model: Any) -> None:
    where = "mine.py:3"

    def edit(site: Site, *more: Node) -> bytes:
        write = Write(site=site, invoke=0, value=Ref(NodeId(0)), in_place=False, where=where)
        return encode_edits(
            EditSet(label="", nodes=(Read(site=site, invoke=0, where=where), write, *more), constants={})
        )

    good = Site(module="model.layers.1", port=Port.OUTPUT)
    refused = {
        "no layer": (edit(Site(module="model.layers.9", port=Port.OUTPUT)), 422, "this model has layers 0-3"),
        "a save": (edit(good, Save(name="0", value=Ref(NodeId(0)), where=where)), 422, "gives nothing back"),
        "cut off": (edit(good)[:-9], 400, ""),
        "no edit": (b"x" * 100, 400, ""),
        "too large": (b"x" * (MAX_BYTES + 1), 413, str(MAX_BYTES)),
    }
    with model.trace(IDS, run=False) as tracer:
        model.lm_head.output.save()
    refused["a request"] = (b"".join(encode_request(tracer.request)), 400, "no prompts of its own")
    for what, (data, status, told) in refused.items():
        answer = service.post("bad", data)
        assert (answer.status_code, told in answer.json()["detail"]) == (status, True), (what, answer.text)
    assert service.post("bad name", edit(good)).status_code == 422
    assert service.http.get("/v1/models/m/edits/bad").status_code == 404
    assert service.http.get("/v1/models/other/edits").status_code == 404
    assert httpx.get(f"{service.url}/v1/models/m/edits").status_code == 401
    assert service.post("bad", edit(good)).json() == {"name": "bad", "version": 1}
    model.delete_edit("bad")
    assert not list((service.store.folder / "requests").iterdir())
    for error in (GraphError, WireError):  # what clients see is what the service said
        with pytest.raises(error):
            model.shelf.put("bad", refused["a save" if error is GraphError else "cut off"][0], is_shared=False)
