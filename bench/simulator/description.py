"""A deployment that is not there, described as its shards would: sites, stages, what ranks split. Reads no weights.

The sites are those that `engine.probe` finds in the model on the meta device, placed by `engine.placing`. What gates
find on real weights is taken to be what they find of every Llama: rows may be shared, bits do not depend on neighbours.
Named weights (`W_Q`) are taken to be whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cluster.planning.roofline import stored_row_bytes
from engine.census import Census
from engine.placing import describe_model
from engine.probe import Probe, probe_model
from engine.reports import GateReport, LeafReport
from engine.splits import Split, Style
from polytrace.description import Leaf, Limits, ModelDescription, SiteInfo
from polytrace.graph import Port
from scheduling.policy import PassPolicy, most_wave_rows

_ROW_MULTIPLE = 64  # what a GPU's tiles want (`engine.lanes`)


def describe(census: Census, *, name: str, stages: int, ranks: int, trunk_bytes: int) -> ModelDescription:
    """The description of `census.model` on so many shards, each of which has `trunk_bytes` for rows that stay.

    ServiceError when it cannot be split so.
    """
    probe = probe_model(census.model)
    parts = {f"{split.module}.{name}": part for split in census.splits(ranks) for name, part in split.parts.items()}
    report = GateReport(
        stage=0,
        rank=0,
        leaves=tuple(_leaves(probe, census, ranks)),
        sharded={path: (part.dim, part.copies) for path, part in parts.items() if part is not None},
        packed={},
        row_multiple=_ROW_MULTIPLE,
        key_value_bytes=stored_row_bytes(census, ranks),
        has_forks=True,
        has_exact_rows=True,
        notes=(),
    )
    limits = Limits(
        max_sequence_tokens=probe.max_tokens, trunk_bytes=trunk_bytes, pass_tokens=most_wave_rows(PassPolicy(), stages)
    )
    found = describe_model(probe, (report,), name=name, stages=stages, ranks=ranks, limits=limits)
    return replace(found, codes=(), sources=())  # no operation inside of a forward is asked for here


def _leaves(probe: Probe, census: Census, ranks: int) -> Iterator[LeafReport]:
    splits = {split.module: split for split in census.splits(ranks)}
    for site in probe.sites:
        for leaf in site.leaves:
            yield LeafReport(
                module=site.module,
                port=site.port,
                selector=leaf.selector,
                local_tail=_local_tail(site, leaf, census, splits.get(site.module), ranks),
                mutated=False,
                refusal=None,
            )


def _local_tail(site: SiteInfo, leaf: Leaf, census: Census, split: Split | None, ranks: int) -> tuple[int, ...]:
    """What a rank has of a leaf: its part of what split matrices give and take, of heads and of neurons."""
    if ranks == 1 or not leaf.tail or census.layout.layer_of(site.module) is None:
        return leaf.tail
    if split is not None and (split.style, site.port) in ((Style.COLUMN, Port.OUTPUT), (Style.ROW, Port.INPUT)):
        return (split.part.held(ranks), *leaf.tail[1:])
    if leaf.tail == (census.widest,):
        return (census.widest // ranks,)
    heads = (census.num_heads, census.num_kv_heads)
    dims = [dim for dim, size in enumerate(leaf.tail) if size in heads] if len(leaf.tail) == 2 or leaf.of_pairs else []
    if not dims:
        return leaf.tail
    own = census.heads(ranks)[heads.index(leaf.tail[dims[0]])]
    return tuple(own if dim == dims[0] else size for dim, size in enumerate(leaf.tail))
