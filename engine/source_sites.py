"""From what a probe saw of modules' operations to what a description says of them.

Modules that are equal in code, shapes and place (`model.layers.*.mlp`) are one group and are said once. Owns how groups
are made, which of their modules stand for them at the gate, and when an operation is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from engine.arguments import Selector
from engine.operations import forward_of, rewriting_inside, why_closed
from engine.rewriting import CannotRewrite, Rewriting
from polytrace.description import Leaf, SiteInfo, SourceCode, SourceInfo
from polytrace.graph import Port
from polytrace.sources import WORD, operation_path, split_operation

Place = tuple[str, str, Port, Selector]  # a module's pattern, the way to an operation, its side, a tensor there

_SEVERAL = "it is called several times in one forward: read what it calls instead"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceGroup:
    """The operations of modules that are equal but for their weights."""

    pattern: str
    modules: tuple[str, ...]  # in the model's order
    begins: tuple[int, ...]  # order of each one's input
    codes: Mapping[str, Rewriting]  # way -> what is called there; "" the forward
    sites: tuple[SiteInfo, ...]  # `module` is the way, `order` counts from the module's input
    calls: Mapping[str, str]
    closed: Mapping[str, str]
    refusal: str | None

    def sites_of(self, place: int) -> Iterator[SiteInfo]:
        """The sites of one of the modules, as the model has them; all on stage 0."""
        module, begin = self.modules[place], self.begins[place]
        for site in self.sites:
            yield replace(site, module=operation_path(module, site.module), order=begin + site.order)

    def sites_on(self, stage: int, stage_of: Callable[[SiteInfo], int]) -> list[tuple[int, SiteInfo]]:
        """What stands for the group on a stage: sites of its first module there, and their places among `sites`."""
        for place in range(len(self.modules)):
            found = [(own, site) for own, site in enumerate(self.sites_of(place)) if stage_of(site) == stage]
            if found:
                return found
        return []


@dataclass(slots=True)
class SourceNotes:
    """What a forward tells of the functions that operations call, by module."""

    modules: Mapping[str, nn.Module]
    codes: dict[str, dict[str, Rewriting]] = field(default_factory=dict)
    calls: dict[str, dict[str, str]] = field(default_factory=dict)
    closed: dict[str, dict[str, str]] = field(default_factory=dict)
    _fired: Counter[str] = field(default_factory=Counter)
    _paths: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._paths = {id(module): path for path, module in self.modules.items()}

    def note(self, path: str, called: Any) -> None:
        """An operation is about to call something."""
        self._fired[path] += 1
        split = split_operation(path, self.modules)
        assert split is not None, "operations are told below their modules"
        module, way = split
        calls, closed = self.calls.setdefault(module, {}), self.closed.setdefault(module, {})
        if isinstance(called, nn.Module):
            inner = self._paths.get(id(called), "")
            if self._fired[path] > 1:
                calls.pop(way, None)
                closed[way] = "it calls several modules, one after another"
            elif inner.startswith(f"{module}." if module else ""):
                calls[way] = inner.removeprefix(f"{module}.")
        elif (reason := why_closed(called)) is not None:
            closed[way] = reason
        elif (rewriting := rewriting_inside(called)) is not None:
            self.codes.setdefault(module, {})[way] = rewriting


def pattern_of(module: str) -> str:
    """A module's path with * for numbers: what is said of one layer's is said of all layers'."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def group_sources(
    sites: Iterable[SiteInfo], begins: Mapping[str, int], notes: SourceNotes, refusals: Mapping[str, str]
) -> tuple[SourceGroup, ...]:
    """Puts operations' sites together by module, and equal modules together. `refusals` are by module."""
    own: dict[str, list[SiteInfo]] = {module: [] for module in begins}
    several = {(site.module, site.port) for site in sites if site.visit > 0}
    for site in sites:
        split = split_operation(site.module, begins)
        if split is None or site.visit > 0:
            continue
        module, way = split
        order = site.order - begins[module]
        if (site.module, site.port) in several:
            site = replace(
                site, leaves=tuple(replace(one, read_refusal=_SEVERAL, write_refusal=_SEVERAL) for one in site.leaves)
            )
        own[module].append(replace(site, module=way, order=order))
    groups: dict[Any, SourceGroup] = {}
    for module, begin in begins.items():
        group = _group(module, begin, tuple(own[module]), notes, refusals.get(module))
        ids = tuple((way, id(code)) for way, code in group.codes.items())
        key = (group.pattern, ids, group.sites, *map(_frozen, (group.calls, group.closed)), group.refusal)
        before = groups.get(key)
        if before is not None:
            modules, orders = (*before.modules, module), (*before.begins, begin)
            group = replace(before, modules=modules, begins=orders)
        groups[key] = group
    return tuple(groups.values())


