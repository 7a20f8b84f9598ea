"""What shards have room for between passes: trunks, caches of generations, and prefixes while nobody needs the room.

Counted for the shard that holds most. Whatever takes room gets it from prefixes first, the least recently used ones.
"""

from __future__ import annotations

from scheduling.plan import RequestId
from scheduling.prefixes import Prefix, Prefixes


class Memory:
    """Bytes of the shards' stores, and who has them."""

    def __init__(self, most_bytes: int, prefix_bytes: int | None) -> None:
        """`prefix_bytes`: as of `PassPolicy`."""
        self.most_bytes = most_bytes
        self.taken_bytes = 0  # without prefixes
        self.prefixes = Prefixes(most_bytes // 2 if prefix_bytes is None else prefix_bytes)
        self.dropped: list[RequestId] = []  # owners of prefixes that shards have not been told to forget

    def take(self, num_bytes: int) -> bool:
        """Takes so many; False when they are not there."""
        if self.taken_bytes + num_bytes > self.most_bytes:
            return False
        self.taken_bytes += num_bytes
        while self.taken_bytes + self.prefixes.held_bytes > self.most_bytes:
            self._drop_oldest()
        return True

    def give(self, num_bytes: int) -> None:
        self.taken_bytes -= num_bytes

    def keep(self, prefix: Prefix) -> bool:
        """Keeps a cache whose bytes have been given back; False when shards should forget it."""
        if prefix.num_bytes > min(self.prefixes.budget_bytes, self.most_bytes - self.taken_bytes):
            return False
        if not self.prefixes.keep(prefix):
            return False
        for other in self.prefixes.outdated(prefix):
            self._drop(other)
        most = min(self.prefixes.budget_bytes, self.most_bytes - self.taken_bytes)
        while self.prefixes.held_bytes > most:
            self._drop_oldest()
        return True

    def forget_prefixes(self) -> None:
        while self.prefixes.oldest is not None:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest = self.prefixes.oldest
        assert oldest is not None, "bytes that nobody holds"
        self._drop(oldest)

    def _drop(self, prefix: Prefix) -> None:
        self.prefixes.drop(prefix)
        self.dropped.append(prefix.trunk[0])
