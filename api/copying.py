"""A store moves from its folder to PostgreSQL and a place of objects, with everything in it.

Owns the order: first the files, then all rows in one transaction, so a copy that breaks off leaves an empty store. The
folder is only read, but for results that a crash left in its database alone. Nobody else may have either store open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from api.database import Database, Transaction
from api.store import Store
from polytrace.errors import ConflictError
from scheduling.plan import RequestId

_ROWS = 500  # in memory at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy has taken along."""

    rows: int
    files: int  # put among the objects


def copy_store(source: Store, target: Store, report: Callable[[str], None]) -> Copied:
    """Everything of a store in a folder, with SQLite, to another database, and to its objects where it has any.

    Raises ConflictError when the other database has requests, deployments, contents or keys already.
    """
    for table in ("requests", "deployments", "contents", "kept", "edits", "users", "keys"):
        if target.database.rows(f"SELECT 1 FROM {table} LIMIT 1"):
            raise ConflictError(f"the database to copy to is not empty: it has {table}")
    source.restore_fresh()
    files = 0 if target.objects is None else _copy_files(source, target, report)
    rows = 0
    with target.database.transaction() as db:
        for table in _tables(source.database):
            count = _copy_table(source.database, db, table)
            rows += count
            report(f"{table}: {count} rows")
    return Copied(rows=rows, files=files)


def _copy_files(source: Store, target: Store, report: Callable[[str], None]) -> int:
    objects = target.objects
    assert objects is not None
    count = 0
    waiting = source.database.rows("SELECT id FROM requests WHERE state IN ('queued', 'running')")
    done = source.database.rows("SELECT id FROM requests WHERE state = 'done'")
    for (request,) in waiting:
        objects.put_file(f"requests/{request}.safetensors", source.request_path(request))
        count += 1
    for (request,) in done:
        target.results.take_over(RequestId(request), source.result_path(request))
        count += 1
        if source.events.path(request).exists():
            objects.put_file(f"events/{request}", source.events.path(request))
            count += 1
    report(f"requests, results and events: {count} files")
    for owner, digest in source.database.rows("SELECT owner, digest FROM contents"):
        objects.put_file(f"contents/{owner}/{digest}", source.contents.folder_of(owner) / digest)
        count += 1
    report(f"with contents: {count} files")
    return count


def _tables(database: Database) -> list[str]:
    rows = database.rows("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    return [
        name for (name,) in rows if name not in ("alembic_version", "fresh_results") and not name.startswith("sqlite_")
    ]


def _copy_table(source: Database, target: Transaction, table: str) -> int:
    columns = [row[1] for row in source.rows(f"PRAGMA table_info({table})")]
    names, places = ", ".join(columns), ", ".join("?" * len(columns))
    count, last = 0, 0
    some = f"SELECT rowid, {names} FROM {table} WHERE rowid > ? ORDER BY rowid LIMIT ?"
    target.execute(f"DELETE FROM {table}")  # the tenant that every store has from its beginning
    while rows := source.rows(some, (last, _ROWS)):
        target.executemany(f"INSERT INTO {table} ({names}) VALUES ({places})", [row[1:] for row in rows])
        count, last = count + len(rows), rows[-1][0]
    if "seq" in columns and table != "uses" and count:  # numbers go on behind those that were given
        target.execute(f"SELECT setval(pg_get_serial_sequence('{table}', 'seq'), (SELECT max(seq) FROM {table}))")
    return count
