"""Requests that find their deployment not loaded: who may have it loaded, how often, and what operators say of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from gateways import Agreeable, GatewayService, body, description_of_nothing, wait_until

from api.identity import Identity, Role
from api.limits import TenantLimits, Terms
from api.store import Store
from cluster.config import DeploymentSpec, Heat
from cluster.requests import DeploymentState, Published
from polytrace.errors import CapacityError, ConflictError, NotFoundError, QuotaError, RunError, UserError

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()
ANNA = Identity(tenant="lab", user="anna", role=Role.USER)
COLD, READY = DeploymentState.COLD, DeploymentState.READY


class Shop:
    """A store whose clock stands until it is moved."""

    def __init__(self, folder: Path, database: str | None) -> None:
        self.at = NOON
        self.store = Store(folder, database=database, clock=lambda: self.at)
        for name in ("m", "other", "plain"):
            self.store.want(DeploymentSpec(name=name, source="none"))
            self.store.publish(name, Published(source="none", dtype="auto", description=b"{}", tokenizer=None))
            self.store.set_state(name, READY, "ready")
            self.store.keep(name, {"on_demand": name != "plain"})

    def rest(self, name: str) -> None:
        self.store.evict(name, None, "evicted by default/default")
        self.store.set_state(name, COLD, "cold")

    def ask(self, name: str, caller: Identity = ANNA, starts_a_day: int | None = None) -> None:
        request = self.store.new_id()
        self.store.request_path(request).write_bytes(b"request")
        terms = Terms(tenant=caller.tenant, model=name, tenants=TenantLimits(starts_a_day=starts_a_day))
        self.store.add(request, name, b"[]", work=1, max_open=10, caller=caller, terms=terms)

    def heat(self, name: str) -> Heat:
        return next(wanted.heat for wanted in self.store.wanted() if wanted.spec.name == name)


@pytest.fixture(params=["sqlite", "postgres"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    is_large = request.param == "postgres"
    shop = Shop(tmp_path / "store", request.getfixturevalue("postgres").empty_database() if is_large else None)
    yield shop
    shop.store.close()


def test_a_tenant_has_its_starts_of_a_day_and_those_who_come_meanwhile_are_free(shop: Shop) -> None:
    for name in ("m", "other"):
        shop.rest(name)
    shop.ask("m", starts_a_day=1)
    assert shop.heat("m") is Heat.HOT
    shop.ask("m", starts_a_day=1)
    with pytest.raises(QuotaError, match="other is not loaded, and tenant lab has had 1 of 1 models loaded") as refused:
        shop.ask("other", starts_a_day=1)
    assert refused.value.retry_after_s == 12 * 3600
    assert shop.heat("other") is Heat.COLD and shop.store.num_open("other") == 0
    shop.ask("other", Identity(tenant="lab", user="olga", role=Role.OPERATOR), starts_a_day=1)
    assert shop.heat("other") is Heat.HOT, "operators are not limited"
    shop.rest("m")
    shop.at += 12 * 3600
    shop.ask("m", starts_a_day=1)
    assert shop.heat("m") is Heat.HOT, "it is another day"


def test_one_that_is_about_to_rest_and_still_there_stays_and_nobody_is_charged(shop: Shop) -> None:
    shop.store.evict("m", Heat.WARM, "evicted")
    assert shop.heat("m") is Heat.WARM
    shop.ask("m", starts_a_day=0)
    assert shop.heat("m") is Heat.HOT


def test_what_requests_do_not_load_refuses_them_with_the_reason(shop: Shop) -> None:
    shop.rest("plain")
    with pytest.raises(CapacityError, match=r"plain is not loaded \(evicted by default/default\), and requests do not"):
        shop.ask("plain")
    shop.store.want(DeploymentSpec(name="new", source="none"))
    shop.store.keep("new", {"on_demand": True})
    shop.rest("new")
    with pytest.raises(CapacityError, match="and it was never loaded: an operator does"):
        shop.ask("new")


def test_after_a_start_that_failed_the_next_one_waits_a_minute(shop: Shop) -> None:
    shop.store.cool("m", Heat.COLD, "failed: no such file", "failed")
    shop.store.set_state("m", COLD, "failed")
    shop.at += 20
    with pytest.raises(CapacityError, match=r"m could not be loaded 20 s ago \(no such file\)") as refused:
        shop.ask("m")
    assert refused.value.retry_after_s == 40
    shop.at += 40
    shop.ask("m")
    assert shop.heat("m") is Heat.HOT


def test_it_rests_only_while_it_has_no_requests(shop: Shop) -> None:
    shop.ask("m")
    assert not shop.store.cool("m", Heat.COLD, "idle", "idle") and shop.heat("m") is Heat.HOT
    shop.store.refuse("m", CapacityError("over"))
    assert shop.store.cool("m", Heat.COLD, "idle", "idle") and shop.heat("m") is Heat.COLD


def test_what_is_pinned_or_kept_by_its_hours_is_not_evicted_and_pinning_loads(shop: Shop) -> None:
    shop.rest("m")
    shop.store.keep("m", {"is_pinned": True})
    assert shop.heat("m") is Heat.HOT
    with pytest.raises(ConflictError, match="m is pinned: unpin it first"):
        shop.store.evict("m", None, "evicted")
    shop.store.keep("m", {"is_pinned": False, "schedule": "mon 11:00-13:00"})
    with pytest.raises(ConflictError, match="m is kept loaded by its schedule mon 11:00-13:00"):
        shop.store.evict("m", None, "evicted")
    shop.at += 3600
    shop.store.evict("m", None, "evicted")
    assert shop.heat("m") is Heat.COLD


def test_keeping_that_cannot_be_is_refused_and_changes_nothing(shop: Shop) -> None:
    before = shop.store.wanted()
    for change, told in (
        ({"schedule": "mon"}, "is no window"),
        ({"idle_minutes": float("nan")}, "it is more than 0"),
        ({"idle_minutes": 1.0, "on_demand": False}, "idle_minutes is for deployments that are loaded again"),
        ({"rests": Heat.HOT}, "rests warm or cold"),
    ):
        with pytest.raises(UserError, match=told):
            shop.store.keep("m", change)
    with pytest.raises(NotFoundError):
        shop.store.keep("nobody", {"is_pinned": True})
    assert shop.store.wanted() == before


def test_another_description_is_another_revision(shop: Shop) -> None:
    def revision() -> int:
        return next(one.revision for one in shop.store.deployments() if one.model == "m")

    first = revision()
    shop.store.publish("m", Published(source="none", dtype="auto", description=b"{}", tokenizer=None))
    assert revision() == first
    shop.store.publish("m", Published(source="none", dtype="auto", description=b"[]", tokenizer=None))
    assert revision() == first + 1


def test_who_waits_is_told_how_far_the_loading_is_by_status_and_by_events(tmp_path: Path) -> None:
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing())
    store, url = service.store, "/v1/models/m/requests"
    try:
        changed = service.http.patch("/v1/models/m/keeping", json={"on_demand": True, "rests": "warm"})
        assert changed.json()["keeping"] == {
            "on_demand": True,
            "is_pinned": False,
            "schedule": None,
            "idle_minutes": None,
            "rests": "warm",
        }
        assert service.http.post("/v1/models/m/evict", json={}).json() == {"name": "m", "heat": "warm"}
        store.set_state("m", DeploymentState.WARM, "evicted; 3.00 GB of weights in memory")
        posted = service.http.post(url, content=body())
        assert posted.status_code == 202 and store.deployments()[0].heat is Heat.HOT
        request = posted.json()["id"]

        def told() -> str:
            return str(service.http.get(f"/v1/requests/{request}", params={"wait": 20}).json()["waits_for"])

        wait_until(lambda: told() == "m is warm: evicted; 3.00 GB of weights in memory")
        heard: list[str] = []
        with service.http.stream("GET", f"/v1/requests/{request}/events") as stream:
            lines = stream.iter_lines()
            for state, progress in ((DeploymentState.STARTING, "1 of 8 shards"), (DeploymentState.READY, "ready")):
                while not heard or not heard[-1].startswith("data: "):
                    heard.append(next(lines))
                store.set_state("m", state, progress)
                heard.append("changed")
            while not heard[-1].startswith("data: "):
                heard.append(next(lines))
                if heard[-1] == "":
                    service.finish(service.claim(), error=RunError("over"))
        kinds = [line.removeprefix("event: ") for line in heard if line.startswith("event: ")]
        data = [json.loads(line.removeprefix("data: ")) for line in heard if line.startswith("data: ")]
        assert kinds == ["waiting", "waiting", "end"] and "id: 0" in heard
        assert data[:2] == [
            {"waits_for": "m is warm: evicted; 3.00 GB of weights in memory"},
            {"waits_for": "m is starting: 1 of 8 shards"},
        ]
        assert data[2]["state"] == "failed" and told() == "None"
        for path, wish in (
            ("keeping", {"schedule": "always"}),
            ("keeping", {"rests": "hot"}),
            ("evict", {"to": "ice"}),
        ):
            method = "PATCH" if path == "keeping" else "POST"
            assert service.http.request(method, f"/v1/models/m/{path}", json=wish).status_code in (400, 422)
        assert service.http.post("/v1/models/none/load").status_code == 404
        acts = [entry.act for entry in store.audit.entries()]
        assert acts == ["models.evict", "models.keep"]
    finally:
        service.close()
