"""The best that a person does by hand with the library's own means, and no more than people really do.

- (a), (b), (c-last), (h): the unedited run's keys and values are kept (`past_key_values`), cropped to the first token
  that a run changes; only the tokens from there on run, through all layers, batched by position.
- (c): heads are silent from token 0 on, so there is no prefix to keep: batched whole runs.
- (d): the few-shot prefix runs once, questions are batched behind its keys and values.
- (e), (g): a hook stops the forward after the last layer that is read; batched by depth and length.
- (f): one run with a hook on every layer.
- Everywhere: pads on the right, where a causal model needs no mask, and the head on the needed rows only.
Nobody starts a model in the middle from kept hidden states without writing the model anew, so nor does this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bench.cones.cones import last_layers
from bench.cones.hooks import Batch, Sources, Values, name_of, wanted_sources
from bench.cones.workloads import Point, Read, Workload
from bench.plain import Plain, hooked

# Keys and values of one run: a pair [kv heads, tokens, head width] for each layer.
Kept = list[tuple[Tensor, Tensor]]


class _StopError(Exception):
    """Ends a forward from a hook."""


class ByHand:
    """One workload, done by hand."""

    def __init__(self, plain: Plain, workload: Workload, *, rows: int) -> None:
        self.plain = plain
        self.workload = workload
        self.rows = rows  # tokens of a batch
        self._until = last_layers(workload, plain.model.config.num_hidden_layers)
        self._wanted = wanted_sources(workload)
        runs = workload.runs
        self._parents = {run.parent for run in runs if run.parent is not None and run.position > 0}
        self._levels: list[list[int]] = []
        depths: list[int] = []
        for member, run in enumerate(runs):
            depths.append(0 if run.parent is None or run.position == 0 else depths[run.parent] + 1)
            while len(self._levels) <= depths[-1]:
                self._levels.append([])
            self._levels[depths[-1]].append(member)

    @torch.inference_mode()
    def __call__(self) -> Values:
        values: Values = {}
        kept: dict[int, Kept] = {}
        sources: Sources = {}
        for depth, members in enumerate(self._levels):
            # Runs that others take tensors from go first: within a level they may be another's source.
            first = [member for member in members if member in self._wanted]
            for group in (first, [member for member in members if member not in self._wanted]):
                for chosen in self._batches(group, is_cached=depth > 0):
                    self._run(chosen, kept, sources, values, is_cached=depth > 0)
        return values

    def token_layers(self) -> int:
        """Rows x layers that this runs, pads included."""
        total = 0
        for depth, members in enumerate(self._levels):
            first = [member for member in members if member in self._wanted]
            for group in (first, [member for member in members if member not in self._wanted]):
                for chosen in self._batches(group, is_cached=depth > 0):
                    begin = self._begin(chosen, is_cached=depth > 0)
                    longest = max(len(self.workload.runs[member].ids) for member in chosen) - begin
                    total += len(chosen) * longest * max(self._until[member] for member in chosen)
        return total

    def _begin(self, chosen: Sequence[int], *, is_cached: bool) -> int:
        return min(self.workload.runs[member].position for member in chosen) if is_cached else 0

    def _batches(self, members: Sequence[int], *, is_cached: bool) -> Iterator[list[int]]:
        runs = self.workload.runs

        def order(member: int) -> tuple[int, int, int]:
            return self._until[member], runs[member].position if is_cached else 0, len(runs[member].ids)

        chosen: list[int] = []
        for member in sorted(members, key=order):
            if chosen:
                together = [*chosen, member]
                longest = max(len(runs[other].ids) for other in together) - self._begin(together, is_cached=is_cached)
                if len(together) * longest > self.rows or self._until[member] != self._until[chosen[0]]:
                    yield chosen
                    chosen = []
            chosen.append(member)
        if chosen:
            yield chosen

    def _run(
        self, chosen: list[int], kept: dict[int, Kept], sources: Sources, values: Values, *, is_cached: bool
    ) -> None:
        runs = [self.workload.runs[member] for member in chosen]
        begin = self._begin(chosen, is_cached=is_cached)
        longest = max(len(run.ids) for run in runs) - begin
        ids = torch.tensor([[*run.ids[begin:], *[0] * (longest + begin - len(run.ids))] for run in runs])
        cache = None
        is_parent = any(member in self._parents for member in chosen)
        if is_cached:
            parents = [kept[run.parent] for run in runs if run.parent is not None]
            cache = DynamicCache(
                [
                    (
                        torch.stack([parent[layer][0][:, :begin] for parent in parents]),
                        torch.stack([parent[layer][1][:, :begin] for parent in parents]),
                    )
                    for layer in range(len(parents[0]))
                ]
            )
        elif is_parent:
            cache = DynamicCache(config=self.plain.model.config)
        batch = Batch(self.plain, self.workload, chosen, [-begin] * len(chosen))
        root: Any = self.plain.model
        until = max(self._until[member] for member in chosen)
        output: Any = None
        with batch.hooks(sources, wanted=self._wanted), self._stop_after(until):
            output = root.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        if output is not None and any(run.read in (Read.LOGITS, Read.DIFFERENCE) for run in runs):
            last = torch.tensor([len(run.ids) - 1 - begin for run in runs])
            batch.take_logits(root.lm_head(output.last_hidden_state[torch.arange(len(runs)), last]))
        batch.take_lenses()
        values |= batch.values
        if is_parent:
            assert cache is not None
            for row, member in enumerate(chosen):
                kept[member] = [(keys[row], values_[row]) for keys, values_, *_ in cache]

    @contextlib.contextmanager
    def _stop_after(self, until: int) -> Iterator[None]:
        """Ends the forward after that many layers, when there are more."""
        if until >= self.plain.model.config.num_hidden_layers:
            yield
            return

        def stop(_: Tensor) -> None:
            raise _StopError

        with (
            contextlib.suppress(_StopError),
            hooked(self.plain.model, outputs={name_of(Point.RESIDUAL, until - 1): stop}, inputs={}),
        ):
            yield
