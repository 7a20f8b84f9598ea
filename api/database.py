"""The store's SQLite file: its tables, and transactions that several processes and threads may use at once."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polytrace.errors import ServiceError

SCHEMA_VERSION = 4
_TIMEOUT_SECONDS = 30.0  # to wait for other processes

_SCHEMA = """
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    owner TEXT NOT NULL DEFAULT 'default',
    state TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    work INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    passes_done INTEGER NOT NULL DEFAULT 0,
    passes INTEGER NOT NULL DEFAULT 0,
    logs TEXT NOT NULL DEFAULT '[]',
    error TEXT
);
CREATE INDEX requests_open ON requests (model, state, seq) WHERE state IN ('queued', 'running');
CREATE TABLE facts (id TEXT PRIMARY KEY, json BLOB NOT NULL);
CREATE TABLE contents (
    owner TEXT NOT NULL,
    digest TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    used REAL NOT NULL,
    is_uploaded INTEGER NOT NULL,
    PRIMARY KEY (owner, digest)
);
CREATE TABLE kept (
    owner TEXT NOT NULL,
    is_state INTEGER NOT NULL,
    name TEXT NOT NULL,
    dtype TEXT NOT NULL,
    shape TEXT NOT NULL,
    digest TEXT NOT NULL,
    version INTEGER NOT NULL,
    request TEXT,
    expires REAL,
    PRIMARY KEY (owner, is_state, name)
);
CREATE INDEX kept_digest ON kept (owner, digest);
CREATE TABLE uses (
    id TEXT NOT NULL,
    seq INTEGER,
    owner TEXT NOT NULL,
    state TEXT,
    is_update INTEGER NOT NULL DEFAULT 0,
    digest TEXT
);
CREATE INDEX uses_id ON uses (id);
CREATE INDEX uses_state ON uses (owner, state, seq) WHERE state IS NOT NULL;
CREATE INDEX uses_digest ON uses (owner, digest) WHERE digest IS NOT NULL;
CREATE TABLE room (part TEXT PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE INDEX room_id ON room (id);
CREATE TABLE deployments (
    model TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    progress TEXT NOT NULL,
    updated REAL NOT NULL,
    spec TEXT,
    mode TEXT NOT NULL DEFAULT 'serving',
    revision INTEGER NOT NULL DEFAULT 1,
    replicas TEXT NOT NULL DEFAULT '[]',
    source TEXT,
    dtype TEXT,
    description BLOB,
    tokenizer BLOB
);
"""


class Database:
    """One connection, which its threads use in turn. Construction makes the tables when there are none."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(
            path, timeout=_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
        )
        os.chmod(path, 0o600)
        self._use_wal()
        with self.transaction() as db:  # two processes may open a new store at once
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        if version not in (0, SCHEMA_VERSION):
            raise ServiceError(f"{path} has version {version} of the store; this program has version {SCHEMA_VERSION}")

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """What a query finds now."""
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def transaction(self, *, is_durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing, for every process; on the disk when it returns unless that does not matter."""
        with self._lock:
            # in WAL mode NORMAL keeps the order of commits but may lose the last ones with the power
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _use_wal(self) -> None:
        """Readers and a writer at once. SQLite itself does not wait here while another process makes the file."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
