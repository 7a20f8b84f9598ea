"""A gateway over real HTTP with a real store, where the test itself is the controller."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from starlette.requests import Request as Call

from api.events import tokens_of
from api.gateway import Gateway
from api.identity import Identity
from api.served import Checker
from api.server import GatewayServer, bind
from api.settings import GatewaySettings
from api.store import Store
from api.worker import Answer, Verdict
from cluster.requests import DeploymentState, Finished, Published
from polytrace.certificate import Generated, Receipt, Token
from polytrace.codec import to_json
from polytrace.description import Limits, ModelDescription
from polytrace.errors import PolytraceError, WireError
from polytrace.graph import Constant, Graph, Invoke, NodeId, Ref, Request, Save
from polytrace.tensors import RawTensor
from polytrace.wire import encode_request, result_header
from scheduling.plan import RequestId
from scheduling.scheduler import Progress

ROOM = 8192
GENERATED = (
    Generated(invoke=0, sequence=0, ids=(5, 6, 7), finish="length"),
    Generated(
        invoke=0, sequence=1, ids=(8, 2), finish="eos", logprobs=(-0.5, float("-inf")), likeliest=((), ((2, -1.0),))
    ),
)
TOKENS = tokens_of(GENERATED)


class GatewayService:
    """`model` is what it serves, by the name "m", of `source`; `settled` are settings of the gateway."""

    def __init__(
        self,
        folder: Path,
        checker: Checker,
        model: ModelDescription,
        tokenizer: bytes | None = None,
        key: str | None = None,
        source: str = "none",
        database: str | None = None,
        objects: str | None = None,
        **settled: Any,
    ) -> None:
        self.store = Store(folder, database=database, objects=objects)
        settings = GatewaySettings(store=str(folder), max_wait_s=20.0, shutdown_s=1.0, **settled)
        self.gateway = Gateway(self.store, settings, checker, key)
        self.server = GatewayServer(self.gateway, settings)
        listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        body = json.dumps(to_json(model)).encode()
        self.store.set_state("m", DeploymentState.STARTING, "")
        self.store.publish("m", Published(source=source, dtype="auto", description=body, tokenizer=tokenizer))
        self.store.set_state("m", DeploymentState.READY, "ready")
        wait_until(lambda: self.http.get("/readyz").status_code == 200)

    def claim(self) -> RequestId:
        """The next request that comes."""
        found: list[RequestId] = []

        def look() -> bool:
            found.extend(claimed.request for claimed in self.store.claim("m", 1))
            return bool(found)

        wait_until(look)
        return found[0]

    def tell(self, request: RequestId, *tokens: Token, passes_done: int = 1) -> None:
        self.store.note_progress([Progress(request=request, passes_done=passes_done, passes=9, tokens=tokens)])

    def finish(
        self, request: RequestId, generated: Sequence[Generated] = (), error: PolytraceError | None = None
    ) -> None:
        if error is not None:
            self.store.finish([Finished(request=request, error=error)])
            return
        place = self.store.place_result(request, ROOM, 0)
        header = result_header([], receipt_of(request, generated), place.start)
        self.store.finish([Finished(request=request, header=header, generated=tuple(generated))])

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self._thread.join(timeout=10)
        self.store.close()


class Agreeable:
    """Takes every request."""

    def start(self) -> None: ...
    def close(self) -> None: ...
    async def warm(self, model: str, version: str) -> None: ...
    async def check(self, model: str, version: str, path: Path, *, contents: Path, certify: bool) -> Verdict:
        return Verdict(facts=b"[]")

    async def sites(self, model: str, version: str, asked: bytes) -> Answer:
        return Answer(error=WireError("nothing can be visited here").to_fields())

    async def nearest(
        self, model: str, version: str, path: Path, *, contents: Path, most: Mapping[str, int]
    ) -> str | None: ...


class Knowing(Gateway):
    """Knows who calls without a key."""

    def __init__(self, service: GatewayService, caller: Identity) -> None:
        super().__init__(service.store, service.gateway._settings, Agreeable())
        self._caller = caller

    async def _require_key(self, request: Call) -> None:
        request.state.caller = self._caller


def body(number: int = 1) -> bytes:
    """A request; another number is another request."""
    where = "experiment.py:1"
    request = Request(
        graph=Graph(nodes=(Constant(name="c", where=where), Save(name="out", value=Ref(NodeId(0)), where=where))),
        invokes=(Invoke(sequences=((1, 2, 3),)),),
        constants={"c": RawTensor(dtype="float32", shape=(1,), data=memoryview(bytes([number]) * 4))},
    )
    return b"".join(encode_request(request))


def submit(service: GatewayService) -> RequestId:
    """A request that runs."""
    posted = service.http.post("/v1/models/m/requests", content=body()).json()
    assert service.claim() == posted["id"]
    return RequestId(posted["id"])


def receipt_of(request: RequestId, generated: Sequence[Generated] = ()) -> Receipt:
    return Receipt(
        request=request,
        model="m",
        passes=(),
        tokens=3,
        token_layers=3,
        token_layers_alone=3,
        fired=(),
        pad_rows_written=0,
        read_bytes=0,
        result_bytes=0,
        carried_bytes=0,
        gathered_bytes=0,
        queue_seconds=0.0,
        run_seconds=0.0,
        notes=(),
        generated=tuple(generated),
    )


def description_of_nothing() -> ModelDescription:
    """A model without modules."""
    return ModelDescription(
        name="m",
        class_name="TinyForCausalLM",
        dtype="float32",
        vocab_size=10,
        hidden_size=4,
        num_layers=1,
        layers="model.layers",
        stages=1,
        ranks=1,
        fingerprint="f",
        config={"model_type": "tiny"},
        modules=(),
        sites=(),
        parameters=(),
        limits=Limits(max_sequence_tokens=16, max_request_bytes=1 << 20),
        key_value_bytes=1,
        hidden_bytes=1,
        row_multiple=1,
        has_kept_rows=True,
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def events_of(lines: Sequence[str]) -> list[tuple[str, str, Any]]:
    """Id, kind and data of what server-sent lines say."""
    found: list[tuple[str, str, Any]] = []
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            found.append((fields["id"], fields["event"], json.loads(fields["data"])))
            fields = {}
    return found
