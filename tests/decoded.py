"""Passes over caches that are written down by hand, and what the model makes of their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, model_of
from torch import Tensor

from engine.local import LocalBackend
from polytrace.graph import Port
from scheduling.plan import NOWHERE, PAGE, Grow, PassId, Plan, RequestId, Segment, TrunkId

REQUEST = RequestId("decoded")


def cache(number: int) -> TrunkId:
    """Of a sequence."""
    return TrunkId((REQUEST, -1 - number))


def room(positions: int) -> int:
    """Whole pages for so many."""
    return -(-positions // PAGE) * PAGE


@dataclass
class Pass:
    """Segments and grows of a pass, on their way to a plan."""

    num_layers: int
    segments: list[Segment] = field(default_factory=list)
    grows: list[Grow] = field(default_factory=list)
    names: dict[int, object] = field(default_factory=dict)  # by segment: whose rows they are

    def rows(self, name: object, tokens: Sequence[int], start: int = 0, parent: int | None = None) -> int:
        """Rows of the positions from `start` on; returns their segment."""
        stop = start + len(tokens)
        self.segments.append(
            Segment(
                parent=parent,
                starts=(start,) * (self.num_layers + 1),
                stops=(stop,) * self.num_layers,
                head=tuple(range(start, stop)),
                tokens=tuple(tokens),
            )
        )
        self.names[len(self.segments) - 1] = name
        return len(self.segments) - 1

    def trunk(self, trunk: TrunkId, begin: int, stop: int, parent: int | None = None) -> int:
        """A cache that rows fork from."""
        self.segments.append(
            Segment(
                parent=parent,
                trunk=trunk,
                starts=(begin,) * (self.num_layers + 1),
                stops=(stop,) * self.num_layers,
                outputs=(NOWHERE,) * self.num_layers,
                head=(),
                tokens=(),
            )
        )
        return len(self.segments) - 1

    def grow(self, trunk: TrunkId, segment: int, start: int, stop: int, begin: int = 0, capacity: int = 0) -> None:
        capacity = capacity or room(stop - begin)
        self.grows.append(Grow(trunk=trunk, segment=segment, begin=begin, start=start, stop=stop, capacity=capacity))


class Machine:
    """A tiny model in this process, and the plain one beside it."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype = torch.float32, threads: int = 1) -> None:
        self.family = FAMILIES[family]
        self.plain = model_of(family, dtype)
        self.plain.save_pretrained(folder)
        self.backend = LocalBackend(str(folder), threads=threads)
        self.shard = self.backend.shard
        self.store = self.shard.store
        self.num_layers = self.backend.description.num_layers
        self._numbers = count(1)
        self._norm: Any = self.shard.loaded.model.get_submodule(self.family.norm)
        self._until = next(
            info.order
            for info in self.backend.description.sites
            if info.module == self.family.norm and info.port is Port.OUTPUT
        )

    def pass_(self) -> Pass:
        return Pass(self.num_layers)

    def plan(self, own: Pass) -> Plan:
        rows = [segment for segment in own.segments if segment.trunk is None]
        return Plan(
            pass_id=PassId(next(self._numbers)),
            segments=tuple(own.segments),
            layer_rows=tuple(
                sum(max(0, one.stops[layer] - one.starts[layer]) for one in rows) for layer in range(self.num_layers)
            ),
            views=(),
            members=(),
            keeps=(),
            grows=tuple(own.grows),
            until=self._until,
            num_stages=1,
        )

    def run(self, own: Pass, **changes: Any) -> dict[object, Tensor]:
        """`[rows, D]` behind the last norm, by name."""
        found: list[Tensor] = []
        handle = self._norm.register_forward_hook(lambda _module, _args, output: found.append(output[0]))
        try:
            self.shard.run(replace(self.plan(own), **changes))
        finally:
            handle.remove()
        out, first = dict[object, Tensor](), 0
        for place, segment in enumerate(own.segments):
            if segment.trunk is None:
                out[own.names[place]] = found[0][first : first + len(segment.head)]
                first += len(segment.head)
        return out

    def whole(self, tokens: Sequence[int]) -> Tensor:
        """`[tokens, D]` of a text that has a pass to itself."""
        own = self.pass_()
        own.rows("whole", tokens)
        return self.run(own)["whole"]

    def by_hugging_face(self, tokens: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return self.plain(torch.tensor([list(tokens)]), output_hidden_states=True).hidden_states[-1][0]  # type: ignore[no-any-return]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
