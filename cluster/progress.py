"""How far the shards of a deployment are with their weights, as lines for people: their own and all together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from engine.reading import Reading

_TELL_S = 1.0  # between two lines for all


class Loading:
    """Hears every shard of a deployment while they load, and tells of all of them."""

    def __init__(self, names: Sequence[str], report: Callable[[str], None], *, tell_s: float = _TELL_S) -> None:
        """`names` are those of the shards, by index."""
        self._names = names
        self._report = report
        self._tell_s = tell_s
        self._far: dict[int, Reading] = {}
        self._began = self._told = time.monotonic()

    def hear(self, index: int, told: str | Reading) -> None:
        """Takes in what one shard says."""
        if isinstance(told, str):
            self._report(f"{self._names[index]}: {told}")
            return
        self._far[index] = told
        now = time.monotonic()
        if now - self._told >= self._tell_s:
            self._told = now
            self._report(self._all(now - self._began))

    def _all(self, seconds: float) -> str:
        together = Reading(
            read_bytes=sum(far.read_bytes for far in self._far.values()),
            total_bytes=sum(far.total_bytes for far in self._far.values()),
            seconds=seconds,
        )
        shares = [
            f"{100 * far.read_bytes // max(1, far.total_bytes)} %" if far is not None else "-"
            for far in (self._far.get(index) for index in range(len(self._names)))
        ]
        return f"loading: {together}; by shard {', '.join(shares)}"
