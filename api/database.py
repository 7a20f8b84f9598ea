"""The store's database: transactions that several processes and threads may use at once, in SQLite or PostgreSQL.

Statements are in the SQL that both understand, with `?` (or `?1`, `?2`, ...) for values. Both have one writer at a
time: another one waits at the beginning of its transaction. So what a transaction reads stays true until it
commits, and no statement of the store has to think about races. The tables are those of `api.migrations`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from api import migrations
from polytrace.errors import CapacityError, UserError

if TYPE_CHECKING:
    import psycopg

_TIMEOUT_S = 30.0  # to wait for other processes
_WRITERS = 0x706F6C79  # the lock of PostgreSQL that the one writer holds


class Rows(Protocol):
    """What a statement gave: DBAPI's cursor, as far as it is used."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class Transaction(Protocol):
    """What can be done inside a transaction."""

    def execute(self, query: str, values: Sequence[Any] = ()) -> Rows: ...

    def executemany(self, query: str, values: Iterable[Sequence[Any]]) -> object: ...


class Database(Protocol):
    """One connection of this process, which its threads use in turn."""

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """What a query finds now."""

    def transaction(self, *, is_durable: bool = True) -> contextlib.AbstractContextManager[Transaction]:
        """All or nothing, for every process; on the disk when it returns unless that does not matter."""

    def close(self) -> None: ...


def open_database(url: str) -> Database:
    """The database at `sqlite:///PATH` or `postgresql://...`, with its tables made, or brought to this version.

    Raises UserError for another URL, CapacityError when it does not answer.
    """
    if url.startswith("sqlite:///"):
        return SqliteDatabase(Path(url.removeprefix("sqlite:///")))
    if url.startswith(("postgresql://", "postgres://")):
        return PostgresDatabase(url)
    raise UserError(f"{url.partition(':')[0]}: is no database of a store: sqlite:///PATH or postgresql://...")


class SqliteDatabase:
    """A file in WAL mode: readers and a writer at once."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, timeout=_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        os.chmod(path, 0o600)
        self._use_wal()
        migrations.bring_up(f"sqlite:///{path}", self._version())

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def transaction(self, *, is_durable: bool = True) -> Iterator[Transaction]:
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

    def _version(self) -> str | None:
        has_any = "SELECT 1 FROM sqlite_master WHERE name = ?"
        if self.rows(has_any, ("alembic_version",)):
            return next((str(row[0]) for row in self.rows("SELECT version_num FROM alembic_version")), None)
        return migrations.FIRST if self.rows(has_any, ("requests",)) else None

    def _use_wal(self) -> None:
        """SQLite itself does not wait here while another process makes the file."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


class PostgresDatabase:
    """A database of a PostgreSQL server, 13 or later, for this service alone."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None
        with self._lock:
            self._connected()
        migrations.bring_up(url, self._version())

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, _answering():
            return self._connected().execute(*_translated(query, values)).fetchall()

    @contextlib.contextmanager
    def transaction(self, *, is_durable: bool = True) -> Iterator[Transaction]:
        with self._lock, _answering():
            connection = self._connected()
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(%s)", (_WRITERS,))
                if not is_durable:
                    connection.execute("SET LOCAL synchronous_commit = off")
                yield _PostgresTransaction(connection)

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()

    def _connected(self) -> psycopg.Connection[Any]:
        """The connection, made anew when it was lost: its transaction has failed then, and the next one goes on."""
        import psycopg

        if self._connection is None or self._connection.closed:
            with _answering():
                self._connection = psycopg.connect(
                    self._url, autocommit=True, connect_timeout=5, cursor_factory=psycopg.ClientCursor
                )
        return self._connection

    def _version(self) -> str | None:
        if not self.rows("SELECT 1 FROM information_schema.tables WHERE table_name = 'alembic_version'"):
            return None
        return next((str(row[0]) for row in self.rows("SELECT version_num FROM alembic_version")), None)


class _PostgresTransaction:
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def execute(self, query: str, values: Sequence[Any] = ()) -> Rows:
        return self._connection.execute(*_translated(query, values))

    def executemany(self, query: str, values: Iterable[Sequence[Any]]) -> object:
        with self._connection.cursor() as cursor:
            for each in values:
                cursor.execute(*_translated(query, each))
        return None


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Raises CapacityError instead of psycopg's own when the server is away."""
    import psycopg

    try:
        yield
    except psycopg.OperationalError as error:
        raise CapacityError(
            f"the service's database does not answer: {str(error).strip() or 'connection lost'}"
        ) from error


def _translated(query: str, values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    return _named(query), {f"v{number}": value for number, value in enumerate(values, 1)}


@lru_cache(maxsize=512)
def _named(query: str) -> str:
    """The statement as psycopg wants it: `?` and `?3` become `%(v3)s`."""
    count = 0

    def name(found: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return f"%(v{found[1] or count})s"

    return re.sub(r"\?(\d*)", name, query.replace("%", "%%"))
