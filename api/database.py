"""The store's database: transactions that several processes and threads may use at once, in SQLite or PostgreSQL.

Statements are in the SQL that both understand, with `?` (or `?1`, `?2`, ...) for values. Both have one writer at a
time: another one waits at the beginning of its transaction. So what a transaction reads stays true until it
commits, and no statement of the store has to think about races. The tables are those of `api.migrations`.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from api import migrations
from api.away import AwayError
from polytrace.errors import ServiceError, UserError

if TYPE_CHECKING:
    import psycopg

_TIMEOUT_S = 30.0  # to wait for other processes, and at the start for a server
_PAUSE_S = 0.5  # between two tries to connect
_SILENCE_S = 10  # of a server, after which its connection counts as lost
_WRITERS = 0x706F6C79  # the lock of PostgreSQL that the one writer holds
_BEFORE_SCRIPTS = 4  # what `PRAGMA user_version` says of a SQLite store without Alembic's table
_HELD_S = 2.0 * _SILENCE_S  # until the server has surely let go of what a lost service held
_SERVER = {  # what is asked of it for each connection
    "jit": "off",  # to compile a query takes longer than to run any of ours
    "lock_timeout": f"{_TIMEOUT_S:g}s",
    "tcp_keepalives_idle": _SILENCE_S,
    "tcp_keepalives_interval": 1,
    "tcp_keepalives_count": 5,
}
_SERVICE = 0x706F6C7B  # the lock of the one service
_AWAY = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY)  # it may work a moment later


_NO_ANSWER = "the service's database does not answer"
_IS_OVER = "the service's database cannot be written now: it ended what this was a part of"
_log = logging.getLogger(__name__)


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

    def together(self) -> contextlib.AbstractContextManager[None]:
        """The transactions that this thread makes inside become one, which need not be durable; each of them is still
        all or nothing by itself. What they did is seen by others, and sure, behind it.
        """

    def settle(self) -> None:
        """What has been committed until now is on the disk when it returns. AwayError when nobody knows."""

    def hold(self) -> bool:
        """Takes the database for one service; False when another one keeps it. `close`, or its end, gives it back."""

    def close(self) -> None: ...


def open_database(url: str) -> Database:
    """The database at `sqlite:///PATH` or `postgresql://...`, with its tables made, or brought to this version.

    Raises UserError for another URL, AwayError when it does not answer within half a minute.
    """
    if url.startswith("sqlite:///"):
        return SqliteDatabase(Path(url.removeprefix("sqlite:///")))
    if url.startswith(("postgresql://", "postgres://")):
        return PostgresDatabase(url)
    raise UserError(f"{url.partition(':')[0]}: is no database of a store: sqlite:///PATH or postgresql://...")


class SqliteDatabase:
    """A file in WAL mode: readers and a writer at once.

    Writers of all processes wait for their turns at a lock beside it, which wakes them at once: SQLite itself sleeps
    and looks again, for longer each time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._turn = os.open(path.with_name(f"{path.name}-turn"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._connection = self._connected()
        os.chmod(path, 0o600)
        self._use_wal()
        self._reader = self._connected()  # looks while a commit waits for the disk
        self._is_full: bool | None = None
        self._burst = _Burst()
        migrations.bring_up(f"sqlite:///{path}", self._version())

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._reading, _taking():
            return self._reader.execute(query, values).fetchall()

    def together(self) -> contextlib.AbstractContextManager[None]:
        return self._burst.around(self.transaction(is_durable=False))

    @contextlib.contextmanager
    def transaction(self, *, is_durable: bool = True) -> Iterator[Transaction]:
        if (burst := self._burst.mine()) is not None:
            with _taking(), _part_of(burst, lambda: self._connection.in_transaction):
                yield burst
            return
        with self._lock, _taking():
            if is_durable is not self._is_full:
                # in WAL mode NORMAL keeps the order of commits but may lose the last ones with the power
                self._connection.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
                self._is_full = is_durable
            fcntl.flock(self._turn, fcntl.LOCK_EX)
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    if not self._connection.in_transaction:  # a full disk has ended it, in the middle of a burst
                        raise AwayError(_IS_OVER)
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:  # a full disk may have ended it
                        self._connection.execute("ROLLBACK")
                    raise
            finally:
                fcntl.flock(self._turn, fcntl.LOCK_UN)

    def settle(self) -> None:
        try:
            log = os.open(f"{self._path}-wal", os.O_RDONLY | os.O_CLOEXEC)  # SQLite has no locks on it
        except FileNotFoundError:  # all of it is in the database
            return
        try:
            os.fsync(log)
        except OSError as error:
            raise AwayError(f"the service's database cannot be written now: {error}", may_be_done=True) from error
        finally:
            os.close(log)

    def hold(self) -> bool:
        return True  # the lock of its folder does

    def close(self) -> None:
        with self._lock, self._reading:
            self._reader.close()
            self._connection.close()
            if self._turn >= 0:
                os.close(self._turn)
                self._turn = -1

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_TIMEOUT_S, isolation_level=None, check_same_thread=False)

    def _version(self) -> str | None:
        has_any = "SELECT 1 FROM sqlite_master WHERE name = ?"
        if self.rows(has_any, ("alembic_version",)):
            return next((str(row[0]) for row in self.rows("SELECT version_num FROM alembic_version")), None)
        if not self.rows(has_any, ("requests",)):
            return None
        ((number,),) = self.rows("PRAGMA user_version")
        if number != _BEFORE_SCRIPTS:
            raise ServiceError(f"the store has version {number}; those from version {_BEFORE_SCRIPTS} on can be used")
        return migrations.FIRST

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
    """A database of a PostgreSQL server, 13 or later, for this service alone.

    Every transaction is durable: the server may break down while the service does not, and then nothing may be
    forgotten that the service has acted on.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None
        self._is_held = False
        self._burst = _Burst()
        self._refused_until = 0.0  # when somebody is to try to connect again
        with self._lock:
            self._wait_for_server()
        migrations.bring_up(url, self._version())

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, _answering():
            try:
                return self._connected().execute(*_translated(query, values)).fetchall()
            except AwayError:
                raise
            except _lost():  # it may have been lost long ago; a question can be asked once more
                self._close()
                return self._connected().execute(*_translated(query, values)).fetchall()

    def together(self) -> contextlib.AbstractContextManager[None]:
        return self._burst.around(self.transaction(is_durable=False))

    @contextlib.contextmanager
    def transaction(self, *, is_durable: bool = True) -> Iterator[Transaction]:
        if (burst := self._burst.mine()) is not None:
            with _answering(), _part_of(burst, lambda: True):
                yield burst
            return
        with self._lock, _answering():
            connection = self._begun()
            try:
                yield _PostgresTransaction(connection)
                self._commit(connection)
            except BaseException:
                with contextlib.suppress(_lost()):
                    connection.execute("ROLLBACK")
                raise
            finally:
                if connection.info.transaction_status != _IDLE:
                    self._close()

    def _commit(self, connection: psycopg.Connection[Any]) -> None:
        try:
            connection.execute("COMMIT")
        except _lost() as error:
            raise AwayError(_NO_ANSWER, may_be_done=True) from error

    def settle(self) -> None:
        pass  # every transaction is durable

    def hold(self) -> bool:
        deadline = time.monotonic() + _HELD_S
        while not self._is_held:
            with self._lock, _answering():
                self._is_held = _has_taken(self._connected())
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        return self._is_held

    def close(self) -> None:
        with self._lock:
            self._close()

    def _begun(self) -> psycopg.Connection[Any]:
        """The connection, in a transaction that is the only one. One that was lost before is made anew."""
        begin = f"BEGIN; SELECT pg_advisory_xact_lock({_WRITERS})"
        try:
            connection = self._connected()
            connection.execute(begin)
        except AwayError:
            raise
        except _lost():
            self._close()
            connection = self._connected()
            connection.execute(begin)
        return connection

    def _connected(self) -> psycopg.Connection[Any]:
        """The connection, made anew when it was lost: its transaction has failed then, and the next one goes on."""
        if self._connection is None or self._connection.closed:
            if time.monotonic() < self._refused_until:  # of many who wait for a server that is away one tries
                raise AwayError(_NO_ANSWER)
            try:
                self._connection = self._new_connection()
            except _lost():
                self._refused_until = time.monotonic() + _PAUSE_S
                raise
        return self._connection

    def _new_connection(self) -> psycopg.Connection[Any]:
        import psycopg

        made = psycopg.connect(
            self._url,
            autocommit=True,
            connect_timeout=5,
            cursor_factory=psycopg.ClientCursor,
            keepalives_idle=_SILENCE_S,
            keepalives_interval=1,
            keepalives_count=5,
            tcp_user_timeout=_SILENCE_S * 1000,
            options=" ".join(f"-c {name}={value}" for name, value in _SERVER.items()),
        )
        made.adapters.register_loader("numeric", _number_loader())
        if self._is_held and not _has_taken(made):  # the server let go of it with the connection before
            made.close()
            raise AwayError("another service has taken the database")
        return made

    def _wait_for_server(self) -> None:
        """A machine's services may all start at once."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                self._connected()
                return
            except (_lost(), AwayError) as error:
                if time.monotonic() > deadline:
                    _log.warning("the database: %s", " ".join(str(error).split()))
                    raise AwayError(_NO_ANSWER) from error
                time.sleep(1.5 * _PAUSE_S)  # when somebody may try again

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _version(self) -> str | None:
        if not self.rows("SELECT 1 FROM information_schema.tables WHERE table_name = 'alembic_version'"):
            return None
        return next((str(row[0]) for row in self.rows("SELECT version_num FROM alembic_version")), None)


def _has_taken(connection: psycopg.Connection[Any]) -> bool:
    row = connection.execute(f"SELECT pg_try_advisory_lock({_SERVICE})").fetchone()
    return bool(row and row[0])


_IDLE = 0  # psycopg.pq.TransactionStatus.IDLE


class _Burst:
    """The transaction that others of the same thread are part of."""

    def __init__(self) -> None:
        self._thread: int | None = None
        self._transaction: Transaction | None = None

    def mine(self) -> Transaction | None:
        """It, where this is its thread."""
        return self._transaction if self._thread == threading.get_ident() else None

    @contextlib.contextmanager
    def around(self, whole: contextlib.AbstractContextManager[Transaction]) -> Iterator[None]:
        with whole as transaction:
            self._transaction, self._thread = transaction, threading.get_ident()
            try:
                yield
            finally:
                self._thread = self._transaction = None


@contextlib.contextmanager
def _part_of(whole: Transaction, goes_on: Callable[[], bool]) -> Iterator[None]:
    """All or nothing, unless the `whole` does not go on: a full disk may have ended it."""
    if not goes_on():
        raise AwayError(_IS_OVER)
    whole.execute("SAVEPOINT part")
    try:
        yield
    except BaseException:
        if goes_on():
            whole.execute("ROLLBACK TO part")
            whole.execute("RELEASE part")
        raise
    whole.execute("RELEASE part")


class _PostgresTransaction:
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def execute(self, query: str, values: Sequence[Any] = ()) -> Rows:
        return self._connection.execute(*_translated(query, values))

    def executemany(self, query: str, values: Iterable[Sequence[Any]]) -> object:
        """In few round trips: the statements of a batch go together."""
        named = _named(query)
        with self._connection.cursor() as cursor:
            for batch in _batches(values, 100):
                cursor.execute(";".join(cursor.mogrify(named, _values(each)) for each in batch))  # type: ignore[attr-defined]
        return None


def _batches(values: Iterable[Sequence[Any]], size: int) -> Iterator[list[Sequence[Any]]]:
    left = iter(values)
    while batch := list(itertools.islice(left, size)):
        yield batch


@contextlib.contextmanager
def _taking() -> Iterator[None]:
    """Raises AwayError instead of SQLite's own when its disk is full or fails, or another process is busy."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if (getattr(error, "sqlite_errorcode", 0) & 0xFF) not in _AWAY:
            raise
        raise AwayError(f"the service's database cannot be written now: {error}") from error


def _lost() -> type[Exception]:
    import psycopg

    return psycopg.OperationalError


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Raises AwayError instead of psycopg's own when the server is away."""
    try:
        yield
    except _lost() as error:
        _log.warning("the database: %s", " ".join(str(error).split()) or "connection lost")  # no user's business
        raise AwayError(_NO_ANSWER) from error


@lru_cache(maxsize=1)
def _number_loader() -> Any:
    """Sums of integers are `numeric`: Python's integers again, as SQLite gives them."""
    from psycopg.adapt import Loader

    class Number(Loader):
        def load(self, data: Any) -> int | float:
            text = bytes(data).decode()
            return int(text) if text.lstrip("-").isdecimal() else float(text)

    return Number


def _translated(query: str, values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    return _named(query), _values(values)


def _values(values: Sequence[Any]) -> dict[str, Any]:
    """Truth is an integer in all tables, as SQLite has it."""
    plain = (int(value) if isinstance(value, bool) else value for value in values)
    return {f"v{number}": value for number, value in enumerate(plain, 1)}


@lru_cache(maxsize=512)
def _named(query: str) -> str:
    """The statement as psycopg wants it: `?` and `?3` become `%(v3)s`."""
    count = 0

    def name(found: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return f"%(v{found[1] or count})s"

    return re.sub(r"\?(\d*)", name, query.replace("%", "%%"))
