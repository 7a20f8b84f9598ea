"""Who sees what over HTTP: two tenants and an operator on one gateway. What is somebody else's is not there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import TOKENS, Agreeable, GatewayService, description_of_nothing, wait_until

from api.access import KNOWN_S, Access
from api.audit import Entry
from api.database import open_database
from api.identity import LOCAL, Identity, Role
from api.keys import Keys
from api.status import RequestState
from api.tenants import Tenants
from cluster.requests import DeploymentState, Published
from polytrace.contents import digest_of
from polytrace.graph import Constant, Graph, Invoke, NodeId, Ref, Request, Save
from polytrace.tensors import RawTensor
from polytrace.wire import content_header, encode_request
from scheduling.plan import RequestId

SEEN = {"ada": 200, "operator": 200, "bob": 404, "carl": 404, "nobody": 401, "wrong": 401, "expired": 401}


class Callers:
    """Ada and Bob are of one tenant, Carl is of another one, which may use the deployment "m" only."""

    def __init__(self, service: GatewayService) -> None:
        tenants, keys = service.store.tenants, service.store.keys
        tenants.add("vision", LOCAL)
        tenants.add("audio", LOCAL, models=("m",))
        secrets = {
            "ada": keys.make("vision", "ada", LOCAL)[1],
            "bob": keys.make("vision", "bob", LOCAL)[1],
            "carl": keys.make("audio", "carl", LOCAL)[1],
            "operator": keys.make("default", "ops", LOCAL, role=Role.OPERATOR)[1],
            "expired": keys.make("vision", "ada", LOCAL, expires=time.time() + 0.01)[1],
            "wrong": f"pt_0123456789ab_{'x' * 43}",
            "nobody": None,
        }
        self.secrets = {name: str(secret) for name, secret in secrets.items()}
        time.sleep(0.02)
        self.http = {
            name: httpx.Client(
                base_url=service.url, headers={"Authorization": f"Bearer {secret}"} if secret else {}, timeout=20
            )
            for name, secret in secrets.items()
        }

    def statuses(self, method: str, path: str, **more: Any) -> dict[str, int]:
        """How everybody is answered."""
        return {name: client.request(method, path, **more).status_code for name, client in self.http.items()}

    def __getitem__(self, name: str) -> httpx.Client:
        return self.http[name]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayService]:
    folder = tmp_path_factory.mktemp("access") / "store"
    service = GatewayService(folder, Agreeable(), description_of_nothing(), tokenizer=b"{}", asks_key=True)
    service.store.set_state("large", DeploymentState.STARTING, "")
    body = service.store.published("m")
    assert body is not None
    service.store.publish(
        "large", Published(source="none", dtype="auto", description=body.description, tokenizer=b"{}")
    )
    service.store.set_state("large", DeploymentState.READY, "ready")
    wait_until(lambda: service.http.get("/readyz", params={"model": "large"}).status_code == 200)
    yield service
    service.close()


@pytest.fixture(scope="module")
def callers(service: GatewayService) -> Iterator[Callers]:
    callers = Callers(service)
    yield callers
    for client in callers.http.values():
        client.close()


def submitted(callers: Callers, name: str = "ada") -> RequestId:
    posted = callers[name].post("/v1/models/m/requests", content=body())
    assert posted.status_code == 202, posted.text
    return RequestId(posted.json()["id"])


def test_everybody_is_who_the_key_says(callers: Callers) -> None:
    told = {name: callers[name].get("/v1/whoami").json() for name in ("ada", "bob", "carl", "operator")}
    who = {name: (one["tenant"], one["user"], one["role"], one["models"]) for name, one in told.items()}
    assert who == {
        "ada": ("vision", "ada", "user", None),
        "bob": ("vision", "bob", "user", None),
        "carl": ("audio", "carl", "user", ["m"]),
        "operator": ("default", "ops", "operator", None),
    }
    assert told["ada"]["key"] == callers.secrets["ada"][:15]


def test_a_call_without_a_good_key_is_refused_everywhere_but_at_its_health(
    service: GatewayService, callers: Callers
) -> None:
    described = service.http.get("/openapi.json").json()["paths"]
    assert len(described) > 30
    for path, methods in described.items():
        if path in ("/healthz", "/readyz"):
            continue
        for method in methods:
            for name in ("nobody", "wrong", "expired"):
                at = path.replace("{", "").replace("}", "")
                answer = callers[name].request(method, at, json={})
                assert answer.status_code == 401, (method, path, name, answer.text)
                assert answer.headers["www-authenticate"] == "Bearer" or "/completions" in path
    expired = callers["expired"].get("/v1/whoami").json()
    assert expired["code"] == "key-refused" and "expired at" in expired["detail"]
    assert "does not know the key" in callers["wrong"].get("/v1/whoami").json()["detail"]
    assert "POLYTRACE_KEY" in callers["nobody"].get("/v1/whoami").json()["detail"]


def test_a_request_is_its_owners_and_operators_alone(service: GatewayService, callers: Callers) -> None:
    request = submitted(callers)
    assert callers.statuses("GET", f"/v1/requests/{request}") == SEEN
    assert callers.statuses("GET", f"/v1/requests/{request}/result") == {
        name: 202 if code == 200 else code for name, code in SEEN.items()
    }
    status = callers["operator"].get(f"/v1/requests/{request}").json()
    assert (status["tenant"], status["user"], status["state"]) == ("vision", "ada", "queued")
    for name in ("bob", "carl"):
        unknown = callers[name].get(f"/v1/requests/{'0' * 32}").json()["detail"].replace("0" * 32, "ID")
        assert callers[name].get(f"/v1/requests/{request}").json()["detail"].replace(request, "ID") == unknown
        assert callers[name].delete(f"/v1/requests/{request}").status_code == 404
        assert callers[name].get(f"/v1/requests/{request}/events").status_code == 404
        assert callers[name].get(f"/v1/requests/{request}", params={"wait": 5}).status_code == 404
        assert callers[name].head(f"/v1/requests/{request}/result").status_code == 404
    assert service.claim() == request
    service.tell(request, *TOKENS)
    service.finish(request)
    assert callers.statuses("GET", f"/v1/requests/{request}") == SEEN
    assert callers.statuses("GET", f"/v1/requests/{request}/result") == SEEN
    assert callers.statuses("GET", f"/v1/requests/{request}/events") == SEEN
    assert callers.statuses("GET", f"/v1/requests/{request}/events", headers={"Last-Event-ID": "end"}) == {
        name: 204 if code == 200 else code for name, code in SEEN.items()
    }
    assert callers["ada"].get(f"/v1/requests/{request}/events").text == (
        callers["operator"].get(f"/v1/requests/{request}/events").text
    )
    assert "event: token" in callers["ada"].get(f"/v1/requests/{request}/events").text


def test_an_operator_may_cancel_anybodys_request_and_another_user_may_not(
    service: GatewayService, callers: Callers
) -> None:
    request = submitted(callers)
    assert callers["bob"].delete(f"/v1/requests/{request}").status_code == 404
    before = service.store.status(request)
    assert before is not None and before.state is RequestState.QUEUED
    assert callers["operator"].delete(f"/v1/requests/{request}").json()["state"] == "cancelled"


def test_contents_kept_values_and_states_are_each_users_own(callers: Callers) -> None:
    data = memoryview(b"\1\2\3\4")
    digest = digest_of("float32", (1,), data)
    content = content_header("float32", (1,)) + bytes(data)
    assert callers["ada"].put(f"/v1/constants/{digest}", content=content).status_code == 201
    assert callers.statuses("GET", f"/v1/constants/{digest}") == SEEN | {"operator": 404}, "it is not the operator's"
    missing = {
        name: callers[name].post("/v1/constants/missing", json={"hashes": [digest]}).json()["missing"]
        for name in ("ada", "bob", "carl", "operator")
    }
    assert missing == {"ada": [], "bob": [digest], "carl": [digest], "operator": [digest]}
    state = {"hash": digest, "dtype": "float32", "shape": [1]}
    assert callers["bob"].put("/v1/states/mine", json=state).status_code == 409
    assert callers["ada"].put("/v1/states/mine", json=state).status_code == 200
    for path in ("/v1/states/mine", "/v1/states/mine/content"):
        assert callers.statuses("GET", path) == SEEN | {"operator": 404}
    assert callers["bob"].get("/v1/states").json() == {"entries": []}
    assert callers["bob"].delete("/v1/states/mine").status_code == 404
    assert len(callers["ada"].get("/v1/states").json()["entries"]) == 1


def test_an_operator_names_whose_things_and_nobody_else_may(callers: Callers) -> None:
    data = memoryview(b"\1\2\3\5")
    digest = digest_of("float32", (1,), data)
    callers["ada"].put(f"/v1/constants/{digest}", content=content_header("float32", (1,)) + bytes(data))
    callers["ada"].put("/v1/states/hers", json={"hash": digest, "dtype": "float32", "shape": [1]})
    adas = {"owner": "vision/ada"}
    assert callers.statuses("GET", "/v1/states/hers", params=adas) == SEEN
    assert callers.statuses("GET", "/v1/states/hers/content", params=adas) == SEEN
    assert callers.statuses("GET", f"/v1/constants/{digest}", params=adas) == SEEN
    for owner in ("vision~ada", "../ada", "vision/../ada", "vision/ada/..", "", "/"):
        assert callers["operator"].get("/v1/states", params={"owner": owner}).status_code == 400, owner
    other = callers["operator"].put(
        "/v1/states/hers", params=adas, json={"hash": digest, "dtype": "float32", "shape": [1]}
    )
    assert other.status_code == 409, "nobody puts things among another's"
    assert callers["carl"].delete("/v1/states/hers", params=adas).status_code == 404
    assert callers["operator"].delete("/v1/states/hers", params=adas).status_code == 204
    assert callers["ada"].get("/v1/states/hers").status_code == 404


def test_edits_are_ones_own_or_shared_in_the_tenant(service: GatewayService, callers: Callers) -> None:
    service.store.edits.put("m", "vision~ada", "private", b"1", is_shared=False)
    service.store.edits.put("m", "vision~ada", "shared", b"2", is_shared=True)
    at = "/v1/models/m/edits"
    assert callers.statuses("GET", f"{at}/private") == SEEN | {"operator": 404}
    assert callers.statuses("GET", f"{at}/private", params={"owner": "vision/ada"}) == SEEN
    assert callers.statuses("GET", f"{at}/shared") == SEEN | {"bob": 200, "operator": 404}
    names = {name: [one["name"] for one in callers[name].get(at).json()["edits"]] for name in ("ada", "bob", "carl")}
    assert names == {"ada": ["private", "shared"], "bob": ["shared"], "carl": []}
    assert callers["bob"].delete(f"{at}/shared").status_code == 404
    assert callers["ada"].delete(f"{at}/shared").status_code == 200


def test_a_tenant_sees_and_uses_its_deployments_only(callers: Callers) -> None:
    def models(name: str) -> list[str]:
        answer = callers[name].get("/v1/models").json()
        assert [one["id"] for one in answer["data"]] == [one["name"] for one in answer["models"]]
        return [one["name"] for one in answer["models"]]

    assert models("ada") == models("operator") == ["large", "m"]
    assert models("carl") == ["m"]
    for method, path in (
        ("GET", ""),
        ("GET", "/tokenizer"),
        ("GET", "/edits"),
        ("GET", "/edits/e"),
        ("POST", "/edits/e"),
        ("DELETE", "/edits/e"),
        ("POST", "/validate"),
        ("POST", "/sites"),
        ("POST", "/requests"),
    ):
        answer = callers["carl"].request(method, f"/v1/models/large{path}", content=body())
        assert answer.status_code == 404 and answer.json()["detail"] == "there is no model 'large' here; there is m"
    assert callers["ada"].get("/v1/models/large").status_code == 200
    wish = {"model": "large", "prompt": "a"}
    refused = callers["carl"].post("/v1/completions", json=wish)
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"
    chat = {"model": "large", "messages": [{"role": "user", "content": "a"}]}
    assert callers["carl"].post("/v1/chat/completions", json=chat).status_code == 404
    assert callers["wrong"].post("/v1/completions", json=wish).json()["error"]["code"] == "invalid_api_key"


def test_deployments_tenants_and_the_audit_log_are_for_operators(service: GatewayService, callers: Callers) -> None:
    calls = [
        ("PUT", "/v1/models/new", {"source": "none"}),
        ("PUT", "/v1/models/new", {"source": "none", "stages": -1}),
        ("PATCH", "/v1/models/m", {"replicas": 2}),
        ("POST", "/v1/models/m/drain", None),
        ("DELETE", "/v1/models/m", None),
        ("GET", "/v1/tenants", None),
        ("GET", "/v1/tenants/vision", None),
        ("PUT", "/v1/tenants/mine", {}),
        ("PATCH", "/v1/tenants/vision", {"weight": 100}),
        ("DELETE", "/v1/tenants/audio", None),
        ("GET", "/v1/tenants/vision/users", None),
        ("PUT", "/v1/tenants/vision/users/ada", {"role": "operator"}),
        ("GET", "/v1/audit", None),
        ("GET", "/v1/keys?tenant=audio", None),
        ("GET", "/v1/keys?user=bob", None),
        ("POST", "/v1/keys", {"tenant": "audio"}),
        ("POST", "/v1/keys", {"user": "bob"}),
        ("POST", "/v1/keys", {"role": "operator"}),
    ]
    before = service.store.audit.entries(limit=1)[0].seq
    for method, path, wish in calls:
        answer = callers["ada"].request(method, path, json=wish)
        assert answer.status_code == 403 and answer.json()["code"] == "forbidden", (method, path, answer.text)
    assert service.store.deployment("new") is None
    assert callers["ada"].get("/v1/whoami").json()["role"] == "user"

    def refused() -> list[Entry]:
        return [one for one in service.store.audit.entries(limit=1000) if one.seq > before]

    wait_until(lambda: sum(one.details["times"] for one in refused()) == len(calls))
    assert {(one.act, one.actor, one.details["key"]) for one in refused()} == {
        ("refused", "vision/ada", callers.secrets["ada"][:15])
    }
    assert ("PUT /v1/models/new", 2) in [(one.subject, one.details["times"]) for one in refused()]
    assert "others" in [one.subject for one in refused()], "no more than a few entries at once"


def test_a_monitor_reads_figures_of_everybody_and_can_do_nothing_else(
    service: GatewayService, callers: Callers
) -> None:
    _, secret = service.store.keys.make("audio", "prometheus", LOCAL, role=Role.MONITOR)
    submitted(callers)
    described = service.http.get("/openapi.json").json()["paths"]
    figures = {"/metrics", "/v1/models", "/v1/usage", "/v1/whoami", "/v1/drain"}
    with httpx.Client(base_url=service.url, headers=bearer(secret), timeout=20) as monitor:
        for path, methods in described.items():
            for method in set(methods) - ({"get"} if path in figures | {"/healthz", "/readyz"} else set()):
                answer = monitor.request(method, path.replace("{", "").replace("}", ""), json={})
                assert answer.status_code == 403, (method, path, answer.text)
                assert "is a monitor" in answer.text
        assert monitor.get("/v1/whoami").json()["role"] == "monitor"
        assert {one["name"] for one in monitor.get("/v1/models").json()["models"]} >= {"m", "large"}, (
            "not audio's alone"
        )
        assert 'polytrace_requests{class="batch",model="m",state="queued"}' in monitor.get("/metrics").text
        assert monitor.get("/v1/usage", params={"tenant": "vision"}).status_code == 200
        assert monitor.get("/v1/drain").json()["queued"] >= 1
        service.store.draining.begin("default/ops")
        assert "drained" in monitor.get("/readyz").json()["detail"]
        assert "drained" not in callers["ada"].get("/readyz").json()["detail"]
        service.store.draining.end()


def test_what_operators_do_is_done_and_written_down(service: GatewayService, callers: Callers) -> None:
    ops = callers["operator"]
    assert ops.put("/v1/tenants/genes", json={"weight": 3, "limits": {"passes": 5}}).status_code == 201
    assert ops.put("/v1/tenants/genes", json={}).status_code == 409
    assert ops.patch("/v1/tenants/genes", json={"models": ["m"], "limits": {"passes": None}}).status_code == 200
    assert ops.get("/v1/tenants/genes").json()["weight"] == 3
    for wrong in ({"weight": 0}, {"weight": "much"}, {"limits": {"luck": 1}}, {"limits": {"passes": 1.5}}, {"x": 1}):
        assert ops.patch("/v1/tenants/genes", json=wrong).status_code == 400, wrong
    assert ops.put("/v1/tenants/genes/users/dora", json={"role": "operator"}).json()["role"] == "operator"
    made = ops.post("/v1/keys", json={"tenant": "genes", "user": "dora", "expires_in_s": 60}).json()
    assert httpx.get(f"{service.url}/v1/whoami", headers=bearer(made["secret"])).json()["role"] == "operator"
    assert ops.put("/v1/models/new", json={"source": "none"}).status_code == 202
    assert ops.request("DELETE", "/v1/models/new", params={"now": True}).status_code == 202
    assert ops.delete("/v1/tenants/genes").status_code == 204
    assert httpx.get(f"{service.url}/v1/whoami", headers=bearer(made["secret"])).status_code == 401
    entries = ops.get("/v1/audit", params={"limit": 7}).json()["entries"]
    acts = [(one["act"], one["subject"], one["actor"]) for one in reversed(entries)]
    assert acts == [
        ("tenants.add", "genes", "default/ops"),
        ("tenants.change", "genes", "default/ops"),
        ("users.set", "genes/dora", "default/ops"),
        ("keys.make", made["prefix"], "default/ops"),
        ("models.deploy", "new", "default/ops"),
        ("models.remove", "new", "default/ops"),
        ("tenants.remove", "genes", "default/ops"),
    ]
    assert entries[1]["details"] == {"now": True, "key": callers.secrets["operator"][:15]}
    assert made["secret"] not in str(ops.get("/v1/audit", params={"limit": 1000}).json())


def test_users_make_list_rotate_and_revoke_their_own_keys(service: GatewayService, callers: Callers) -> None:
    ada, bob = callers["ada"], callers["bob"]
    made = ada.post("/v1/keys", json={"label": "ci", "expires_in_s": 3600}).json()
    assert (made["tenant"], made["user"], made["label"]) == ("vision", "ada", "ci")
    assert made["prefix"] in [one["prefix"] for one in ada.get("/v1/keys").json()["keys"]]
    for name, sees in (("bob", False), ("carl", False), ("operator", True)):
        found = callers[name].get("/v1/keys").json()["keys"]
        assert (made["prefix"] in [one["prefix"] for one in found]) is sees
        assert all("secret" not in one and "hash" not in one for one in found)
    assert bob.delete(f"/v1/keys/{made['prefix']}").status_code == 404
    assert bob.post(f"/v1/keys/{made['prefix']}/rotate").status_code == 404
    turned = ada.post(f"/v1/keys/{made['prefix']}/rotate").json()
    with httpx.Client(base_url=service.url) as client:
        assert client.get("/v1/whoami", headers=bearer(made["secret"])).status_code == 401
        assert client.get("/v1/whoami", headers=bearer(turned["secret"])).json()["user"] == "ada"
        assert ada.delete(f"/v1/keys/{turned['prefix']}").json()["revoked"] > 0
        refused = client.get("/v1/whoami", headers=bearer(turned["secret"]))
        assert refused.status_code == 401 and "was revoked" in refused.json()["detail"], "at once, in this gateway"


def test_a_key_that_another_process_revokes_is_refused_within_a_second(
    service: GatewayService, callers: Callers
) -> None:
    made = callers["ada"].post("/v1/keys", json={}).json()
    elsewhere = open_database(f"sqlite:///{service.store.folder / 'store.db'}")
    with httpx.Client(base_url=service.url, headers=bearer(made["secret"])) as client:
        assert client.get("/v1/whoami").status_code == 200
        Keys(elsewhere).revoke(made["prefix"], LOCAL)
        wait_until(lambda: client.get("/v1/whoami").status_code == 401)
        assert KNOWN_S < 1.0  # so long somebody is remembered who was let in
    elsewhere.close()


def test_a_disabled_tenant_is_out_at_once_and_its_requests_are_not_lost(callers: Callers) -> None:
    request = submitted(callers, "carl")
    callers["operator"].patch("/v1/tenants/audio", json={"is_disabled": True})
    refused = callers["carl"].get(f"/v1/requests/{request}")
    assert refused.status_code == 401 and "audio is disabled" in refused.json()["detail"]
    assert callers["operator"].get(f"/v1/requests/{request}").json()["state"] == "queued"
    callers["operator"].patch("/v1/tenants/audio", json={"is_disabled": False})
    assert callers["carl"].get(f"/v1/requests/{request}").status_code == 200


def test_names_with_a_meaning_for_paths_lead_nowhere(service: GatewayService, callers: Callers) -> None:
    before = {path for path in service.store.folder.rglob("*") if not path.name.startswith("store.db")}
    tricks = ("..", "%2e%2e", "..%2f..%2fstore.db", "%2e%2e%2fetc%2fpasswd", "a%00b", "%ff%fe", "~", "a~b", "-", "%20")
    for trick in tricks:
        for method, path in (
            ("GET", f"/v1/requests/{trick}"),
            ("GET", f"/v1/requests/{trick}/result"),
            ("GET", f"/v1/requests/{trick}/events"),
            ("DELETE", f"/v1/requests/{trick}"),
            ("GET", f"/v1/models/{trick}"),
            ("PUT", f"/v1/models/{trick}"),
            ("POST", f"/v1/models/{trick}/requests"),
            ("GET", f"/v1/models/m/edits/{trick}"),
            ("POST", f"/v1/models/m/edits/{trick}"),
            ("GET", f"/v1/kept/{trick}"),
            ("GET", f"/v1/kept/{trick}/content"),
            ("DELETE", f"/v1/states/{trick}"),
            ("GET", f"/v1/constants/{trick}"),
            ("PUT", f"/v1/constants/{trick}"),
            ("GET", f"/v1/tenants/{trick}"),
            ("PUT", f"/v1/tenants/{trick}"),
            ("PUT", f"/v1/tenants/vision/users/{trick}"),
            ("DELETE", f"/v1/keys/{trick}"),
            ("POST", f"/v1/keys/{trick}/rotate"),
        ):
            status, told = as_it_stands(service, callers, method, path)
            assert 400 <= status < 500, (method, path, status, told)
            assert "root:" not in told and "SQLite" not in told
    after = {path for path in service.store.folder.rglob("*") if not path.name.startswith("store.db")}
    assert after <= before | {service.store.folder / "contents" / "default~ops"}
    assert [one.name for one in service.store.tenants.known()] == ["audio", "default", "vision"]


def test_when_a_key_was_used_last_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.access.NOTE_S", 0.02)
    database = open_database(f"sqlite:///{tmp_path / 'store.db'}")
    keys = Keys(database)
    made, secret = keys.make("default", "ada", LOCAL)

    async def use() -> None:
        access = Access(keys, Tenants(database), own_key=None, asks=True)
        noting = asyncio.create_task(access.note_forever())
        assert (await access.identify(f"Bearer {secret}")).user == "ada"
        while keys.get(made.prefix).last_used is None:
            await asyncio.sleep(0.01)
        noting.cancel()

    began = time.time()
    asyncio.run(asyncio.wait_for(use(), 10))
    last_used = keys.get(made.prefix).last_used
    assert last_used is not None and began <= last_used <= time.time()
    database.close()


def test_keys_that_users_make_live_no_longer_than_the_service_says(tmp_path: Path) -> None:
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), key="sesame", key_ttl_s=3600.0)
    try:
        secret = service.store.keys.make("default", "ada", LOCAL)[1]
        with httpx.Client(base_url=service.url, headers=bearer(secret)) as ada:
            for wish in ({}, {"expires_in_s": 1e6}):
                assert ada.post("/v1/keys", json=wish).json()["expires"] <= time.time() + 3600
        assert service.http.get("/v1/whoami").json() == {
            "tenant": "default",
            "user": "default",
            "role": "operator",
            "key": None,
            "models": None,
        }
        assert service.http.post("/v1/keys", json={}).json()["expires"] is None
    finally:
        service.close()


def test_an_identity_of_a_user_may_use_what_its_tenant_may() -> None:
    user = Identity(tenant="audio", user="carl", models=frozenset({"m"}))
    assert user.may_use("m") and not user.may_use("large")
    assert Identity(tenant="audio", user="carl", models=frozenset({"m"}), role=Role.OPERATOR).may_use("large")


def as_it_stands(service: GatewayService, callers: Callers, method: str, path: str) -> tuple[int, str]:
    """An operator's call of a path that httpx would tidy."""
    connection = HTTPConnection(service.url.removeprefix("http://"), timeout=20)
    wish = '{"source": "none"}' if "models" in path else "{}"
    try:
        headers = bearer(callers.secrets["operator"]) | {"Content-Type": "application/json"}
        connection.request(method, path, body=wish, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def body() -> bytes:
    where = "experiment.py:1"
    request = Request(
        graph=Graph(nodes=(Constant(name="c", where=where), Save(name="out", value=Ref(NodeId(0)), where=where))),
        invokes=(Invoke(sequences=((1, 2, 3),)),),
        constants={"c": RawTensor(dtype="float32", shape=(1,), data=memoryview(b"\1" * 4))},
    )
    return b"".join(encode_request(request))
