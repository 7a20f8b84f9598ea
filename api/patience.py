"""The store for those who have begun something and cannot hand it back: the controller, with requests that run.

While the database or the place of objects is away its calls wait, and are made again when it is back. Passes go on
meanwhile; what ends waits to be kept. Every call may have been done already when it is made again, and that must change
nothing; of `claim` it would, so what an unheard answer claimed is given back first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, cast

from api.away import AwayError
from api.claiming import all_to_each
from api.store import Store
from cluster.requests import Claimed, ControllerStore, Divide, Finished
from scheduling.plan import RequestId

PAUSE_S = 0.5

_log = logging.getLogger(__name__)


def patient(store: Store) -> ControllerStore:
    """The store, whose methods never raise AwayError."""
    return cast(ControllerStore, _Patient(store))


class _Patient:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._held: set[RequestId] = set()  # claimed, and neither finished nor given back
        self._lock = threading.Lock()

    def claim(self, model: str, limit: int, divide: Divide = all_to_each) -> list[Claimed]:
        try:
            claims = self._store.claim(model, limit, divide)
        except AwayError as error:
            claims = self._claimed_again(model, limit, divide, error)
        with self._lock:
            self._held.update(claimed.request for claimed in claims)
        return claims

    def finish(self, finished: Sequence[Finished]) -> None:
        _waiting(self._store.finish)(finished)
        self._let_go(end.request for end in finished)

    def give_back(self, requests: Iterable[RequestId], suspects: Iterable[RequestId]) -> None:
        given = list(requests)
        self._let_go(given)
        _waiting(self._store.give_back)(given, list(suspects))

    def __getattr__(self, name: str) -> Any:
        method = _waiting(getattr(self._store, name))
        setattr(self, name, method)
        return method

    def _claimed_again(self, model: str, limit: int, divide: Divide, error: AwayError) -> list[Claimed]:
        """`claim` has failed, and nobody knows what it has claimed."""
        while True:
            _log.warning("no requests can be claimed: %s", error)
            time.sleep(PAUSE_S)
            try:
                with self._lock:
                    held = set(self._held)
                self._store.unclaim(model, held)
                return self._store.claim(model, limit, divide)
            except AwayError as another:
                error = another

    def _let_go(self, requests: Iterable[RequestId]) -> None:
        with self._lock:
            self._held.difference_update(requests)


def _waiting(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        is_told = False
        while True:
            try:
                return method(*arguments, **named)
            except AwayError as error:
                if not is_told:
                    _log.warning("%s waits: %s", method.__name__, error)
                    is_told = True
                time.sleep(PAUSE_S)

    return call
