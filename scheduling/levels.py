"""Which level of rows a site belongs to.

A *level* is a decoder layer: its rows enter at the layer's input and are replaced behind its output. Level 0 also
holds what comes before the layers; one more level, behind the last layer, holds the final norm and the head.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from polytrace.description import SiteInfo
from polytrace.graph import Port


class Levels:
    """Which level an order of the model's sites belongs to."""

    def __init__(self, sites: Sequence[SiteInfo], layers: str) -> None:
        """`layers` is the path of the list of decoder layers."""
        own = [site for site in sites if site.module.rpartition(".")[0] == layers]
        self._starts = [site.order for site in own if site.port is Port.INPUT]
        self._ends = [site.order for site in own if site.port is Port.OUTPUT]
        self._outputs = set(self._ends)
        self._orders = [site.order for site in sites]
        self.stages = [site.stage for site in own if site.port is Port.INPUT]  # of each layer
        self.count = len(self._starts)  # of layers; level `count` is behind the last one
        self._last = max(self._outputs, default=-1)

    @property
    def inputs(self) -> Sequence[int]:
        """The orders of the layers' inputs."""
        return self._starts

    def begun(self, order: int) -> int:
        """How many layers begin at or before an order."""
        return bisect_right(self._starts, order)

    def of(self, order: int) -> int:
        """The level whose rows a site has."""
        return self.count if order > self._last else max(self.begun(order) - 1, 0)

    def is_output(self, order: int) -> bool:
        """Whether a site is the output of a decoder layer."""
        return order in self._outputs

    def is_inside(self, order: int) -> bool:
        """Whether a site lies inside of a decoder layer: between its input and its output."""
        layer = self.begun(order) - 1
        return layer >= 0 and self._starts[layer] < order < self._ends[layer]

    def output(self, layer: int) -> int:
        """The order of a layer's output."""
        return self._ends[layer]

    def behind(self, layer: int) -> int:
        """The first order behind a layer's output."""
        return self._orders[bisect_right(self._orders, self._ends[layer])]

    def acts_from(self, order: int) -> int:
        """The first level whose rows a write changes."""
        return self.of(order) + self.is_output(order)
