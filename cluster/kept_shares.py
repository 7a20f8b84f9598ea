"""The counters of a deployment's tenants over restarts of the controller.

Written every SAVE_S while passes run, and when the controller ends; read when the deployment's shares are made. So a
controller that is killed forgets whom it served in its last SAVE_S, and nothing before: counters are then too low by at
most what their tenants were served in that time. What was in a pass at that moment runs again, and is charged again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from typing import Protocol

from scheduling.fair import FairShares

SAVE_S = 2.0


class CounterStore(Protocol):
    """Where counters are kept: part of `cluster.requests.ControllerStore`."""

    def counters(self, model: str) -> dict[str, float]: ...

    def save_counters(self, model: str, changed: Mapping[str, float], gone: Collection[str]) -> None: ...


class KeptShares:
    """Shares of one deployment that begin with what is kept of them. One thread."""

    def __init__(self, store: CounterStore, model: str) -> None:
        self.fair = FairShares()
        self._store = store
        self._model = model
        self._saved = store.counters(model)
        self._when = -math.inf
        self.fair.restore(self._saved)

    def save(self, *, is_last: bool = False) -> None:
        """Writes what has changed, if that was not done just before."""
        if not is_last and time.monotonic() - self._when < SAVE_S:
            return
        self._when = time.monotonic()
        now = self.fair.snapshot()
        changed = {tenant: counter for tenant, counter in now.items() if self._saved.get(tenant) != counter}
        gone = [tenant for tenant in self._saved if tenant not in now]
        if changed or gone:
            self._store.save_counters(self._model, changed, gone)
            self._saved = now
