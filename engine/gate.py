"""The gate: is a row's value its own, at every site, whatever lies beside it in the stream?

Using the attention interface is not enough to be packed: convolutions and recurrences mix neighbours, and experts sort
rows. So before a model serves, every shard runs three streams on the served weights, [A, B], [A', B] and B alone, and
compares B's rows at every site bit for bit. A model that fails at its logits is refused; a site that fails is refused
by name. The same run shows each site's local shape (which dimension the ranks split) and which tensors the model
changes in place.

A last stream decides whether rows may be shared and left out: forks that repeat their parent must have its bits at
every site, and another last token must not move an earlier row. Where that fails, every sequence has all its rows.

On a GPU more streams of other lengths are run, since its kernels change with the number of rows. Beside a neighbour of
another content a row must keep its bits there too: the kernels are the same. Where only the number of rows moves a
row, and by no more than rounding does, the model serves and every receipt says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import AttentionPass
from engine.head_outputs import HeadOutputs
from engine.links import Links
from engine.named import NamedParameters
from engine.points import Pairs
from engine.sites import GateReport, LeafReport, Probe, Selector, named_tensors, row_leaves, row_multiple
from engine.spans import SpanStore
from engine.stage import PackedRows, StageRunner, Visit
from engine.streams import Streams
from engine.trunks import Trunks
from polytrace.description import SiteInfo
from polytrace.errors import ServiceError
from polytrace.graph import Port
from scheduling.costs import ROUNDED_NOTE
from scheduling.levels import Levels
from scheduling.plan import PROLOGUE, PassId, Plan, Segment

_LENGTHS = (9, 21)  # tokens of A and B
_LONGER = (100, 300, 1000)  # tokens of A on a GPU
_WIDE_ROWS = 4  # that are held of what each head adds, which is as wide as all heads' residuals
_ROUNDING = 64.0  # what another order of addition may do to a value, in the dtype's smallest steps
_SIDE_VALUES = "hand values to later layers beside the hidden states"
_Place = tuple[str, Port, Selector]
_Seen = dict[_Place, Tensor]


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
    if probe.has_side_values and links.stages > 1:
        raise ServiceError(
            f"{probe.class_name} cannot be split into stages: its layers {_SIDE_VALUES}; use stages=1 and ranks instead"
        )
    multiple, machine_notes = row_multiple(probe, links.ranks, torch.get_num_threads(), device.type)
    trial = _Trial(
        probe=probe,
        runner=runner,
        links=links,
        store=store,
        device=device,
        multiple=multiple,
        levels=Levels(probe.sites, probe.layout.layers),
    )
    generator = torch.Generator().manual_seed(0)
    a, other, b = (
        torch.randint(0, probe.vocab_size, (length,), generator=generator).tolist()
        for length in (_LENGTHS[0], _LENGTHS[0], _LENGTHS[1])
    )
    streams = ([a, b], [other, b], [b], [a, [*b[:-1], (b[-1] + 1) % probe.vocab_size]])
    together, changed, alone, ahead = map(trial.watch_last, streams)
    lengths = [] if device.type == "cpu" else [min(length, probe.max_tokens) for length in _LONGER]
    longer = [trial.watch_last([(a * length)[:length], b])[0] for length in lengths]
    leaves = []
    for place, rows_b in together[0].items():
        module, port, selector = place
        others = [seen[place] for seen in (alone[0], *longer)]
        refusal = None
        if not torch.equal(rows_b, changed[0][place]):
            refusal = "its rows depend on the neighbours in a shared pass"
        elif not all(trial.is_same(place, rows_b, other) for other in others):
            refusal = "its rows are not the same bits in a shared pass as alone"
        leaves.append(
            LeafReport(
                module=module,
                port=port,
                selector=selector,
                local_tail=tuple(rows_b.shape[1:2] if port.is_of_pairs else rows_b.shape[1:]),
                mutated=(module, port, selector) in together[1],
                refusal=refusal,
            )
        )
    if links.stage == links.stages - 1:
        _check_logits(leaves, probe, runner.model)
    known = {(leaf.module, leaf.port, leaf.selector) for leaf in leaves if leaf.refusal is None}
    differing: set[_Place] = set()
    if probe.has_side_values:
        machine_notes = (*machine_notes, f"no rows are shared: layers {_SIDE_VALUES}")
    else:
        differing = trial.differing_forks(b) & known
    moved = {
        place for place, rows in ahead[0].items() if not trial.is_same(place, rows[:-1], together[0][place][:-1])
    } & known
    if differing or moved:
        first = min(f"{module}.{port.value}" for module, port, _ in differing | moved)
        machine_notes = (*machine_notes, f"no rows are shared: a fork is not its parent at {first}")
    if trial.rounded:
        first = min(f"{module}.{port.value}" for module, port, _ in trial.rounded)
        machine_notes = (*machine_notes, f"{ROUNDED_NOTE}, first at {first}")
    refused = [f"{leaf.module}.{leaf.port.value}" for leaf in leaves if leaf.refusal]
    notes = (*machine_notes, *([f"refused by the gate: {', '.join(refused)}"] if refused else []))
    return GateReport(
        stage=links.stage,
        rank=links.rank,
        leaves=tuple(leaves),
        sharded=_split_dimensions(probe, runner.model, links.ranks),
        packed=dict(packed),
        row_multiple=multiple,
        key_value_bytes=store.row_bytes,
        has_forks=not (differing or moved or probe.has_side_values),
        has_exact_rows=not trial.rounded,
        notes=notes,
    )


def _check_logits(leaves: list[LeafReport], probe: Probe, model: nn.Module) -> None:
    """ServiceError when the root's output is refused: where that begins is the innermost module that makes it so."""
    reason = next((leaf.refusal for leaf in leaves if leaf.module == "" and leaf.refusal), None)
    if reason is None:
        return
    sound = {leaf.module for leaf in leaves if leaf.port is Port.INPUT and leaf.refusal is None}
    refused = [leaf for leaf in leaves if leaf.refusal is not None]
    first = next((leaf for leaf in refused if leaf.port is Port.OUTPUT and leaf.module in sound), refused[0])
    name = type(model.get_submodule(first.module)).__name__
    raise ServiceError(
        f"{probe.class_name} cannot be served in shared passes: at its logits, {reason}; that begins at "
        f"{first.module}.{first.port.value} ({name})"
    )


