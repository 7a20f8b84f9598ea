"""What a caller tries who wants to see, take or break more than is his; the service says no, and why."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import Agreeable, GatewayService, body, description_of_nothing
from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import Message

from api.admission import Admission
from api.identity import LOCAL, Identity, Role
from api.limits import TenantLimits, text_of
from api.settings import GatewaySettings, checked_spec
from api.store import Store
from api.uploads import receive
from api.wishes import ChatWish, CompletionWish
from cluster.config import DeploymentSpec
from cluster.requests import DeploymentState
from polytrace.errors import PolytraceError, UserError, WireError


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayService]:
    folder = tmp_path_factory.mktemp("hostile") / "store"
    service = GatewayService(folder, Agreeable(), description_of_nothing(), asks_key=True)
    service.store.tenants.add("vision", LOCAL)
    service.store.tenants.add("audio", LOCAL, models=("elsewhere",))
    yield service
    service.close()


def caller(service: GatewayService, tenant: str, role: Role = Role.USER) -> httpx.Client:
    user = "ops" if role is Role.OPERATOR else "ann"
    secret = service.store.keys.make(tenant, user, LOCAL, role=role)[1]
    return httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {secret}"}, timeout=20)


def test_the_limits_of_a_deployment_are_not_there_for_who_may_not_use_it(service: GatewayService) -> None:
    with caller(service, "vision") as ours, caller(service, "audio") as theirs:
        assert ours.get("/v1/models/m/limits").status_code == 200
        assert ours.get("/v1/models/none/limits").status_code == 404
        secret, unknown = theirs.get("/v1/models/m/limits"), theirs.get("/v1/models/x/limits")
        assert (secret.status_code, unknown.status_code) == (404, 404)
        assert secret.json()["detail"].replace("'m'", "") == unknown.json()["detail"].replace("'x'", "")


def test_why_a_deployment_is_not_ready_is_told_to_operators_alone(service: GatewayService) -> None:
    service.store.set_state("hidden", DeploymentState.FAILED, "there is nothing at /models/hidden")
    at, unknown = "/readyz?model=hidden", "/readyz?model=unknown"
    with caller(service, "default", Role.OPERATOR) as operator, caller(service, "vision") as user:
        for _ in range(100):
            if "/models/hidden" in operator.get(at).text:
                break
        assert "/models/hidden" in operator.get(at).json()["detail"]
        for told in (user.get(at), httpx.get(service.url + at), httpx.get(service.url + unknown)):
            assert told.status_code == 503 and told.json()["detail"] == "what was asked for takes no requests now"


def test_nothing_is_read_of_a_body_whose_sender_has_no_key(service: GatewayService) -> None:
    host, port = service.url.removeprefix("http://").split(":")
    for path in ("/v1/keys", "/v1/constants/missing", "/v1/models/m/sites", "/v1/models/m/requests"):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 8000000\r\n\r\n"
        with socket.create_connection((host, int(port)), timeout=10) as sender:
            sender.sendall(head.encode() + b"{")
            assert b" 401 " in sender.recv(100), path


def test_nobody_is_sent_on_to_an_address_of_the_callers(service: GatewayService) -> None:
    with caller(service, "vision") as user:
        answer = user.get("/v1/models/", headers={"Host": "elsewhere.example"})
        assert answer.status_code == 404 and "location" not in answer.headers


def test_the_name_of_a_tenant_in_a_header_is_a_name(service: GatewayService) -> None:
    with caller(service, "default", Role.OPERATOR) as operator:
        for tenant in ("\r\nX-A: 1", "€", 'a"b'):
            answer = operator.get("/v1/usage", params={"tenant": tenant, "format": "csv"})
            assert answer.status_code == 400 and "cannot be a tenant's name" in answer.json()["detail"]
        assert operator.get("/v1/usage", params={"tenant": "vision", "format": "csv"}).status_code == 200


def test_a_limit_that_an_operator_sets_holds_at_once(service: GatewayService) -> None:
    with caller(service, "default", Role.OPERATOR) as operator, caller(service, "vision") as user:
        first = user.post("/v1/models/m/requests", content=body())
        assert first.status_code == 202
        operator.patch("/v1/tenants/vision", json={"limits": {"requests_in_flight": 1}}).raise_for_status()
        assert user.post("/v1/models/m/requests", content=body()).status_code == 429
        user.delete(f"/v1/requests/{first.json()['id']}")
        operator.patch("/v1/tenants/vision", json={"limits": {"requests_in_flight": None}}).raise_for_status()


def test_of_many_who_come_at_once_to_a_new_gateway_a_rate_takes_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    look = store.allowances.accepted_since

    def slow(since: float, **whose: str) -> int:
        time.sleep(0.2 if "model" in whose else 0.0)  # as a busy disk may be
        return look(since, **whose)

    monkeypatch.setattr(store.allowances, "accepted_since", slow)
    store.want(DeploymentSpec(source="none", name="m"))
    store.tenants.add("lab", LOCAL, limits={"requests_a_minute": 5})
    store.limit_deployment("m", text_of(TenantLimits(requests_a_minute=1000)))
    admission = Admission(store, GatewaySettings(store=str(tmp_path / "store")), Agreeable())
    ann = Identity(tenant="lab", user="ann")

    async def come() -> list[Any]:
        return await asyncio.gather(*(admission.begin(ann, "m") for _ in range(20)), return_exceptions=True)

    refused = [one for one in asyncio.run(come()) if isinstance(one, PolytraceError)]
    store.close()
    assert len(refused) == 19, "a bucket begins with one"


@pytest.mark.parametrize(
    ("kind", "wish"),
    [
        (CompletionWish, {"prompt": "\ud800"}),
        (CompletionWish, {"prompt": ["a", "b\udfff"]}),
        (ChatWish, {"messages": [{"role": "user", "content": "\ud800"}]}),
        (ChatWish, {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"a": "\ud800"}}),
    ],
)
def test_half_a_character_is_refused_by_its_field(kind: type[CompletionWish | ChatWish], wish: dict[str, Any]) -> None:
    wish = json.loads(json.dumps({"model": "m"} | wish))
    with pytest.raises(ValidationError, match="unpaired surrogate"):
        kind.model_validate(wish)


def test_no_shard_offloads_fewer_than_no_bytes() -> None:
    with pytest.raises(UserError, match="offload_bytes is -5"):
        checked_spec(DeploymentSpec(source="none", name="m", offload_bytes=-5))


def test_an_upload_that_drips_for_ever_is_ended(tmp_path: Path) -> None:
    async def drip() -> Message:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def take() -> None:
        call = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, drip)
        await asyncio.wait_for(receive(call, tmp_path / "upload", max_bytes=1 << 20, idle_s=0.1), 10)

    with pytest.raises(WireError, match="slower than 1024 a second"):
        asyncio.run(take())
