"""Lists of requests over a real gateway, and `polytrace jobs` against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateways import Agreeable, GatewayService, body, description_of_nothing
from typer.testing import CliRunner

from api.commands import app
from api.identity import LOCAL
from polytrace.errors import GraphError
from scheduling.plan import RequestId

KEY = "pt_operators-own"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayService]:
    service = GatewayService(tmp_path_factory.mktemp("jobs") / "s", Agreeable(), description_of_nothing(), key=KEY)
    yield service
    service.close()


@pytest.fixture(scope="module")
def people(service: GatewayService) -> Iterator[dict[str, httpx.Client]]:
    """Two users of the tenant lab and one of another, with a client each."""
    found: dict[str, httpx.Client] = {}
    for tenant in ("lab", "other"):
        service.store.tenants.add(tenant, LOCAL)
    for tenant, user in (("lab", "ada"), ("lab", "bob"), ("other", "eve")):
        _, secret = service.store.keys.make(tenant, user, LOCAL)
        headers = {"Authorization": f"Bearer {secret}"}
        found[user] = httpx.Client(base_url=service.url, headers=headers, timeout=30)
    yield found
    for client in found.values():
        client.close()


@pytest.fixture(scope="module")
def sent(service: GatewayService, people: dict[str, httpx.Client]) -> dict[str, list[str]]:
    """Of each user seven requests, the first done, the second failed, the others waiting."""
    found: dict[str, list[str]] = {user: [] for user in people}
    for _ in range(7):
        for user, client in people.items():
            found[user].append(client.post("/v1/models/m/requests", content=body()).json()["id"])
    assert len(service.store.claim("m", 100)) == 21
    for own in found.values():
        service.finish(RequestId(own[0]))
        service.finish(RequestId(own[1]), error=GraphError("it reads layer 96"))
        service.store.give_back([RequestId(request) for request in own[2:]], ())
    return found


def listed(client: httpx.Client, **wish: Any) -> dict[str, Any]:
    answer = client.get("/v1/requests", params=wish)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_user_sees_the_own_requests_only_and_an_operator_all(
    service: GatewayService, people: dict[str, httpx.Client], sent: dict[str, list[str]]
) -> None:
    own = listed(people["ada"])
    assert [one["id"] for one in own["requests"]] == sent["ada"][::-1] and own["next"] is None
    assert {(one["tenant"], one["user"]) for one in own["requests"]} == {("lab", "ada")}
    assert len(listed(service.http, limit=500)["requests"]) == 21
    of_lab = listed(service.http, tenant="lab", limit=500)["requests"]
    assert sorted(one["id"] for one in of_lab) == sorted(sent["ada"] + sent["bob"])
    assert people["ada"].get("/v1/requests", params={"user": "bob"}).status_code == 404
    assert people["ada"].get("/v1/requests", params={"tenant": "other"}).status_code == 404


def test_states_narrow_a_list_and_wrong_ones_are_told(
    service: GatewayService, people: dict[str, httpx.Client], sent: dict[str, list[str]]
) -> None:
    assert [one["id"] for one in listed(people["bob"], state="done")["requests"]] == [sent["bob"][0]]
    failed = listed(people["bob"], state="failed")["requests"]
    assert [one["error"]["message"] for one in failed] == ["it reads layer 96"]
    assert len(listed(people["bob"], state="queued", model="m")["requests"]) == 5
    assert listed(people["bob"], model="another")["requests"] == []
    assert people["bob"].get("/v1/requests", params={"state": "lost"}).status_code == 400
    assert people["bob"].get("/v1/requests", params={"limit": 501}).status_code == 400


def test_pages_have_each_request_once_though_new_ones_come(
    people: dict[str, httpx.Client], sent: dict[str, list[str]]
) -> None:
    first = listed(people["eve"], limit=3)
    late = people["eve"].post("/v1/models/m/requests", content=body()).json()["id"]
    second = listed(people["eve"], limit=3, before=first["next"])
    third = listed(people["eve"], limit=3, before=second["next"])
    pages = [one["id"] for page in (first, second, third) for one in page["requests"]]
    assert pages == sent["eve"][::-1] and late not in pages and third["next"] is None


def test_the_command_lists_shows_cancels_and_fetches(
    service: GatewayService, people: dict[str, httpx.Client], sent: dict[str, list[str]], tmp_path: Path
) -> None:
    own = ["--url", service.url, "--key", people["bob"].headers["authorization"].removeprefix("Bearer ")]
    run = CliRunner()

    def told(*arguments: str, code: int = 0) -> Any:
        answer = run.invoke(app, ["jobs", *arguments, *own])
        assert answer.exit_code == code, answer.output
        return answer

    lines = told("list", "--json", "--limit", "4").stdout.splitlines()
    assert [json.loads(line)["id"] for line in lines] == sent["bob"][:2:-1]
    assert sent["bob"][1] in told("list", "--state", "failed").stdout
    assert json.loads(told("show", sent["bob"][0]).stdout)["state"] == "done"
    told("cancel", sent["bob"][-1])
    assert json.loads(told("show", sent["bob"][-1]).stdout)["state"] == "cancelled"
    path = tmp_path / "out.safetensors"
    told("result", sent["bob"][0], "-o", str(path))
    assert path.read_bytes() == people["bob"].get(f"/v1/requests/{sent['bob'][0]}/result").content
    still = told("result", sent["bob"][3], "-o", str(tmp_path / "none"), code=1)
    assert "queued" in still.output
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.safetensors"]
    assert "there is no request" in told("show", sent["ada"][0], code=1).output