def _split_dimensions(probe: Probe, model: nn.Module, ranks: int) -> dict[str, tuple[int, int]]:
    """Which dimension of each parameter is smaller here than in the whole model, and how many ranks hold the same."""
    whole = {info.path: info.shape for info in probe.parameters}
    split: dict[str, tuple[int, int]] = {}
    stored = dict(named_tensors(model))
    for path, tensor in stored.items():
        differing = [dim for dim, size in enumerate(tensor.shape) if path in whole and size != whole[path][dim]]
        if differing:
            (dim,) = differing
            split[path] = dim, tensor.shape[dim] * ranks // whole[path][dim]
    copies = {path: number for path, (_, number) in split.items()}
    for path, tensor in NamedParameters(stored, probe.weights, copies).named():
        differing = [dim for dim, size in enumerate(tensor.shape) if size != whole[path][dim]]
        if differing:
            (dim,) = differing
            split[path] = dim, tensor.shape[dim] * ranks // whole[path][dim]
    return split


def _stage_of(site: SiteInfo, probe: Probe, links: Links) -> int:
    if site.module.startswith(probe.layout.layers + "."):
        return probe.layout.home(site.module, links.stages)
    return 0 if site.order < probe.first_layer_order else links.stages - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """What every forward of the gate needs, and the forwards: collective, each stage runs its part."""

    probe: Probe
    runner: StageRunner
    links: Links
    store: SpanStore
    device: torch.device
    multiple: int  # of rows
    levels: Levels
    rounded: set[_Place] = field(default_factory=set)  # where the number of rows moves a row as rounding does

    def is_same(self, place: _Place, rows: Tensor, other: Tensor) -> bool:
        """Whether rows are the same among other numbers of rows: their bits, or on a GPU all but the last of them."""
        if torch.equal(rows, other):
            return True
        if self.device.type == "cpu" or not rows.is_floating_point():
            return False
        scale = max(1.0, float(other.abs().max()))
        is_close = float((rows.float() - other.float()).abs().max()) <= _ROUNDING * torch.finfo(rows.dtype).eps * scale
        if is_close:
            self.rounded.add(place)
        return is_close

    def watch_last(self, sequences: list[list[int]]) -> tuple[_Seen, set[_Place]]:
        """The last sequence's rows at every leaf that this stage owns, beside the others, and which were mutated."""
        watched = slice(sum(map(len, sequences[:-1])), sum(map(len, sequences)))
        seen: _Seen = {}
        originals: dict[_Place, tuple[Tensor, int]] = {}

        def watching(site: SiteInfo, streams: Streams) -> Callable[[Any], Any]:
            return _watching(site, streams.layer(0).num_padded, watched, seen, originals)

        self._run([root_segment(sequence, self.probe.layout.num_layers) for sequence in sequences], watching)
        mutated = {key for key, (tensor, version) in originals.items() if tensor._version != version}
        return seen, mutated

    def differing_forks(self, sequence: list[int]) -> set[_Place]:
        """Places that this stage owns where forks of a sequence that change nothing have other bits than it."""
        num_layers, length = self.probe.layout.num_layers, len(sequence)
        begins = ((0, length // 3), (num_layers // 2, length // 2), (num_layers // 2 + 1, 2 * length // 3))
        segments = [root_segment(sequence, num_layers)]
        for parent, (level, position) in zip((0, 0, 2), begins, strict=True):  # the last is a fork of a fork
            starts = tuple(length if at < level else position for at in range(num_layers + 1))
            own = replace(segments[0], parent=parent, starts=starts, head=tuple(range(starts[-1], length)))
            segments.append(replace(own, tokens=tuple(sequence[starts[0] :])))
        levels = self.levels
        differing: set[_Place] = set()

        def comparing(site: SiteInfo, streams: Streams) -> Callable[[Any], Any]:
            rows = streams.at(levels.of(site.order))
            pairs = [
                (own, base)
                for fork in range(1, len(segments))
                for position in range(length)
                if (own := rows.row(fork, position)) != (base := rows.row(0, position))
            ]

            def visitor(value: Any) -> Any:
                if isinstance(value, Pairs) and pairs:
                    own_rows, base_rows = zip(*pairs, strict=True)
                    own, base = value.read(own_rows, length), value.read(base_rows, length)
                    if not self.is_same((site.module, site.port, ()), own, base):
                        differing.add((site.module, site.port, ()))
                for selector, tensor in row_leaves(value, site.flat).items():
                    if tensor.ndim >= 2 and tensor.shape[1] == rows.num_padded and pairs:
                        here, there = (list(own) for own in zip(*pairs, strict=True))
                        place = site.module, site.port, selector
                        if not self.is_same(place, tensor[0, here], tensor[0, there]):
                            differing.add(place)
                return value

            return visitor

        self._run(segments, comparing)
        return differing

    def _run(self, segments: list[Segment], visitor: Callable[[SiteInfo, Streams], Callable[[Any], Any]]) -> None:
        """This stage's part of one forward over some segments, with a visitor at every site that it owns."""
        links = self.links
        plan = Plan(
            pass_id=PassId(-1),
            segments=tuple(segments),
            layer_rows=(0,) * self.probe.layout.num_layers,
            views=(),
            members=(),
            keeps=(),
            until=PROLOGUE,
            num_stages=links.stages,
        )
        streams = Streams(plan, self.multiple, self.device, is_fixed=self.probe.has_fixed_rows)
        rows = PackedRows(
            streams=streams,
            attention=AttentionPass(PassId(-1), self.store, self.device),
            trunks=Trunks(streams, self.store),
        )
        visits = [
            Visit(
                order=site.order,
                module=site.module,
                port=site.port,
                visitor=visitor(site, streams),
                rows=range(streams.at(self.levels.of(site.order)).num_rows) if site.port.is_of_pairs else (),
            )
            for site in self.probe.sites
            if site.visit == 0 and _stage_of(site, self.probe, links) == links.stage
        ]
        hidden = None
        if links.stage > 0:
            shape = (1, streams.layer(self.runner.window.first).num_padded, self.probe.hidden_size)
            hidden = links.receive(shape, self.runner.model.dtype, links.stage - 1)
        left = self.runner.run(rows, hidden, visits, stop_after=None)
        if left is not None:
            links.send(left, links.stage + 1)
            links.flush()


def root_segment(sequence: list[int], num_layers: int) -> Segment:
    """A sequence that shares nothing and keeps all its rows to the end."""
    return Segment(
        parent=None,
        starts=(0,) * (num_layers + 1),
        stops=(len(sequence),) * num_layers,
        head=tuple(range(len(sequence))),
        tokens=tuple(sequence),
    )


def _watching(
    site: SiteInfo,
    num_rows: int,
    last: slice,
    seen: _Seen,
    originals: dict[_Place, tuple[Tensor, int]],
) -> Callable[[Any], Any]:
    """Copies the last sequence's rows of every leaf. The gate keeps all rows for the head, so both row spaces agree."""
    readable = {leaf.selector for leaf in site.leaves if leaf.read_refusal is None}

    def visitor(value: Any) -> Any:
        if isinstance(value, Pairs) and readable:
            seen[site.module, site.port, ()] = value.read(range(last.start, last.stop), last.stop - last.start)
        for selector, tensor in row_leaves(value, site.flat).items():
            if selector in readable and tensor.ndim >= 2 and tensor.shape[1] == num_rows:
                key = (site.module, site.port, selector)
                rows = slice(last.stop - _WIDE_ROWS, last.stop) if isinstance(value, HeadOutputs) else last
                seen[key] = tensor[0, rows].clone()
                originals[key] = (tensor, tensor._version)
        return value

    return visitor
