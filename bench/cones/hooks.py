"""Hooks written by hand for runs that go through a plain Hugging Face model as one batch.

Shared by everything that does not use polytrace or the peer. A batch's tensors may begin with pads or, where a cache
holds the beginning, later in the sequence: `shifts` says per row by how much its positions moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cones.workloads import Edit, Point, Read, Run, Workload
from bench.plain import Edit as Hook
from bench.plain import Plain, hooked

# (run, point, layer) -> the whole tensor of that run, [tokens, features].
Sources = dict[tuple[int, Point, int], Tensor]
Values = dict[int, Tensor]  # what each run gives back


class Batch:
    """Runs that go through the model together, and what their hooks see."""

    def __init__(self, plain: Plain, workload: Workload, members: Sequence[int], shifts: Sequence[int]) -> None:
        self.plain = plain
        self.workload = workload
        self.members = members
        self.shifts = shifts
        self.values: Values = {}
        self._lens: dict[tuple[int, int], Tensor] = {}

    @contextlib.contextmanager
    def hooks(
        self, sources: Sources, *, wanted: Mapping[int, Sequence[tuple[Point, int]]] | None = None
    ) -> Iterator[None]:
        """Runs the block with all edits, early reads, and `wanted` tensors of members (by run) put into `sources`."""
        steps: dict[tuple[Point, int], list[Callable[[Tensor], None]]] = {}
        for row, member in enumerate(self.members):
            for edit in self.workload.runs[member].edits:
                steps.setdefault((edit.point, edit.layer), []).append(self._edit(row, edit, sources))
        for row, member in enumerate(self.members):
            for point, layer in (wanted or {}).get(member, ()):
                steps.setdefault((point, layer), []).append(self._source(row, (member, point, layer), sources))
            for layer, read in self._reads(row, self.workload.runs[member]):
                steps.setdefault((Point.RESIDUAL, layer), []).append(read)
        outputs = {name_of(*place): _all(done) for place, done in steps.items() if place[0] is not Point.HEADS}
        inputs = {name_of(*place): _all(done) for place, done in steps.items() if place[0] is Point.HEADS}
        with hooked(self.plain.model, outputs=outputs, inputs=inputs):
            yield

    def take_logits(self, logits: Tensor) -> None:
        """Reads of the last token: `logits` is `[members, vocabulary]`."""
        for row, member in enumerate(self.members):
            run = self.workload.runs[member]
            if run.read is Read.LOGITS:
                self.values[member] = logits[row]
            elif run.read is Read.DIFFERENCE:
                self.values[member] = logits[row, self.workload.good] - logits[row, self.workload.bad]

    def take_lenses(self) -> None:
        """What each layer gave for a lens, as one tensor."""
        for member in self.members:
            run = self.workload.runs[member]
            if run.read is Read.LENS:
                layers = range(self.plain.model.config.num_hidden_layers)
                self.values[member] = torch.stack([self._lens[member, layer] for layer in layers])

    def _reads(self, row: int, run: Run) -> Iterator[tuple[int, Callable[[Tensor], None]]]:
        member, last = self.members[row], self.shifts[row] + len(run.ids) - 1
        if run.read is Read.HIDDEN:
            yield run.layer, lambda hidden: self.values.__setitem__(member, hidden[row, last].clone())
        if run.read is Read.LENS:
            for layer in range(self.plain.model.config.num_hidden_layers):
                yield layer, self._look(row, member, layer)

    def _look(self, row: int, member: int, layer: int) -> Callable[[Tensor], None]:
        root: Any = self.plain.model

        def look(hidden: Tensor) -> None:
            shift = self.shifts[row]
            own = hidden[row, shift : shift + len(self.workload.runs[member].ids)]
            self._lens[member, layer] = root.lm_head(root.model.norm(own)).amax(-1)

        return look

    def _edit(self, row: int, edit: Edit, sources: Sources) -> Callable[[Tensor], None]:
        begin = edit.start + self.shifts[row]
        start, stop = max(0, begin), edit.stop + self.shifts[row]
        first, last = edit.channels or (0, None)

        def apply(hidden: Tensor) -> None:
            if stop <= start:
                return  # the cache holds these rows, edited
            rows = hidden[row, start:stop, first:last]
            if edit.source is not None:
                rows.copy_(sources[edit.source, edit.point, edit.layer][edit.start + start - begin : edit.stop])
            elif edit.added is not None:
                rows.add_(edit.added[start - begin :])
            else:
                rows.zero_()

        return apply

    def _source(self, row: int, key: tuple[int, Point, int], sources: Sources) -> Callable[[Tensor], None]:
        shift, length = self.shifts[row], len(self.workload.runs[key[0]].ids)

        assert shift >= 0, "a run that others take tensors from runs whole"

        def keep(hidden: Tensor) -> None:
            sources[key] = hidden[row, shift : shift + length].clone()

        return keep


def name_of(point: Point, layer: int) -> str:
    """The module whose output, or for heads input, is the tensor."""
    names = {
        Point.EMBEDDING: "model.embed_tokens",
        Point.RESIDUAL: f"model.layers.{layer}",
        Point.MLP: f"model.layers.{layer}.mlp",
        Point.HEADS: f"model.layers.{layer}.self_attn.o_proj",
    }
    return names[point]


def wanted_sources(workload: Workload) -> dict[int, list[tuple[Point, int]]]:
    """The tensors of each run that other runs are given."""
    found: dict[int, dict[tuple[Point, int], None]] = {}
    for run in workload.runs:
        for edit in run.edits:
            if edit.source is not None:
                found.setdefault(edit.source, {})[edit.point, edit.layer] = None
    return {run: list(places) for run, places in found.items()}


def read_sources(plain: Plain, workload: Workload) -> Sources:
    """Those tensors, from one plain run each."""
    sources: Sources = {}
    for member, places in wanted_sources(workload).items():
        batch = Batch(plain, workload, [member], [0])
        with batch.hooks(sources, wanted={member: places}), torch.inference_mode():
            plain.model(input_ids=torch.tensor([workload.runs[member].ids]), use_cache=False)
    return sources


def _all(steps: Sequence[Callable[[Tensor], None]]) -> Hook:
    def run(hidden: Tensor) -> None:
        for step in steps:
            step(hidden)

    return run
