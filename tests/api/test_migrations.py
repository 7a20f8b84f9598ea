"""Stores of older programs come up with everything that was in them, and both databases get the same tables."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from databases import Postgres
from gateways import description_of_nothing

from api import migrations
from api.database import Database, open_database
from api.identity import LOCAL
from api.status import RequestState
from api.store import Store
from cluster.requests import Published
from polytrace.codec import from_json, to_json
from polytrace.description import Limits, ModelDescription
from polytrace.errors import ServiceError, UserError
from scheduling.plan import RequestId

OLD = Path(__file__).parent / "stores" / "version_4.sql"  # what an older `polytrace serve` wrote, as `.dump` gives it
DONE, RUNNING, QUEUED = (
    RequestId(one)
    for one in (
        "29dba334702cc83c3420762e7f42680d",
        "370a75a617ff99862a448b10a8840c22",
        "a900e17f66ecb05a84c829cf088e8cc1",
    )
)
DIGEST = "3585ac93f9e9fd1ddfd7365ced99d6a3086eec5f1185435270941e6f254f24b2"


def old_store(folder: Path, *, has_edits: bool = True) -> Path:
    """The folder of a store as the older program left it."""
    for name in ("requests", "results", "contents/default"):
        (folder / name).mkdir(parents=True)
    for request in (RUNNING, QUEUED):
        (folder / "requests" / f"{request}.safetensors").write_bytes(b"request")
    (folder / "results" / f"{DONE}.safetensors").write_bytes(b"h" * 64)
    (folder / "contents" / "default" / DIGEST).write_bytes(b"content")
    connection = sqlite3.connect(folder / "store.db")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(OLD.read_text())
    if not has_edits:
        connection.execute("DROP TABLE edits")
        connection.commit()
    connection.close()
    return folder


@pytest.mark.parametrize("has_edits", [True, False])
def test_an_older_store_comes_up_with_all_that_was_in_it(tmp_path: Path, has_edits: bool) -> None:
    folder = old_store(tmp_path / "store", has_edits=has_edits)
    change(folder, "UPDATE deployments SET source = 'w', dtype = 'auto', description = x'7b7d', tokenizer = x'5b5d'")
    store = Store(folder)
    store.sweep()
    assert store.published("m") == Published(source="w", dtype="auto", description=b"{}", tokenizer=b"[]")
    states = {request: status.state for request, status in store.statuses([DONE, RUNNING, QUEUED]).items()}
    assert states == {DONE: RequestState.DONE, RUNNING: RequestState.RUNNING, QUEUED: RequestState.QUEUED}
    assert store.result_path(DONE).read_bytes() == b"h" * 64
    store.requeue("m", is_clean=True)
    claims = store.claim("m", 10)
    assert [claimed.request for claimed in claims] == [RUNNING, QUEUED]
    assert all(claimed.path.read_bytes() == b"request" and claimed.tenant == LOCAL.tenant for claimed in claims)
    assert store.contents.content_path(LOCAL.owner, DIGEST).read_bytes() == b"content", "it is the same caller's"
    assert store.contents.kept.entry(LOCAL.owner, "s", is_state=True).digest == DIGEST
    assert [known.name for known in store.edits.known("m", LOCAL.owner)] == (["mine"] if has_edits else [])
    store.edits.put("m", LOCAL.owner, "another", b"edit", is_shared=False)
    store.close()


def test_descriptions_of_an_older_store_can_be_read(tmp_path: Path) -> None:
    folder = old_store(tmp_path / "store")
    before = to_json(replace(description_of_nothing(), limits=Limits(max_sequence_tokens=8, trunk_bytes=7)))
    before["limits"]["kept_bytes"] = before["limits"].pop("trunk_bytes")
    text = json.dumps(before).replace("'", "''")
    change(folder, f"UPDATE deployments SET source = 'w', dtype = 'auto', description = CAST('{text}' AS BLOB)")
    store = Store(folder)
    published = store.published("m")
    assert published is not None
    assert from_json(ModelDescription, json.loads(published.description)).limits.trunk_bytes == 7
    store.close()


def test_a_store_of_a_newer_program_or_of_long_ago_is_refused_with_its_version(tmp_path: Path) -> None:
    (tmp_path / "newer").mkdir()
    Store(tmp_path / "newer").close()
    change(tmp_path / "newer", "UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(ServiceError, match="version 0999; this program knows versions up to"):
        Store(tmp_path / "newer")
    older = old_store(tmp_path / "older")
    change(older, "PRAGMA user_version = 3")
    with pytest.raises(ServiceError, match="version 3; those from version 4 on"):
        Store(older)


def test_both_databases_have_the_same_tables(tmp_path: Path, postgres: Postgres) -> None:
    lite = open_database(f"sqlite:///{tmp_path / 'store.db'}")
    large = open_database(postgres.empty_database())
    tables = {row[0] for row in lite.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
    tables -= {"sqlite_sequence"}
    assert "requests" in tables and "idempotency" in tables
    shape = "SELECT column_name FROM information_schema.columns WHERE table_name = ? ORDER BY ordinal_position"
    for table in tables:
        columns = [row[1] for row in lite.rows(f"PRAGMA table_info({table})")]
        assert columns == [row[0] for row in large.rows(shape, (table,))], table
    for database in (lite, large):
        assert database.rows("SELECT version_num FROM alembic_version") == [(migrations.HEAD,)]
        database.close()


def test_a_row_that_every_request_reads_has_nothing_large(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path / 'store.db'}")
    kinds = {row[2] for table in ("deployments", "requests") for row in database.rows(f"PRAGMA table_info({table})")}
    assert "TEXT" in kinds and "BLOB" not in kinds, "SQLite reads all of a row that stands before the column it wants"
    database.close()


def test_processes_that_open_a_new_store_at_once_make_its_tables_once(postgres: Postgres, tmp_path: Path) -> None:
    for url in (postgres.empty_database(), f"sqlite:///{tmp_path / 'store.db'}"):
        with ThreadPoolExecutor(4) as openers:
            opened: list[Database] = list(openers.map(open_database, [url] * 4))
        assert [database.rows("SELECT count(*) FROM requests") for database in opened] == [[(0,)]] * 4
        for database in opened:
            database.close()


def test_what_is_no_database_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="mysql: is no database of a store"):
        open_database("mysql://somewhere/else")


def change(folder: Path, statement: str) -> None:
    connection = sqlite3.connect(folder / "store.db", isolation_level=None)
    connection.execute(statement)
    connection.close()
