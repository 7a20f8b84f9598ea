"""Which requests to a model that is called as it is go into one pass: those whose calls may be one call.

That is tried by the shard. What it did not merge goes alone from then on, so that nobody waits for the end of others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from scheduling.plan import Program, RequestId, ShardResult

MOST_CALLS = 16  # of one request, and requests in a pass
_MOST_KNOWN = 1024
_MOST_MISSES = 3


class Alike:
    """Requests whose calls have arguments of one structure."""

    __slots__ = ("misses",)

    def __init__(self) -> None:
        self.misses = 0  # passes of several in which no calls of two were one, since there was one

    @property
    def is_apart(self) -> bool:
        """Whether the shard does not merge them, as far as can be seen."""
        return self.misses >= _MOST_MISSES


class AlikeCalls:
    """Of one deployment."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Alike] = OrderedDict()

    def of(self, program: Program) -> Alike | None:
        """None of a request whose calls go alone: several structures, or many calls."""
        if program.structure is None or len(program.invokes) * 2 > MOST_CALLS:
            return None
        alike = self._known.setdefault(program.structure, Alike())
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        return alike

    def learn(self, went: Sequence[Alike], results: Iterable[ShardResult]) -> None:
        """These were in one pass."""
        if len(went) > 1:
            is_merged = any(len(set(owners)) > 1 for result in results for owners in result.merged)
            for one in set(went):
                one.misses = 0 if is_merged else one.misses + 1


def calls_merged(results: Iterable[ShardResult], request: RequestId, seen: set[RequestId] | None) -> int:
    """Calls that were one with a call of a request, at most; `seen`: the requests that it is told of, None: all."""
    groups = [owners for result in results for owners in result.merged if request in owners]
    return max((sum(seen is None or owner in seen for owner in owners) for owners in groups), default=0)
