"""Programs that the controller remembers: a stored request that is like one before need not be worked out again.

Of a request that only reads, its program follows from what `cluster.likeness` compares and what was found out when it
was checked: tokens and seed are put in. Of one that writes it does not: the edits in a program name what is written by
its content, so that rows are shared where that is the same (`scheduling.cones`). There the whole request must be.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b

from cluster.likeness import MAX_BYTES, Likeness, likeness
from cluster.requests import Claimed
from polytrace.description import ModelDescription
from polytrace.graph import Write
from scheduling.plan import Program, RequestId

_MOST_BYTES = 4 << 20  # of the requests and facts that programs are remembered of: in memory a program is many times it


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkedOut:
    """A request's program, nobody's yet and without files, and what a result of it needs."""

    program: Program
    room: int  # bytes before the data
    contents: Mapping[str, str]  # constants that stand on the service -> their files


@dataclass(frozen=True, slots=True)
class Known:
    """A claimed request, as one that another may be like."""

    like: Likeness
    content: bytes  # a digest of all of it
    beside: tuple[Hashable, ...]  # what else a program follows from
    num_bytes: int


class KnownPrograms:
    """Those that were asked for last. For one thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Hashable, ...], tuple[WorkedOut, int]] = OrderedDict()
        self._bytes = 0

    def find(self, one: Known, request: RequestId) -> WorkedOut | None:
        """What came of a request like this one, as this one's."""
        for key in (_key(one, is_written=False), _key(one, is_written=True)):
            if key in self._known:
                self._known.move_to_end(key)
                found, _ = self._known[key]
                invokes = (replace(found.program.invokes[0], sequences=(one.like.tokens,)),)
                program = replace(found.program, request=request, invokes=invokes, seed=one.like.seed)
                return replace(found, program=program)
        return None

    def keep(self, one: Known, worked_out: WorkedOut) -> None:
        """For those that come after it."""
        is_written = any(isinstance(node, Write) for node in worked_out.program.graph.nodes)
        key = _key(one, is_written=is_written)
        self._bytes += one.num_bytes - self._known.pop(key, (None, 0))[1]
        nobodys = tuple([replace(invoke, sequences=()) for invoke in worked_out.program.invokes])  # no prompt stays
        program = replace(worked_out.program, constants={}, invokes=nobodys)
        self._known[key] = replace(worked_out, program=program), one.num_bytes
        while self._bytes > _MOST_BYTES:
            _, (_, num_bytes) = self._known.popitem(last=False)
            self._bytes -= num_bytes


def known(claimed: Claimed, description: ModelDescription) -> Known | None:
    """None where nothing is like it. Raises WireError, and OSError where its file is gone."""
    if claimed.path.stat().st_size > MAX_BYTES or len(claimed.facts) > MAX_BYTES:
        return None
    content = claimed.path.read_bytes()
    like = likeness(description.name, "", str(claimed.contents), content)  # one description: that of its deployment
    if like is None:
        return None
    beside = claimed.facts, description.limits.pass_tokens
    return Known(like, blake2b(content, digest_size=32).digest(), beside, len(content) + len(claimed.facts))


def _key(one: Known, *, is_written: bool) -> tuple[Hashable, ...]:
    return one.like.digest, *one.beside, one.content if is_written else None
