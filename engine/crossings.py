"""What a pass hands from stage to stage: hidden rows, or their gradients, and values of requests."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.fragments import RequestState
from engine.links import Links
from engine.messages import receive_values, send_values
from engine.stopwatch import Stopwatch
from engine.streams import Streams
from engine.tapes import Tapes
from scheduling.levels import Levels
from scheduling.plan import Phase, Plan, StageWork, Transfer


class Crossings:
    """Of one shard, with the stages beside it."""

    def __init__(
        self,
        links: Links,
        device: torch.device,
        tapes: Tapes,
        levels: Levels,
        *,
        first_layer: int,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        """`first_layer`: of this stage; `dtype`: of hidden rows."""
        self._links = links
        self._device = device
        self._tapes = tapes
        self._levels = levels
        self._first_layer = first_layer
        self._hidden_size = hidden_size
        self._dtype = dtype

    def exchange(self, states: list[RequestState], transfers: list[tuple[Transfer, ...]], watch: Stopwatch) -> None:
        """Held values, in any direction."""
        here = self._links.stage
        targets = sorted({t.target for each in transfers for t in each if t.source == here})
        sources = sorted({t.source for each in transfers for t in each if t.target == here})
        for target in targets:
            send_values(self._links, self._device, states, transfers, target)
        watch.lap(Phase.COMPUTING)
        for source in sources:
            receive_values(self._links, states, transfers, source)

    def receive(
        self, plan: Plan, streams: Streams, states: list[RequestState], works: list[StageWork]
    ) -> Tensor | None:
        """Hidden rows of the stage before, or their gradients from the one behind; and values."""
        hidden = None
        source = self._neighbour(plan, before=True)
        if source is not None:
            num_rows = streams.layer(self._first_layer).num_padded
            shape: tuple[int, ...] = (1, num_rows, self._hidden_size)
            if plan.of is not None:
                shape = self._tapes.of(plan.of).shape_out
            hidden = self._links.receive(shape, self._dtype, source)
        arriving = [work.arriving for work in works]
        sources = {t.source for each in arriving for t in each}
        if source is not None:
            sources.add(source)  # its flags come even when no value does
        for stage in sorted(sources):
            receive_values(self._links, states, arriving, stage)
        return hidden

    def send(self, plan: Plan, states: list[RequestState], works: list[StageWork], hidden: Tensor | None) -> int:
        """Returns the bytes of hidden rows, or gradients, sent."""
        leaving = [work.leaving for work in works]
        targets = {t.target for each in leaving for t in each}
        hidden_bytes = 0
        target = self._neighbour(plan, before=False)
        if target is not None:
            assert hidden is not None, "the window ended before its last layer, but a later stage has rows to run"
            self._links.send(hidden, target)
            hidden_bytes = hidden.nbytes
            targets.add(target)
        for stage in sorted(targets):
            send_values(self._links, self._device, states, leaving, stage)
        return hidden_bytes

    def _neighbour(self, plan: Plan, *, before: bool) -> int | None:
        """The stage that hands its rows to this one, or gets them from it, in the direction of the pass.

        Gradients go no further back than to the stage where the first of them stops.
        """
        here, first = self._links.stage, 0
        if plan.of is not None:
            first, before = self.stage_of(min(self._tapes.of(plan.of).cuts)), not before
        other = here - 1 if before else here + 1
        return other if first <= min(here, other) and max(here, other) < plan.num_stages else None

    def stage_of(self, order: int) -> int:
        """The stage at which something is visited."""
        levels = self._levels
        return levels.stages[min(levels.of(order), levels.count - 1)]
