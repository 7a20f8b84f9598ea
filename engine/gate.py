"""The gate: is a row's value its own, at every site, whatever lies beside it in the stream?

Using the attention interface is not enough to be packed: convolutions and recurrences mix neighbours, and experts sort
rows. So before a model serves, every shard runs three streams on the served weights, [A, B], [A', B] and B alone, and
compares B's rows at every site bit for bit. A model that fails at its logits is refused; a site that fails is refused
by name. The same run shows each site's local shape (which dimension the ranks split) and which tensors the model
changes in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import AttentionPass
from engine.links import Links
from engine.sites import GateReport, LeafReport, Probe, Selector, named_tensors, port_leaves, row_multiple
from engine.spans import SpanStore
from engine.stage import PackedRows, StageRunner, Visit
from polytrace.description import SiteInfo
from polytrace.errors import ServiceError
from polytrace.graph import Port
from scheduling.packing import padded
from scheduling.plan import PassId, Segment, Span

_LENGTHS = (9, 21)  # tokens of A and B
_Seen = dict[tuple[str, Port, Selector], Tensor]


def run_gate(
    probe: Probe,
    runner: StageRunner,
    links: Links,
    store: SpanStore,
    device: torch.device,
    *,
    packed: Mapping[str, int],
) -> GateReport:
    """Collective: every shard of the deployment calls it at once. ServiceError when the model cannot be packed."""
    generator = torch.Generator().manual_seed(0)
    a, other, b = (
        torch.randint(0, probe.vocab_size, (length,), generator=generator).tolist()
        for length in (_LENGTHS[0], _LENGTHS[0], _LENGTHS[1])
    )
    multiple, machine_notes = row_multiple(probe, links.ranks, torch.get_num_threads(), device.type)
    owned = [site for site in probe.sites if _stage_of(site, probe, links) == links.stage and site.visit == 0]
    streams = ([a, b], [other, b], [b])
    together, changed, alone = (
        _run_stream(sequences, multiple, probe, owned, runner, links, store, device) for sequences in streams
    )
    leaves = []
    for (module, port, selector), rows_b in together[0].items():
        is_own = torch.equal(rows_b, changed[0][module, port, selector])
        is_same_alone = torch.equal(rows_b, alone[0][module, port, selector])
        refusal = None
        if not is_own:
            refusal = "its rows depend on the neighbours in a shared pass"
        elif not is_same_alone:
            refusal = "its rows are not the same bits in a shared pass as alone"
        if refusal and links.stage == links.stages - 1 and module == "":
            raise ServiceError(f"{probe.class_name} cannot be served in shared passes: at its logits, {refusal}")
        leaves.append(
            LeafReport(
                module=module,
                port=port,
                selector=selector,
                local_tail=tuple(rows_b.shape[1:]),
                mutated=(module, port, selector) in together[1],
                refusal=refusal,
            )
        )
    refused = [f"{leaf.module}.{leaf.port.value}" for leaf in leaves if leaf.refusal]
    notes = (*machine_notes, *([f"refused by the gate: {', '.join(refused)}"] if refused else []))
    return GateReport(
        stage=links.stage,
        rank=links.rank,
        leaves=tuple(leaves),
        sharded=_split_dimensions(probe, runner.model),
        packed=dict(packed),
        row_multiple=multiple,
        notes=notes,
    )


def _split_dimensions(probe: Probe, model: nn.Module) -> dict[str, int]:
    """Which dimension of each parameter is smaller here than in the whole model."""
    whole = {info.path: info.shape for info in probe.parameters}
    split = {}
    for path, tensor in named_tensors(model):
        differing = [dim for dim, size in enumerate(tensor.shape) if path in whole and size != whole[path][dim]]
        if differing:
            (split[path],) = differing
    return split


def _stage_of(site: SiteInfo, probe: Probe, links: Links) -> int:
    if site.module.startswith(probe.layout.layers + "."):
        return probe.layout.home(site.module, links.stages)
    return 0 if site.order < probe.first_layer_order else links.stages - 1


def _run_stream(
    sequences: list[list[int]],
    multiple: int,
    probe: Probe,
    owned: list[SiteInfo],
    runner: StageRunner,
    links: Links,
    store: SpanStore,
    device: torch.device,
) -> tuple[_Seen, set[tuple[str, Port, Selector]]]:
    """Runs one stream over all stages; returns the last sequence's rows at every owned leaf and which were mutated."""
    tokens = [token for sequence in sequences for token in sequence]
    start, stop = len(tokens) - len(sequences[-1]), len(tokens)
    tokens = list(padded(tokens, multiple))
    positions = padded([position for sequence in sequences for position in range(len(sequence))], multiple)
    segments = tuple(_segments(sequences))
    rows = PackedRows(
        tokens_1T=torch.tensor([tokens], device=device),
        positions_1T=torch.tensor([positions], device=device),
        kept_K=torch.arange(len(tokens), device=device) if probe.has_kept_rows else None,
        attention=AttentionPass(PassId(-1), segments, store),
    )
    seen: _Seen = {}
    originals: dict[tuple[str, Port, Selector], tuple[Tensor, int]] = {}
    visits = [
        Visit(
            order=site.order,
            module=site.module,
            port=site.port,
            visitor=_watching(site, len(tokens), slice(start, stop), seen, originals),
        )
        for site in owned
    ]
    hidden = None
    if links.stage > 0:
        hidden = links.receive((1, len(tokens), probe.hidden_size), runner.model.dtype, links.stage - 1)
    left = runner.run(rows, hidden, visits, stop_after=None)
    if left is not None:
        links.send(left, links.stage + 1)
        links.flush()
    mutated = {key for key, (tensor, version) in originals.items() if tensor._version != version}
    return seen, mutated


def _segments(sequences: list[list[int]]) -> list[Segment]:
    segments, start = [], 0
    for place, sequence in enumerate(sequences):
        stop = start + len(sequence)
        span = Span(block=PassId(-1), start=start, stop=stop)
        segments.append(Segment(member=0, invoke=0, sequence=place, start=start, stop=stop, spans=(span,)))
        start = stop
    return segments


def _watching(
    site: SiteInfo,
    num_rows: int,
    last: slice,
    seen: _Seen,
    originals: dict[tuple[str, Port, Selector], tuple[Tensor, int]],
) -> Callable[[Any], Any]:
    """Copies the last sequence's rows of every leaf. The gate keeps all rows for the head, so both row spaces agree."""
    readable = {leaf.selector for leaf in site.leaves if leaf.read_refusal is None}

    def visitor(value: Any) -> Any:
        for selector, tensor in port_leaves(value)[1].items():
            if selector in readable and tensor.ndim >= 2 and tensor.shape[1] == num_rows:
                key = (site.module, site.port, selector)
                seen[key] = tensor[0, last].clone()
                originals[key] = (tensor, tensor._version)
        return value

    return visitor
