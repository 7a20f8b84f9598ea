"""Requests of a map: sent, waited for, and made a part of. Threads share one worker."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from polytrace.backend import Backend
from polytrace.certificate import Certificate
from polytrace.errors import CapacityError, GraphError, RunError, TooLargeError
from polytrace.graph import Options, Request
from polytrace.maps.assembly import Member, request_of
from polytrace.maps.bodies import Measured
from polytrace.maps.combining import Way
from polytrace.maps.cutting import Chunk
from polytrace.maps.parts import Part, put_contribution, put_rows, raw_of
from polytrace.maps.running import top_contribution
from polytrace.tensors import RawTensor

_BUSY_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # how long to wait where the service is full


@dataclass(frozen=True, slots=True)
class Worker:
    """Runs chunks of one map."""

    backend: Backend
    measured: Measured
    options: Options
    is_skipping: bool

    def run(self, chunk: Chunk) -> Part:
        """The chunk's part. Raises what the service says, by the prompt's number where one prompt is to blame."""
        skipped = dict(chunk.skipped)
        pieces = list(self._pieces(chunk.members, skipped)) if chunk.members else []
        tensors: dict[str, RawTensor] = {}
        outputs = chunk.members[0].recorded.outputs if chunk.members else {}
        for name, output in outputs.items():
            if output.combined is not None:
                for number, (members, values) in enumerate(pieces):
                    put_contribution(tensors, name, number, self.contribution(name, members, values))
            elif pieces:
                rows = [
                    self._row(name, member, values[f"{name}/{place}"])
                    for members, values in pieces
                    for place, member in enumerate(members)
                ]
                put_rows(tensors, name, rows)
        return Part(
            number=chunk.number,
            prompts=chunk.prompts,
            skipped=dict(sorted(skipped.items())),
            path=None,
            tensors=tensors,
            names=tuple(name for name in outputs if name in tensors),
        )

    def certificate(self, chunk: Chunk) -> Certificate:
        """What the chunk's request would cost."""
        request = request_of(chunk.members, self.measured, self._seeded(chunk.members))
        return self.backend.validate(request).without_values()

    def probe(self, member: Member) -> str:
        """A digest of all numbers that the model gives for one prompt: another model gives others."""
        pieces = list(self._pieces([member], {}))
        if not pieces:
            return "this prompt cannot be run"
        ((_, values),) = pieces
        found = hashlib.sha256()
        for name in sorted(values):
            raw = raw_of(values[name])
            found.update(repr((name, raw.dtype, raw.shape)).encode())
            found.update(raw.data)
        return found.hexdigest()

    def contribution(self, name: str, members: Sequence[Member], values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What one request adds to a combined value."""
        combined = members[0].recorded.outputs[name].combined
        assert combined is not None
        if combined.way is not Way.TOP_K:
            prefix = f"{name}:"
            return {key.removeprefix(prefix): np.asarray(one) for key, one in values.items() if key.startswith(prefix)}
        return top_contribution(
            [np.asarray(values[f"{name}:values/{place}"]) for place in range(len(members))],
            [np.asarray(values[f"{name}:places/{place}"]) for place in range(len(members))],
            [member.number for member in members],
            self.measured.shapes[name].shape[1:],
            combined.number,
        )

    def _pieces(
        self, members: Sequence[Member], skipped: dict[int, str]
    ) -> Iterator[tuple[Sequence[Member], Mapping[str, Any]]]:
        """The chunk in one request; in halves, and these again, where a prompt's failure fails all."""
        try:
            values = self.values(request_of(members, self.measured, self._seeded(members)))
        except (GraphError, RunError, TooLargeError) as error:
            if len(members) > 1:
                half = len(members) // 2
                yield from self._pieces(members[:half], skipped)
                yield from self._pieces(members[half:], skipped)
                return
            told = f"prompt {members[0].number}: {error.message}"
            if not self.is_skipping:
                raise type(error)(told, where=error.where) from error
            skipped[members[0].number] = told
            return
        yield members, values

    def values(self, request: Request) -> Mapping[str, Any]:
        """What the request saves; where the service is full, later."""
        for wait_s in _BUSY_S:
            try:
                return self.backend.run(request).values
            except CapacityError:
                time.sleep(wait_s)
        return self.backend.run(request).values

    def _seeded(self, members: Sequence[Member]) -> Options:
        if not members[0].recorded.draws:
            return self.options
        return replace(self.options, seed=(self.options.seed + members[0].number) % (1 << 63))

    def _row(self, name: str, member: Member, value: Any) -> Any:
        if tuple(value.shape[:1]) != (1,):
            raise GraphError(
                f"{name!r} has shape {list(value.shape)} for item {member.number}: its first dimension is the prompt's",
                where=member.recorded.outputs[name].where,
            )
        return value
