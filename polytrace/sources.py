"""Where the operations of a model are: the calls inside of modules' forwards, as sites.

An operation is named like a module: `model.layers.3.mlp.source.self_act_fn_0`, and inside of a function that it calls
`....source.apply_rotary_pos_emb_0.source.rotate_half_0`. Modules that are equal in code and shapes have one
`SourceInfo`; an operation's site is worked out when somebody names it, from that and its module's place in the order.
The client, the planner and the shards use this one class, so they agree.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace
from functools import cached_property

from polytrace.description import Leaf, ModelDescription, SiteInfo, SourceCode, SourceInfo, index_sites
from polytrace.grammar import nearest
from polytrace.graph import Port, Site

WORD = "source"  # between a module and its operation, and between this and an operation inside of it


class Sources:
    """The operations of one model. Make it once and keep it."""

    def __init__(self, description: ModelDescription) -> None:
        self._description = description
        self._modules = {module.path: module for module in description.modules}
        self._begins = {site.module: site for site in description.sites if site.port is Port.INPUT and site.visit == 0}
        self._kept: dict[tuple[str, Port], SiteInfo | None] = {}

    def split(self, path: str) -> tuple[str, str] | None:
        """The module of an operation's path and the way inside of its source; None where it names no operation."""
        return split_operation(path, self._modules)

    def of(self, module: str) -> SourceInfo | None:
        """What is known of a module's source; None when the model's forward never calls the module."""
        place = self._modules[module].source if module in self._modules else None
        return None if place is None else self._description.sources[place]

    def code(self, module: str, way: str = "") -> SourceCode | None:
        """The text of a module's forward, or of the function that the operation at a way inside of it calls."""
        info = self.of(module)
        place = None if info is None else info.codes.get(way)
        return None if place is None else self._description.codes[place]

    def site(self, path: str, port: Port) -> SiteInfo | None:
        """A side of an operation; None where no tensor passes, or nothing is known of it."""
        key = (path, port)
        if key not in self._kept:
            self._kept[key] = self._find(path, port)
        return self._kept[key]

    def why_none(self, path: str) -> str:
        """Why there are no sites at an operation's path: the rest of a sentence that begins with it."""
        split = self.split(path)
        if split is None:
            return "names no operation"
        module, way = split
        info = self.of(module)
        if info is None:
            return f"does not exist: the forward of this model does not call {module or 'it'}"
        if info.refusal is not None:
            return f"cannot be visited: {info.refusal}"
        outer, _, name = way.rpartition(f".{WORD}.")
        code = self.code(module, outer)
        if code is None:
            return f"does not exist: {self.why_no_code(module, outer)}"
        names = [one for one, _ in code.operations]
        if name not in names:
            return f"does not exist: {code.name} has no operation {name!r}{nearest(name, names)}"
        return "has no tensors here: the forward does not come to this call when it is served, or hands it none"

    def why_no_code(self, module: str, way: str) -> str:
        """Why what an operation calls has no source of its own: a sentence."""
        info = self.of(module)
        if info is None:
            return f"the forward of this model does not call {module or 'it'}"
        if info.refusal is not None:
            return info.refusal
        if way in info.calls:
            inner = f"{module}.{info.calls[way]}" if module else info.calls[way]
            return f"it calls a module: use {inner}.{WORD}"
        return info.closed.get(way, "what it calls is no function of the model's own that runs here")

    def at(self, order: int) -> tuple[tuple[tuple[str, str], Port], dict[tuple[int | str, ...], int]]:
        """The module and the way inside of its source of what has an order, its side, and how its rows lie."""
        site = self.site_at(order)
        split = self.split(site.module)
        assert split is not None, "it was found by its path"
        return (split, site.port), site.layouts

    def site_at(self, order: int) -> SiteInfo:
        """The side of an operation that has an order."""
        return self._orders[order]

    def sites(self) -> Iterator[SiteInfo]:
        """Every operation's sides."""
        for module in self._modules:
            info = self.of(module)
            for own in info.sites if info is not None else ():
                found = self.site(operation_path(module, own.module), own.port)
                assert found is not None
                yield found

    @cached_property
    def _orders(self) -> dict[int, SiteInfo]:
        return {site.order: site for site in self.sites()}

    @cached_property
    def _layer_orders(self) -> tuple[int, int]:
        """Of what comes first and last in the decoder layers."""
        orders = [s.order for s in self._description.sites if s.module.startswith(self._description.layers + ".")]
        return min(orders), max(orders)

    def _find(self, path: str, port: Port) -> SiteInfo | None:
        split = self.split(path)
        info = self.of(split[0]) if split is not None else None
        if split is None or info is None:
            return None
        module, way = split
        own = next((site for site in info.sites if (site.module, site.port) == (way, port)), None)
        if own is None:
            return None
        begin = self._begins[module]
        order = begin.order + own.order
        return replace(own, module=path, order=order, stage=self._stage(begin, order))

    def _stage(self, begin: SiteInfo, order: int) -> int:
        """Inside of layers a module's own stage; what stands around them is on the first or the last."""
        if begin.module.startswith(self._description.layers + "."):
            return begin.stage
        return 0 if order < self._layer_orders[0] else self._description.stages - 1


class SiteIndex(dict[Site, tuple[SiteInfo, Leaf]]):
    """Every leaf by the site that names it; an operation's is worked out when it is asked for."""

    def __init__(self, description: ModelDescription, sources: Sources) -> None:
        super().__init__(index_sites(description))
        self._sources = sources

    def __missing__(self, site: Site) -> tuple[SiteInfo, Leaf]:
        info = self._sources.site(site.module, site.port)
        leaf = (
            next((leaf for leaf in info.leaves if leaf.selector == site.selector), None) if info is not None else None
        )
        if info is None or leaf is None:
            raise KeyError(site)
        self[site] = info, leaf
        return info, leaf


def operation_path(module: str, way: str) -> str:
    """The path of an operation of a module."""
    return f"{module}.{WORD}.{way}" if module else f"{WORD}.{way}"


def split_operation(path: str, modules: Container[str]) -> tuple[str, str] | None:
    """The longest module that a path begins with, and what stands behind `source`; None where it names no operation."""
    parts = path.split(".")
    for place in range(len(parts) - 2, -1, -1):
        module = ".".join(parts[:place])
        if parts[place] == WORD and module in modules:
            return (module, ".".join(parts[place + 1 :])) if path not in modules else None
    return None
