"""Verdicts that the gateway remembers: a request that is like one before need not go to a checking process.

What "like" is, `cluster.likeness` says. Nothing is remembered of a graph whose shapes may follow from values
(`engine.known`); a worker says so. The file itself, and the tokens, are checked each time.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from api.hops import hop
from api.served import Checker, Served
from api.worker import Verdict
from cluster.likeness import MAX_BYTES, Likeness, likeness
from polytrace.errors import PolytraceError, WireError
from scheduling.checks import check_prompt

_MOST = 512  # verdicts, of all deployments
_AT_ONCE_BYTES = 8 << 10  # of a request that is looked at in less time than a thread takes to begin


class Remembered:
    """Verdicts by likeness, those that were asked for last. Belongs to one event loop."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()

    async def check(self, model: str, served: Served, path: Path, *, contents: Path, certify: bool) -> Verdict:
        """As `Checker.check`, of a request to what is served."""
        num_bytes = path.stat().st_size
        like: Likeness | None = None
        if num_bytes <= MAX_BYTES and not certify:
            told = model, served.version, contents, path
            like = _likeness(*told) if num_bytes <= _AT_ONCE_BYTES else await hop(_likeness, *told)
        if like is not None and (known := self._known.get(like.digest)) is not None:
            self._known.move_to_end(like.digest)
            try:
                check_prompt(like.tokens, served.description)
            except PolytraceError as error:
                return Verdict(error=error.to_fields())
            return replace(known, demand=replace(known.demand, request_bytes=num_bytes))
        verdict = await self._checker.check(model, served.version, path, contents=contents, certify=certify)
        if like is not None and verdict.holds_alike:
            self._keep(like, verdict)
        return verdict

    def _keep(self, like: Likeness, verdict: Verdict) -> None:
        if verdict.error is None and len(verdict.facts or b"") <= MAX_BYTES:
            self._known[like.digest] = verdict
            if len(self._known) > _MOST:
                self._known.popitem(last=False)


def _likeness(model: str, version: str, contents: Path, path: Path) -> Likeness | None:
    """None also of what is no request: a worker says what is wrong with it."""
    try:
        return likeness(model, version, str(contents), path.read_bytes())
    except WireError:
        return None
