"""The tape of a pass: what is kept of its forward so that gradients can be run through it, and where they stop.

Wherever a graph looks at gradients or changes them, and wherever it has written, the autograd graph of the model is
cut: a *seam* (`engine.seams`). On the way back (`sweep`) the gradients that have come to the leaves of a seam are shown
to the graphs, and what these leave of them goes on further back.

Invariants
- Seams are where the plan says, whoever is in the pass, and in front of every layer: another seam would change the
  order in which gradients are added up, and so their last bits. Those in front of layers let no gradient go on before
  all of it is there, so no layer is run back more often than it has seams inside, and stages change no bit.
- Parameters are frozen: nothing before the first seam is kept.
- A sweep leaves the tape as it was: there may be several, each for some of the pass's members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from engine.arguments import Selector
from engine.gradient_port import GradientPort
from engine.head_outputs import HeadOutputs
from engine.head_seam import HeadSeam
from engine.lane_seam import LaneSeam
from engine.leaves import port_leaves
from engine.pair_seam import PairSeam, tensors_of
from engine.points import Pairs
from engine.saved import SavedTensors
from engine.seams import Seam, TensorSeam, go_back, handed_on
from engine.side_by_side import SideBySide
from engine.views import InvokeRows
from engine.writes import PortValue, with_member
from polytrace.description import SiteInfo
from polytrace.graph import Port
from scheduling.plan import RequestId

# T = packed rows, D = hidden

# Ports whose values others in the model hold as well.
_HELD = frozenset({Port.INPUT, Port.INPUTS, Port.OUTPUT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What the tape needs to know of a port."""

    order: int
    port: Port
    selectors: tuple[Selector, ...]  # of its tensors that have rows
    layouts: Mapping[Selector, int]  # as of `PortValue`


@dataclass(slots=True, kw_only=True)
class Tape:
    """One pass on one shard."""

    cuts: frozenset[int]  # orders
    saved: SavedTensors = field(default_factory=SavedTensors)
    reruns: frozenset[int] = frozenset()  # layers that keep only what comes in
    seams: list[tuple[int | None, Seam]] = field(default_factory=list)  # with their orders, as the forward came to them
    rows: dict[RequestId, dict[int, InvokeRows]] = field(default_factory=dict)  # of each member, by invoke
    holders: set[tuple[RequestId, int]] = field(default_factory=set)  # members that may run it back, with their waves
    hidden_in: Tensor | None = None  # `[1, T, D]`, a leaf: what an earlier stage handed on
    hidden_out: Tensor | None = None  # `[1, T, D]`: what goes to a later one

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forwards inside are recorded. Fragments are not: they run without autograd."""
        with torch.enable_grad(), self.saved.keeping():
            yield

    def receive(self, hidden_1TD: Tensor, *, has_seam: bool) -> Tensor:
        """Hidden states of an earlier stage, as they enter the forward. `has_seam`: there is a seam before them."""
        if not has_seam:
            return hidden_1TD
        self.hidden_in = hidden_1TD.detach().requires_grad_()
        return handed_on(self.hidden_in)

    def enter(self, hidden_1TD: Tensor) -> Tensor:
        """Hidden states in front of a layer, as they enter it."""
        if not hidden_1TD.requires_grad:
            return hidden_1TD
        seam = TensorSeam({})
        self.seams.append((None, seam))
        return seam.cut((), hidden_1TD, hidden_1TD, self.saved, True)

    def hand_on(self, hidden_1TD: Tensor) -> Tensor:
        """Hidden states for a later stage."""
        self.hidden_out = hidden_1TD
        return hidden_1TD.detach()

    @property
    def shape_out(self) -> tuple[int, ...]:
        """Of what was handed on, and so of its gradient."""
        assert self.hidden_out is not None, "a later stage has run"
        return tuple(self.hidden_out.shape)

    def visit(self, place: Place, value: Any, run: Callable[[PortValue], None]) -> Any:
        """A port's value behind its visit by fragments, which `run` runs; cut when a seam is planned here.

        Of sequences that stop together and run alone: the value of each.
        """
        if not isinstance(value, SideBySide):
            computed = computed_pairs(value)
            after = self._run(place, value, run, [value])
            if place.order not in self.cuts:
                return after
            seam, found = self._cut(place, value, after, computed)
            self.seams.append((place.order, seam))
            return found
        before = [computed_pairs(own) for own in value.values]
        with torch.no_grad():
            parts = value.apart(self._run(place, value.value, run, value.values))
        if place.order not in self.cuts:
            return parts
        cut = [self._cut(place, *own) for own in zip(value.values, parts, before, strict=True)]
        self.seams.append((place.order, LaneSeam([seam for seam, _ in cut], value.starts, place.layouts)))
        return [found for _, found in cut]

    def _run(self, place: Place, value: Any, run: Callable[[PortValue], None], owners: Sequence[Any]) -> Any:
        """The value behind the fragments. `owners` have the memory that is written to in place."""
        with torch.no_grad():
            port = PortValue(value, None, place.layouts)
            run(port)
            if port.changing():
                self.saved.protect(leaf for own in owners for leaf in port_leaves(own)[1].values())
            return port.result()

    def _cut(self, place: Place, value: Any, after: Any, computed: list[Tensor]) -> tuple[Seam, Any]:
        """A seam at a value, in whose place another is handed on; what is to be handed on now."""
        if isinstance(value, Pairs):
            return PairSeam(computed, value), value
        if isinstance(value, HeadOutputs):
            value.seam = HeadSeam(value.recorded, value.weight)
            return value.seam, value
        seam, found = TensorSeam(place.layouts), after
        with torch.enable_grad():
            before, now = port_leaves(value)[1], port_leaves(after)[1]
            for selector in place.selectors:
                if selector in before and before[selector].is_floating_point():
                    handed = seam.cut(selector, before[selector], now[selector], self.saved, place.port in _HELD)
                    found = with_member(found, selector, handed)
        return seam, found

    def sweep(self, hidden_1TD: Tensor | None, run: Callable[[int, GradientPort], None]) -> Tensor | None:
        """Runs gradients back; `run` runs the fragments of an order. Returns the gradient of what came in."""
        for leaf in self._leaves():
            leaf.grad = None
        if hidden_1TD is not None and self.hidden_out is not None and self.hidden_out.requires_grad:
            go_back([get_gradient_edge(self.hidden_out)], [hidden_1TD])
        for order, seam in reversed(self.seams):
            with torch.no_grad():
                gradients = seam.gradients()
                if order is not None:
                    run(order, GradientPort(gradients))
            seam.go_on(gradients)
        if self.hidden_in is None:
            return None
        return torch.zeros_like(self.hidden_in) if self.hidden_in.grad is None else self.hidden_in.grad

    def _leaves(self) -> Iterator[Tensor]:
        if self.hidden_in is not None:
            yield self.hidden_in
        for _, seam in self.seams:
            yield from seam.leaves()


def row_leaves_of(site: SiteInfo) -> tuple[Selector, ...]:
    """The tensors of a port through which gradients can be seen: those whose rows are the requests' own."""
    return tuple([leaf.selector for leaf in site.leaves if leaf.read_refusal is None])


def computed_pairs(value: Any) -> list[Tensor]:
    """Scores or patterns as they were computed, of a value that is such."""
    return tensors_of(value) if isinstance(value, Pairs) else []
