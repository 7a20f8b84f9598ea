"""From a probe and the gates' reports to a `ModelDescription`: which stage owns what, and what ranks split.

A local shape that is smaller than the full one says which dimension tensor-parallel ranks split. Knows no model: what
it places has been found by `engine.probe`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from engine.arguments import Selector
from engine.probe import Probe
from engine.reports import GateReport, LeafReport
from engine.sites import EVERY_LAYER
from engine.source_sites import describe_sources
from polytrace.description import Leaf, Limits, ModelDescription, SiteInfo, logits_of
from polytrace.graph import Port
from polytrace.tensors import itemsize
from scheduling.plan import MIN_ROWS

_NO_GRADIENT = (
    "what ranks have of its gradient does not make up the whole (it may be a part of a sum): ask at another place, "
    "such as its module's input"
)


def describe_model(
    probe: Probe, reports: Sequence[GateReport], *, name: str, stages: int, ranks: int, limits: Limits | None = None
) -> ModelDescription:
    """Places the probe's sites on stages and adds what every shard's gate reported."""
    place = _Placement(probe, stages)
    leaf_reports = {(leaf.module, leaf.port, leaf.selector): leaf for r in reports if r.rank == 0 for leaf in r.leaves}
    packed = {path: blocks for r in reports for path, blocks in r.packed.items()}
    sharded = {path: found for r in reports for path, found in r.sharded.items()}
    sites = tuple(
        replace(
            site,
            stage=place.stage(site),
            leaves=tuple(_placed_leaf(site, leaf, place, leaf_reports, ranks, packed) for leaf in site.leaves),
        )
        for site in probe.sites
    )
    if all(report.can_generate for report in reports):
        sites += _token_site(sites, stages)
    modules = tuple(replace(module, first_stage=place.home(module.path)) for module in probe.modules)
    of_whole = {
        weight.path
        for weight in probe.weights
        if weight.of in sharded and not weight.is_of_parts(sharded[weight.of][0], packed.get(weight.of, 1))
    }
    parameters = tuple(
        replace(
            p,
            stage=place.home(p.of or p.path),
            is_of_whole=p.path in of_whole,
            sharded_dim=dim,
            sharded_copies=copies,
            sharded_blocks=packed.get(p.path, 1),
        )
        for p in probe.parameters
        for dim, copies in (sharded.get(p.path, (None, 1)),)
    )
    codes, sources, source_of = describe_sources(
        probe.sources,
        stages,
        place.stage,
        lambda site, leaf, blocks: _placed_leaf(site, leaf, place, leaf_reports, ranks, {site.module: blocks}),
        packed,
    )
    modules = tuple(replace(module, source=source_of.get(module.path)) for module in modules)
    told = repr((sites, sources))
    shape_facts = json.dumps([probe.config, probe.dtype, stages, ranks, told], sort_keys=True, default=str)
    return ModelDescription(
        name=name,
        class_name=probe.class_name,
        dtype=probe.dtype,
        vocab_size=probe.vocab_size,
        hidden_size=probe.hidden_size,
        num_layers=probe.layout.num_layers,
        layers=probe.layout.layers,
        stages=stages,
        ranks=ranks,
        fingerprint=hashlib.sha256(shape_facts.encode()).hexdigest()[:16],
        config=probe.config,
        modules=modules,
        sites=sites,
        parameters=parameters,
        limits=limits or Limits(max_sequence_tokens=probe.max_tokens),
        key_value_bytes=max(report.key_value_bytes for report in reports),
        hidden_bytes=probe.hidden_size * itemsize(probe.dtype),
        tape_bytes=probe.tape_bytes.row,
        tape_fill_bytes=probe.tape_bytes.expert_row * max(MIN_ROWS, reports[0].row_multiple),
        why_no_gradients=next((told for told in _why_no_gradients(probe, reports) if told), ""),
        row_multiple=reports[0].row_multiple,
        has_kept_rows=probe.has_kept_rows,
        has_forks=all(report.has_forks for report in reports),
        has_exact_rows=all(report.has_exact_rows for report in reports),
        layout=probe.manner.layout,
        points=probe.points,
        standard=probe.standard.modules,
        not_standard=probe.standard.refusals,
        parts=probe.standard.parts,
        facts=probe.standard.facts,
        notes=tuple(dict.fromkeys(note for r in reports for note in r.notes)),
        codes=codes,
        sources=sources,
    )


def _why_no_gradients(probe: Probe, reports: Sequence[GateReport]) -> Iterator[str]:
    yield probe.why_no_gradients
    yield from (report.why_no_gradients for report in reports)


def _token_site(sites: tuple[SiteInfo, ...], stages: int) -> tuple[SiteInfo, ...]:
    """Where sequences' next tokens are drawn: behind everything else, when the model gives logits."""
    logits = logits_of(sites)
    if logits is None:
        return ()
    info, leaf = logits
    if leaf.read_refusal is not None:
        return ()
    token = Leaf(selector=(), tail=(), dtype="int64", in_place_refusal=None)
    return (
        SiteInfo(
            module="",
            port=Port.TOKEN,
            visit=0,
            order=sites[-1].order + 1,
            stage=stages - 1,
            structure="tensor",
            rows=info.rows,
            leaves=(token,),
        ),
    )


