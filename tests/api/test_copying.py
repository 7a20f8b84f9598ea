"""A store of a folder moves to PostgreSQL and S3 with everything in it, and goes on there."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from databases import Postgres
from gateways import GENERATED, Agreeable, GatewayService, body, description_of_nothing, submit
from object_stores import S3

from api.identity import LOCAL
from api.status import RequestState
from api.store import Store
from polytrace.contents import digest_of
from polytrace.wire import content_header
from scheduling.plan import RequestId

DATA = bytes([7]) * 16
DIGEST, FILE = digest_of("uint8", [16], DATA), content_header("uint8", (16,)) + DATA


def copy(folder: Path, database: str, objects: str | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.commands", "store", "copy", str(folder), "--database", database]
    command += [] if objects is None else ["--objects", objects]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False)


@pytest.mark.parametrize("with_objects", [True, False])
def test_a_store_goes_on_in_its_new_places(tmp_path: Path, postgres: Postgres, s3: S3, with_objects: bool) -> None:
    folder, url = tmp_path / "store", postgres.empty_database()
    objects = s3.place() if with_objects else None
    service = GatewayService(folder, Agreeable(), description_of_nothing())
    store = service.store
    done = submit(service)
    service.finish(done, GENERATED)
    result = service.http.get(f"/v1/requests/{done}/result").content
    events = service.http.get(f"/v1/requests/{done}/events").text
    store.contents.begin_upload(LOCAL.owner, "upload-1", len(FILE)).write_bytes(FILE)
    store.contents.finish_upload(LOCAL.owner, "upload-1", DIGEST)
    store.contents.kept.begin_state(LOCAL.owner, "s", "uint8", (16,), DIGEST)
    store.edits.put("m", LOCAL.owner, "mine", b"\0edit", is_shared=True)
    key = {"Idempotency-Key": "k"}
    waiting = RequestId(service.http.post("/v1/models/m/requests", content=body(), headers=key).json()["id"])
    service.close()
    copied = copy(folder, url, objects)
    assert copied.returncode == 0, copied.stderr
    refused = copy(folder, url, objects)
    assert refused.returncode == 1 and "is not empty: it has requests" in refused.stderr
    if with_objects:
        shutil.rmtree(folder)
    else:
        (folder / "store.db").unlink()
    again = GatewayService(folder, Agreeable(), description_of_nothing(), database=url, objects=objects)
    assert again.http.get(f"/v1/requests/{done}/result").content == result
    assert again.http.get(f"/v1/requests/{done}/events").text == events
    assert again.http.post("/v1/models/m/requests", content=body(), headers=key).json()["id"] == waiting
    assert again.store.contents.content_path(LOCAL.owner, DIGEST).read_bytes() == FILE
    assert again.store.contents.kept.entry(LOCAL.owner, "s", is_state=True).digest == DIGEST
    assert again.store.edits.get("m", LOCAL.owner, "mine", None) == (1, b"\0edit")
    new = RequestId(again.http.post("/v1/models/m/requests", content=body(2)).json()["id"])
    assert [claimed.request for claimed in again.store.claim("m", 9)] == [waiting, new], "in their order"
    status = again.store.status(new)
    assert status is not None and status.state is RequestState.RUNNING
    again.close()


def test_a_store_that_is_in_use_or_none_is_not_copied(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.empty_database()
    none = copy(tmp_path, url, None)
    assert none.returncode == 1 and "has no store.db" in none.stderr
    Store(tmp_path / "store").close()
    with (tmp_path / "store" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        used = copy(tmp_path / "store", url, None)
    assert used.returncode == 1 and "a service runs on" in used.stderr
