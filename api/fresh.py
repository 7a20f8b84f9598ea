"""Small results that ended just now: the database has them until their files are surely on the disk.

That a request is done is one transaction, which waits for the disk once. For a small result its content goes with it,
so nobody has to wait for the result's file and the folder's entry as well; whoever reads finds it in its file at once.
Every few seconds the files are made durable, all of them together, and their contents leave the database. A machine
that is lost in between may have lost the files: `restore` writes them again at the next start.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor

from api.away import AwayError
from api.database import Database, Transaction
from api.results import FileResults
from scheduling.plan import RequestId

SETTLE_S = 5.0
_SOME = 500  # rows at a time

_log = logging.getLogger(__name__)


class FreshResults:
    """Any thread. One process enters results and settles them."""

    def __init__(self, db: Database, results: FileResults, syncers: Executor) -> None:
        self._db = db
        self._results = results
        self._syncers = syncers
        self._lock = threading.Lock()
        self._settling: threading.Timer | None = None

    def enter(self, db: Transaction, request: RequestId, content: bytes) -> None:
        """In the transaction that says that the request is done."""
        db.execute("INSERT INTO fresh_results (id, content) VALUES (?, ?)", (request, content))

    def settle_soon(self) -> None:
        """Some have been entered."""
        with self._lock:
            if self._settling is None:
                self._settling = threading.Timer(SETTLE_S, self._settle_or_later)
                self._settling.daemon = True
                self._settling.start()

    def settle(self) -> None:
        """The files of all that are entered are on the disk; the database forgets them."""
        with self._lock:
            timer, self._settling = self._settling, None
        if timer is not None:
            timer.cancel()
        while rows := self._db.rows("SELECT id FROM fresh_results LIMIT ?", (_SOME,)):
            requests = [RequestId(row[0]) for row in rows]
            list(self._syncers.map(self._results.sync, requests))
            self._results.settle()
            with self._db.transaction(is_durable=False) as db:  # what a crash brings back is settled again
                drop_fresh(db, requests)

    def restore(self) -> None:
        """Writes the files again that a crash may have lost. Only while nobody else has the store open."""
        for (request,) in self._db.rows("SELECT id FROM fresh_results"):
            ((content,),) = self._db.rows("SELECT content FROM fresh_results WHERE id = ?", (request,))
            try:
                self._results.write(RequestId(request), bytes(content))
            except OSError as error:
                _log.warning("the result of %s stays in the database for now: %s", request, error)
                return
        self.settle()

    def close(self) -> None:
        """Settles what this process has entered."""
        if self._settling is not None:
            self._settle_or_later()
            with self._lock:
                timer, self._settling = self._settling, None
            if timer is not None:
                timer.cancel()

    def _settle_or_later(self) -> None:
        try:
            self.settle()
        except (OSError, AwayError) as error:
            _log.warning("results stay in the database for now: %s", error)
            self.settle_soon()


def drop_fresh(db: Transaction, requests: Iterable[RequestId] | Sequence[RequestId]) -> None:
    """They are settled, or gone."""
    db.executemany("DELETE FROM fresh_results WHERE id = ?", [(request,) for request in requests])
