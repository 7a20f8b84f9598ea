"""Verdicts that a checking process remembers: a request that is like one before need not be worked out again.

What "like" is, `cluster.likeness` says. Nothing is remembered of a graph whose shapes may follow from values
(`engine.known`). The file itself, and the tokens, are checked each time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.likeness import MAX_BYTES, Likeness

if TYPE_CHECKING:
    from api.worker import Verdict
    from polytrace.graph import Request

_MOST = 512  # verdicts, of all deployments


def is_remembered(request: Request) -> bool:
    """Whether its verdict follows from what is compared."""
    from engine.known import looks_at_data
    from polytrace.graph import Op

    return not any(isinstance(node, Op) and looks_at_data(node) for node in request.graph.nodes)


class Remembered:
    """Verdicts by likeness, those that were asked for last."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()

    def find(self, likeness: Likeness, num_bytes: int) -> Verdict | None:
        """The verdict on a request of this size that is like one before."""
        found = self._known.get(likeness.digest)
        if found is None:
            return None
        self._known.move_to_end(likeness.digest)
        return replace(found, demand=replace(found.demand, request_bytes=num_bytes))

    def keep(self, likeness: Likeness, verdict: Verdict) -> None:
        """For those that come after it."""
        if verdict.error is None and len(verdict.facts or b"") <= MAX_BYTES:
            self._known[likeness.digest] = verdict
            if len(self._known) > _MOST:
                self._known.popitem(last=False)
