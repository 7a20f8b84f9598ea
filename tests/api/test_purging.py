"""An operator purges a tenant's data: all of it goes, from the database and the disk, and nobody else's."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from gateways import GENERATED, Agreeable, GatewayService, Knowing, body, description_of_nothing, wait_until

import api.purging
from api.idempotency import Submit
from api.identity import LOCAL, Identity
from api.needs import Needs
from api.purging import Purged, purge
from api.status import RequestState
from api.store import Store
from cluster.requests import DeploymentState, Finished
from polytrace.contents import digest_of
from polytrace.errors import CancelledError, CapacityError, ConflictError
from polytrace.wire import content_header
from scheduling.plan import RequestId

ADA, BOB, EVE = (Identity(tenant=tenant, user=user) for tenant, user in (("lab", "a"), ("lab", "bob"), ("lab2", "ada")))
DATA = bytes([7]) * 16
DIGEST, FILE = digest_of("uint8", [16], DATA), content_header("uint8", (16,)) + DATA


@pytest.fixture(params=["sqlite", "postgres and s3"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Store]:
    database = objects = None
    if request.param != "sqlite":
        database = request.getfixturevalue("postgres").database()
        objects = request.getfixturevalue("s3").place()
    store = Store(tmp_path / "store", database=database, objects=objects)
    store.set_state("m", DeploymentState.READY, "ready")
    yield store
    store.close()


def accept(store: Store, who: Identity) -> RequestId:
    request = store.new_id()
    store.request_path(request).write_bytes(b"request")
    store.received.sync(request)
    submit = Submit(key=request, digest="7-a")
    store.add(request, "m", b"[]", work=1, max_open=99, caller=who, needs=Needs(digests=(DIGEST,)), submit=submit)
    return request


def furnish(store: Store, who: Identity) -> RequestId:
    """One of everything; the request that is done."""
    store.contents.begin_upload(who.owner, f"upload-{who.owner}", len(FILE)).write_bytes(FILE)
    store.contents.finish_upload(who.owner, f"upload-{who.owner}", DIGEST)
    store.contents.begin_upload(who.owner, f"upload-half-{who.owner}", 100).write_bytes(b"half")
    store.contents.kept.begin_state(who.owner, "s", "uint8", (16,), DIGEST)
    store.edits.put("m", who.owner, "mine", b"edit", is_shared=True)
    store.edits.delete("m", who.owner, "mine", 1)
    store.edits.put("m", who.owner, "mine", b"edit", is_shared=False)
    request = accept(store, who)
    store.claim("m", 9)
    store.place_result(request, 64, 0)
    store.finish([Finished(request=request, header=b"h" * 64, generated=GENERATED)])
    return request


def traces(store: Store, who: Identity) -> list[str]:
    """What the database or the disk still knows of somebody."""
    found = []
    for table in ("requests", "contents", "kept", "edits", "idempotency", "room", "uses"):
        rows = store.database.rows(f"SELECT count(*) FROM {table} WHERE owner = ?", (who.owner,))
        found += [table] * bool(rows[0][0])
    found += [str(path) for path in store.contents.folder_of(who.owner).iterdir()]
    if store.objects is not None:
        found += list(store.objects.sizes(f"contents/{who.owner}"))
    return found


def files_of(store: Store, request: RequestId) -> list[bool]:
    is_there = (
        store.result_path(request).exists() if store.objects is None else store.objects.sizes(f"results/{request}")
    )
    return [bool(is_there), store.events.path(request).exists()]


def usage(store: Store, who: Identity) -> int:
    rows = store.database.rows("SELECT count(*) FROM usage WHERE tenant = ? AND user_name = ?", (who.tenant, who.user))
    return int(rows[0][0])


def test_all_of_a_tenant_goes_and_nobody_elses(store: Store) -> None:
    mine, others = furnish(store, ADA), furnish(store, EVE)
    furnish(store, BOB)
    before = traces(store, EVE)
    assert traces(store, ADA) and before
    gone = purge(store, "lab", None, is_cancelling=False, with_usage=False)
    assert gone == Purged(requests=2, contents=2, kept=2, edits=4, num_bytes=2 * (len(FILE) + 4), usage=0)
    assert traces(store, ADA) == traces(store, BOB) == []
    assert store.status(mine) is None and not any(files_of(store, mine))
    assert traces(store, EVE) == before, "a tenant whose name begins the same"
    assert store.status(others) is not None and store.events.path(others).exists()
    assert usage(store, ADA) == 1, "kept for accounting"
    assert purge(store, "lab", None, is_cancelling=False, with_usage=True) == Purged(usage=2)
    assert usage(store, ADA) == usage(store, BOB) == 0 and usage(store, EVE) == 1


def test_one_user_goes_and_his_colleagues_stay(store: Store) -> None:
    furnish(store, ADA)
    furnish(store, BOB)
    before = traces(store, BOB)
    assert purge(store, "lab", "a", is_cancelling=False, with_usage=True).requests == 1
    assert traces(store, ADA) == [] and traces(store, BOB) == before and usage(store, BOB) == 1


def test_what_waits_or_runs_is_in_the_way_until_it_is_cancelled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(store, ADA)
    running, waiting = accept(store, ADA), accept(store, ADA)
    assert [claimed.request for claimed in store.claim("m", 1)] == [running]
    with pytest.raises(ConflictError, match="2 requests of lab/a wait or run: let them end, or purge with `cancel`"):
        purge(store, "lab", "a", is_cancelling=False, with_usage=False)
    assert store.contents.kept.entry(ADA.owner, "s", is_state=True).digest == DIGEST, "nothing was dropped"
    monkeypatch.setattr(api.purging, "ENDING_S", 0.3)
    with pytest.raises(CapacityError, match="1 requests of lab are cancelled and still run: ask again"):
        purge(store, "lab", None, is_cancelling=True, with_usage=False)
    status = store.status(waiting)
    assert status is not None and status.state is RequestState.CANCELLED
    monkeypatch.setattr(api.purging, "ENDING_S", 20.0)
    gone: list[Purged] = []
    purging = threading.Thread(
        target=lambda: gone.append(purge(store, "lab", None, is_cancelling=True, with_usage=False))
    )
    purging.start()
    wait_until(lambda: store.cancellations("m") == [running])
    store.finish([Finished(request=running, error=CancelledError("cancelled"))])
    purging.join(timeout=20)
    assert [one.requests for one in gone] == [3] and traces(store, ADA) == []


def test_an_operator_purges_over_http_and_by_the_command(tmp_path: Path) -> None:
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), key="sesame")
    request = service.http.post("/v1/models/m/requests", content=body()).json()["id"]
    url = f"/v1/tenants/{LOCAL.tenant}/data"
    refused = service.http.delete(url)
    assert refused.status_code == 409 and "1 requests of default wait or run" in refused.json()["detail"]
    for path in ("/v1/tenants/..%2F/data", "/v1/tenants/A%20B/data", f"{url}?user=*"):
        assert service.http.delete(path).status_code in (400, 404)
    assert httpx.delete(f"{service.url}{url}").status_code == 401
    command = [sys.executable, "-m", "api.commands", "purge", "--tenant", "default", "--cancel", "--yes"]
    done = subprocess.run(
        [*command, "--url", service.url, "--key", "sesame"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "default: 1 requests, 0 contents, 0 kept, 0 edits, 0 usage; 0 bytes of contents and edits\n"
    assert service.http.get(f"/v1/requests/{request}").status_code == 404
    service.close()


def test_who_is_no_operator_may_not(tmp_path: Path) -> None:
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing())
    assert TestClient(Knowing(service, ADA).app()).delete("/v1/tenants/lab/data").status_code == 403
    service.close()