class _Placement:
    """Which stage owns a site, a module or a parameter."""

    def __init__(self, probe: Probe, stages: int) -> None:
        self.probe = probe
        self.stages = stages

    def is_before_layers(self, site: SiteInfo) -> bool:
        return site.order < self.probe.first_layer_order

    def stage(self, site: SiteInfo) -> int:
        if site.module.startswith(self.probe.layout.layers + "."):
            return self.home(site.module)
        return 0 if self.is_before_layers(site) else self.stages - 1

    def home(self, path: str) -> int:
        return self.probe.layout.home(path, self.stages)


def _placed_leaf(
    site: SiteInfo,
    leaf: Leaf,
    place: _Placement,
    reports: Mapping[tuple[str, Port, Selector], LeafReport],
    ranks: int,
    packed: Mapping[str, int],
) -> Leaf:
    report = reports.get((site.module, site.port, leaf.selector))
    read_refusal, write_refusal = leaf.read_refusal, leaf.write_refusal
    if write_refusal == EVERY_LAYER:
        write_refusal = None
        if place.stages > 1:
            write_refusal = f"{EVERY_LAYER}, and the layers are on {place.stages} stages"
    elif place.stages > 1 and place.is_before_layers(site) and leaf.tail != (place.probe.hidden_size,):
        write_refusal = write_refusal or f"it acts before the layers, which are on {place.stages} stages"
    if report is None:
        read_refusal = read_refusal or "the gate did not reach it"
    elif report.refusal is not None:
        read_refusal = report.refusal
    sharded_dim, copies = None, 1
    if report is not None and read_refusal is None and report.local_tail != leaf.tail:
        split = [d for d, (full, part) in enumerate(zip(leaf.tail, report.local_tail, strict=True)) if full != part]
        held, rest = divmod(report.local_tail[split[0]] * ranks, leaf.tail[split[0]])
        if len(split) == 1 and rest == 0 and ranks % held == 0:
            sharded_dim, copies = split[0], held
        else:
            parts, whole = list(report.local_tail), list(leaf.tail)
            read_refusal = f"its parts of shape {parts} on {ranks} ranks do not make up {whole}"
    return replace(
        leaf,
        sharded_dim=sharded_dim,
        sharded_blocks=packed.get(site.module, 1) if site.port is Port.OUTPUT else 1,
        sharded_copies=copies,
        mutated=report.mutated if report else False,
        read_refusal=read_refusal,
        write_refusal=read_refusal or write_refusal,
        gradient_refusal=None if report is None or report.has_gradient else _NO_GRADIENT,
    )
