"""Which names are tried when a model is loaded, and which tensors the relations between them need beside.

Owns the way from a model's points, attention's own points and standard modules to the sites that they are seen at, and
why one that is there cannot be read or written. Runs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from engine.arguments import Selector
from engine.gate import stage_of
from engine.links import Links
from engine.probe import Probe
from engine.reports import GateReport
from engine.windows import Window
from polytrace.description import Leaf, SiteInfo
from polytrace.graph import Port
from polytrace.tree import join

_PLACES = {"input", "output"}  # names of points that are a family's own words for `pattern`


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedName:
    """A name and the tensor that it stands for."""

    name: str
    layer: int | None  # that the tensor is in
    site: SiteInfo
    leaf: Leaf
    why_read_only: str | None
    why_unread: str | None


class Look(NamedTuple):
    """Somebody who wants the base's rows of a tensor of a site."""

    selector: Selector
    key: str  # a name, or "input:way" and "output:way" of a module in the layer
    is_name: bool


class TriedNames:
    """Of one shard: the names of what its stage owns, and of all stages those that a pass has trials of."""

    def __init__(self, probe: Probe, report: GateReport, standard: Mapping[str, str], links: Links, window: Window):
        self.probe, self.standard = probe, standard
        self.layers = probe.layout.layers
        self.at = {(site.module, site.port): site for site in probe.sites if site.visit == 0}
        self._refused = {(leaf.module, leaf.port, leaf.selector): leaf.refusal for leaf in report.leaves}
        everywhere = list(self._names())
        self.own = [name for name in everywhere if stage_of(name.site, probe, links) == links.stage]
        self.all = tuple(dict.fromkeys(name.name for name in everywhere))  # each once, on every stage alike
        self.around = [name for name in self.own if name.layer is None]
        self.of_layer: dict[int, list[TriedName]] = defaultdict(list)
        self.looks: dict[tuple[str, Port], list[Look]] = defaultdict(list)
        for name in self.own:
            if name.layer is not None:
                self.of_layer[name.layer].append(name)
            if name.why_unread is None:
                self.looks[name.site.module, name.site.port].append(Look(name.leaf.selector, name.name, True))
        for layer in range(window.first, window.stop):
            for key, site, leaf in self._also(layer):
                self.looks[site.module, site.port].append(Look(leaf.selector, key, False))

    def at_site(self, site: SiteInfo) -> Iterator[TriedName]:
        """Names of a site's tensors that can be written."""
        layer = self.probe.layout.layer_of(site.module)
        for name in self.around if layer is None else self.of_layer[layer]:
            if name.site is site and name.why_read_only is None:
                yield name

    def _names(self) -> Iterator[TriedName]:
        seen: set[tuple[str, str]] = set()
        for point in self.probe.points:
            site = None if point.site is None else self.at.get((point.site.module, point.site.port))
            leaf = None
            if site is not None and point.site is not None:
                leaf = next((own for own in site.leaves if own.selector == point.site.selector), None)
            if site is None or leaf is None or (point.module, point.name) in seen:
                continue
            if point.name in _PLACES and site.port is Port.PATTERN:
                continue
            seen.add((point.module, point.name))
            yield self._name(point.name, site, leaf, point.write_refusal)
        for site in self.at.values():
            if site.port.is_inner and (site.module, site.port.value) not in seen:
                yield self._name(site.port.value, site, site.leaves[0], None)
        for name in ("embed_tokens", "ln_final", "lm_head"):
            site = self.at.get((self.standard.get(name, ""), Port.OUTPUT))
            leaf = first_leaf(site)
            if name in self.standard and site is not None and leaf is not None:
                yield self._name(name, site, leaf, None)

    def _name(self, name: str, site: SiteInfo, leaf: Leaf, write_refusal: str | None) -> TriedName:
        unread = leaf.read_refusal or self._refused.get((site.module, site.port, leaf.selector))
        return TriedName(
            name=name,
            layer=self.probe.layout.layer_of(site.module),
            site=site,
            leaf=leaf,
            why_unread=unread,
            why_read_only=unread or write_refusal or leaf.write_refusal,
        )

    def _also(self, layer: int) -> Iterator[tuple[str, SiteInfo, Leaf]]:
        """Tensors that relations of a layer need beside its names, by a key that is no name."""
        path, parts = f"{self.layers}.{layer}", self.probe.layer_parts[layer]
        wanted = [("input:", Port.INPUT), ("output:", Port.OUTPUT)]
        if parts is not None:
            for added in (parts.attention_adds, parts.mlp_adds):
                if added is not None:
                    way = added.module.split(".")
                    wanted += [(f"output:{'.'.join(way[:depth])}", Port.OUTPUT) for depth in range(1, len(way) + 1)]
            wanted += [(f"output:{own}", Port.OUTPUT) for own in (parts.out, parts.down) if own]
        for key, port in dict.fromkeys(wanted):
            site = self.at.get((join(path, own) if (own := key.partition(":")[2]) else path, port))
            leaf = first_leaf(site)
            if site is not None and leaf is not None and leaf.read_refusal is None:
                yield key, site, leaf


def first_leaf(site: SiteInfo | None) -> Leaf | None:
    """The tensor of a site, or the first of several."""
    return None if site is None else next((leaf for leaf in site.leaves if leaf.selector in ((), (0,))), None)
