"""A dataset in pieces: which prompts go into one request, and which parts an earlier run has made already.

The cut depends on the prompts and on `Cut` alone, never on time: so a map that goes on after a crash makes the parts
that it would have made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from polytrace.errors import ConflictError, GraphError
from polytrace.maps.assembly import Member
from polytrace.maps.bodies import Measured
from polytrace.maps.datasets import Datum
from polytrace.maps.index import Cut, DatasetDigest, Index
from polytrace.maps.members import Source
from polytrace.maps.parts import Part
from polytrace.maps.rowwise import MixesPromptsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Prompts that become one part."""

    number: int
    prompts: range
    members: tuple[Member, ...]
    skipped: dict[int, str]  # and why, of those that cannot be run
    dataset: str  # a digest of all prompts up to its end
    stored: Part | None = None  # what an earlier run made of it


@dataclass(slots=True)
class _Open:
    """A chunk that is being filled."""

    members: list[Member] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    bytes: int = 0


class Cutter:
    """Cuts one dataset."""

    def __init__(
        self, source: Source, measured: Measured, cut: Cut, index: Index | None, *, is_skipping: bool = False
    ) -> None:
        """`is_skipping`: prompts that the body cannot be recorded for are left out."""
        self._source = source
        self._is_skipping = is_skipping
        self._measured = measured
        self._cut = cut
        self._index = index
        self._digest = DatasetDigest()
        self._number = 0  # of the next chunk
        self._first = 0  # the first prompt of the next chunk

    def chunks(self, data: Iterator[Datum]) -> Iterator[Chunk]:
        """What is stored first, then the rest. Raises ConflictError where what is stored is of other prompts."""
        yield from self._stored(data)
        own, stop = _Open(), self._first
        for datum in data:
            if self._index is not None and self._index.is_complete:
                raise ConflictError(
                    f"{self._index.folder.path('')} is complete with {self._first} prompts, and this dataset has more: "
                    "map to another folder"
                )
            member = self._member(datum, own.skipped)
            if member is not None:
                size = self._row_bytes(member)
                if own.members and not self._fits(own, member, size):
                    yield self._close(own, stop)
                    own = _Open()
                own.members.append(member)
                own.tokens += len(member.sequence)
                own.bytes += size
            self._note(datum)
            stop = datum.number + 1
        if own.members or own.skipped:
            yield self._close(own, stop)

    def _stored(self, data: Iterator[Datum]) -> Iterator[Chunk]:
        if self._index is None:
            return
        for place, entry in enumerate(list(self._index.parts)):
            first, stop = entry["prompts"]
            own: list[Datum] = []
            for _ in range(first, stop):
                datum = next(data, None)
                if datum is None:
                    raise ConflictError(
                        f"{self._index.folder.path('')} has parts of {stop} prompts and more, and this dataset ends "
                        f"after {first + len(own)}: map to another folder"
                    )
                own.append(datum)
                self._note(datum)
            if self._digest.value() != entry["dataset"]:
                raise ConflictError(
                    f"{self._index.folder.path(entry['file'])} is of other prompts than {first} to {stop - 1} of this "
                    "dataset: map to another folder"
                )
            part = self._index.read(place)
            if part is None:  # lost or damaged: from here on everything is made again
                self._index.cut_off(place)
                yield self._close(self._opened(own), stop)
                return
            yield self._close(_Open(), stop, part)

    def _opened(self, data: list[Datum]) -> _Open:
        skipped: dict[int, str] = {}
        members = [self._member(datum, skipped) for datum in data]
        return _Open(members=[member for member in members if member is not None], skipped=skipped)

    def _member(self, datum: Datum, skipped: dict[int, str]) -> Member | None:
        """Recorded anew where the body asks for lengths; what it does then may differ from what it did first."""
        problem = datum.problem
        if problem is None:
            try:
                return self._source.member(datum)
            except MixesPromptsError as mixed:
                told = f"for prompt {datum.number}, of {len(datum.sequence)} tokens, {mixed.told}"
                raise GraphError(told, where=mixed.where) from None
            except GraphError as error:
                problem = f"prompt {datum.number}: {error.message}"
                if not self._is_skipping:
                    raise GraphError(problem, where=error.where) from error
        skipped[datum.number] = problem
        return None

    def _fits(self, own: _Open, member: Member, size: int) -> bool:
        return (
            own.tokens + len(member.sequence) <= self._cut.tokens
            and len(own.members) < self._cut.prompts
            and own.bytes + size <= self._cut.bytes
        )

    def _row_bytes(self, member: Member) -> int:
        return sum(self._measured.row_bytes(name, len(member.sequence)) for name in member.recorded.outputs)

    def _note(self, datum: Datum) -> None:
        try:
            self._digest.add(self._source.told(datum) if datum.problem is None else "skipped")
        except GraphError:  # an item of a sweep that its body cannot be recorded for
            if not self._is_skipping:
                raise
            self._digest.add("skipped")

    def _close(self, own: _Open, stop: int, stored: Part | None = None) -> Chunk:
        chunk = Chunk(
            number=self._number,
            prompts=range(self._first, stop),
            members=tuple(own.members),
            skipped=own.skipped,
            dataset=self._digest.value(),
            stored=stored,
        )
        self._number += 1
        self._first = stop
        return chunk