def _group(
    module: str, begin: int, sites: tuple[SiteInfo, ...], notes: SourceNotes, refusal: str | None
) -> SourceGroup:
    codes: dict[str, Rewriting] = {}
    try:
        codes[""] = forward_of(notes.modules[module])
    except CannotRewrite as error:
        refusal = refusal or str(error)
    ways = [site.module for site in sites]
    inside = notes.codes.get(module, {})
    codes |= {way: code for way, code in inside.items() if any(own.startswith(f"{way}.{WORD}.") for own in ways)}
    if refusal is not None:
        codes, sites = {}, ()
    return SourceGroup(
        pattern=pattern_of(module),
        modules=(module,),
        begins=(begin,),
        codes=codes,
        sites=sites,
        calls=notes.calls.get(module, {}),
        closed=notes.closed.get(module, {}),
        refusal=refusal,
    )


def _frozen(named: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(named.items()))


def blocks_of_operation(port: Port, module: str, called: str | None, packed: Mapping[str, int]) -> int:
    """In how many blocks ranks split what an operation gives: as the module that it calls, else as the one it is in.

    A guess, which a tiny twin of the model proves or refuses (`engine.twins`).
    """
    return packed.get(module if called is None else called, 1) if port is Port.OUTPUT else 1


def describe_sources(
    groups: Sequence[SourceGroup],
    stages: int,
    stage_of: Callable[[SiteInfo], int],
    placed: Callable[[SiteInfo, Leaf, int], Leaf],
    packed: Mapping[str, int],
) -> tuple[tuple[SourceCode, ...], tuple[SourceInfo, ...], dict[str, int]]:
    """The codes and sources of a description, and each module's source. `placed` says what a gate found of a leaf."""
    codes: dict[Rewriting, int] = {}
    infos: list[SourceInfo] = []
    source_of: dict[str, int] = {}
    for group in groups:
        source_of |= dict.fromkeys(group.modules, len(infos))
        found: dict[int, list[tuple[Leaf, ...]]] = {}
        for stage in range(stages):
            for own, site in group.sites_on(stage, stage_of):
                split = split_operation(site.module, group.modules)
                assert split is not None, "it is a site of one of the group's modules"
                module, way = split
                inner = group.calls.get(way)
                called = None if inner is None else f"{module}.{inner}" if module else inner
                blocks = blocks_of_operation(site.port, module, called, packed)
                found.setdefault(own, []).append(tuple(placed(site, leaf, blocks) for leaf in site.leaves))
        sites = tuple(replace(site, leaves=tuple(map(_agreed, *found[own]))) for own, site in enumerate(group.sites))
        own_codes = {way: codes.setdefault(code, len(codes)) for way, code in group.codes.items()}
        calls, closed = dict(group.calls), dict(group.closed)
        infos.append(SourceInfo(codes=own_codes, sites=sites, calls=calls, closed=closed, refusal=group.refusal))
    told = tuple(SourceCode(name=code.name, text=code.text, operations=code.operations) for code in codes)
    return told, tuple(infos), source_of


def _agreed(first: Leaf, *others: Leaf) -> Leaf:
    """What all stages say of a leaf; refused where one refuses it, or they differ."""
    for other in others:
        if other != first:
            reason = first.read_refusal or other.read_refusal or "its stages split it in different ways"
            return replace(first, read_refusal=reason, write_refusal=reason)
    return first
