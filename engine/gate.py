"""The gate: is a row's value its own, at every site, whatever lies beside it in the stream?

Using the attention interface is not enough to be packed: convolutions and recurrences mix neighbours, and experts sort
rows. So before a model serves, every shard runs three streams on the served weights, [A, B], [A', B] and B alone, and
compares B's rows at every site bit for bit. A model that fails at its logits is run in another manner, each sequence
alone (`engine.manners`), where its logits must be the family's own; a site that fails is refused by name. The same run
shows each site's local shape (which dimension the ranks split) and which tensors the model changes in place.

A last stream decides whether rows may be shared and left out: forks that repeat their parent must have its bits at
every site, and another last token must not move an earlier row. Where that fails, every sequence has all its rows.

On a GPU more streams of other lengths are run, since its kernels change with the number of rows. Beside a neighbour of
another content a row must keep its bits there too: the kernels are the same. Where only the number of rows moves a
row, and by no more than rounding does, the model serves and every receipt says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from engine.arguments import Selector
from engine.attention import AttentionPass
from engine.encoders import beginning
from engine.head_outputs import HeadOutputs
from engine.lanes import stream_multiple
from engine.leaves import row_leaves
from engine.links import Links
from engine.manners import Manner, attention_of, use_attention
from engine.named import NamedParameters
from engine.operations import is_own_forward
from engine.points import Pairs
from engine.probe import Probe, named_tensors
from engine.proofs import Proof
from engine.relations import largest_gap
from engine.reports import GateReport, LeafReport
from engine.source_sites import Place, pattern_of
from engine.spans import SpanStore
from engine.stage import PackedRows, StageRunner, Visit
from engine.streams import LevelRows, Streams
from engine.trunks import Trunks
from polytrace.description import PassLayout, SiteInfo
from polytrace.errors import ServiceError
from polytrace.graph import Port
from polytrace.sources import operation_path
from scheduling.costs import ROUNDED_NOTE
from scheduling.levels import Levels
from scheduling.plan import PROLOGUE, Grow, PassId, Plan, Segment

_LENGTHS = (9, 21)  # tokens of A and B
_LONGER = (100, 300, 1000)  # tokens of A on a GPU
_WIDE_ROWS = 4  # that are held of what each head adds, which is as wide as all heads' residuals
_ROUNDING = 64.0  # what another order of addition may do to a value, in the dtype's smallest steps
_SIDE_VALUES = "hand values to later layers beside the hidden states"
_PADDED = "each prompt runs alone and shares no rows, in the padded layout"
_TOKEN_VALUES = "are given values of embeddings beside the hidden states"
_OTHER_NUMBERS = "the model gives other numbers where its calls are visited"
_UNPROVEN = (
    "what a rank holds of it is not its slice of the whole (it may be a part of a sum): read a module's port instead"
)
_ANOTHER_FORWARD = "ranks share what its module computes, and its own forward does not run: read its input and output"
_UNFORKED = "its rows depend on how rows are shared"
_Place = tuple[str, Port, Selector]
_Seen = dict[_Place, Tensor]
_Look = Callable[[_Place, Tensor, Tensor], None]  # gets a place, the rows there and the tensor that has them
_IsSame = Callable[[_Place, Tensor, Tensor], bool]


def run_gate(
    probe: Probe,
    runner: StageRunner,
    links: Links,
    store: SpanStore,
    device: torch.device,
    *,
    packed: Mapping[str, int],
    proof: Proof | None,
) -> GateReport:
    """Collective: every shard of the deployment calls it at once. ServiceError when the model cannot be packed.

    `proof` is what is known of how ranks split the model; None where there is one rank.
    """
    if (probe.has_side_values or probe.has_token_values) and links.stages > 1:
        told = _SIDE_VALUES if probe.has_side_values else _TOKEN_VALUES
        raise ServiceError(
            f"{probe.class_name} cannot be split into stages: its layers {told}; use stages=1 and ranks instead"
        )
    is_packed = probe.manner.layout is PassLayout.PACKED
    machine_notes: tuple[str, ...] = (f"{_PADDED}: {probe.why_padded}",)
    multiple = 1
    if is_packed:
        multiple, machine_notes = stream_multiple(probe.widths, links.ranks, torch.get_num_threads(), device.type)
    operations = list(_operations(probe, links))
    trial = Trial(
        probe=probe,
        runner=runner,
        links=links,
        store=store,
        device=device,
        multiple=multiple,
        levels=Levels(probe.sites, probe.layout.layers),
        operations={
            (one.site.module, one.site.port): one
            for one in operations
            if is_own_forward(runner.model.get_submodule(one.module))
        },
    )
    generator = torch.Generator().manual_seed(0)
    a, other, b = (
        torch.randint(0, probe.vocab_size, (length,), generator=generator).tolist()
        for length in (_LENGTHS[0], _LENGTHS[0], _LENGTHS[1])
    )
    together, mutated = trial.watch_last([a, b])
    changed = trial.differing([other, b], together, _is_equal)
    lengths = [] if device.type == "cpu" else [min(length, probe.max_tokens) for length in _LONGER]
    lone = set[_Place]().union(
        *(trial.differing(stream, together, trial.is_same) for stream in ([b], *([(a * n)[:n], b] for n in lengths)))
    )
    is_rewritten_well = not trial.differing([a, b], together, _is_equal, has_operations=False)
    leaves = []
    for place, rows_b in together.items():
        module, port, selector = place
        refusal = None
        if place in changed:
            refusal = "its rows depend on the neighbours in a shared pass"
        elif place in lone:
            refusal = "its rows are not the same bits in a shared pass as alone"
        operation = trial.operations.get((module, port))
        at = (pattern_of(module), "", port, selector) if operation is None else operation.place(selector)
        if refusal is None and operation is not None:
            is_proven = proof is None or at in proof.operations
            refusal = _OTHER_NUMBERS if not is_rewritten_well else None if is_proven else _UNPROVEN
        leaves.append(
            LeafReport(
                module=module,
                port=port,
                selector=selector,
                local_tail=tuple(rows_b.shape[1:2] if port.is_of_pairs else rows_b.shape[1:]),
                mutated=place in mutated,
                refusal=refusal,
                has_gradient=proof is None or at not in proof.no_gradients,
            )
        )
    not_run = [
        LeafReport(
            module=one.site.module,
            port=one.site.port,
            selector=leaf.selector,
            local_tail=leaf.tail,
            mutated=False,
            refusal=_ANOTHER_FORWARD,
        )
        for one in operations
        if (one.site.module, one.site.port) not in trial.operations
        for leaf in one.site.leaves
    ]
    if links.stage == links.stages - 1:
        of_modules = [leaf for leaf in leaves if (leaf.module, leaf.port) not in trial.operations]
        _check_logits(of_modules, probe, runner.model)
        if not is_packed and probe.left:
            _check_family(trial, together, b, probe.left[-1])
    known = {(leaf.module, leaf.port, leaf.selector) for leaf in leaves if leaf.refusal is None}
    ahead = [a, [*b[:-1], (b[-1] + 1) % probe.vocab_size]]
    differing: set[_Place] = set()
    moved: set[_Place] = set()
    if is_packed and probe.has_side_values:
        machine_notes = (*machine_notes, f"no rows are shared: layers {_SIDE_VALUES}")
    elif is_packed:
        differing = trial.differing_forks(b) & known
    if is_packed:
        moved = trial.differing(ahead, {place: rows[:-1] for place, rows in together.items()}, trial.is_same) & known
    unforked = {place for place in differing | moved if place[:2] in trial.operations}
    leaves = [
        replace(leaf, refusal=_UNFORKED) if (leaf.module, leaf.port, leaf.selector) in unforked else leaf
        for leaf in leaves
    ]
    differing, moved = differing - unforked, moved - unforked
    if differing or moved:
        first = min(f"{module}.{port.value}" for module, port, _ in differing | moved)
        machine_notes = (*machine_notes, f"no rows are shared: a fork is not its parent at {first}")
    if trial.rounded:
        first = min(f"{module}.{port.value}" for module, port, _ in trial.rounded)
        machine_notes = (*machine_notes, f"{ROUNDED_NOTE}, first at {first}")
    refused = [
        f"{leaf.module}.{leaf.port.value}"
        for leaf in leaves
        if leaf.refusal and (leaf.module, leaf.port) not in trial.operations
    ]
    notes = (*machine_notes, *([f"refused by the gate: {', '.join(refused)}"] if refused else []))
    return GateReport(
        stage=links.stage,
        rank=links.rank,
        leaves=(*leaves, *not_run),
        sharded=_split_dimensions(probe, runner.model, links.ranks, packed),
        packed=dict(packed),
        row_multiple=multiple,
        key_value_bytes=store.row_bytes,
        has_forks=is_packed and not (differing or moved or probe.has_side_values),
        has_exact_rows=not trial.rounded,
        notes=notes,
        why_no_gradients="" if proof is None else proof.why_no_gradients,
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
    raise WrongMannerError(
        f"{probe.class_name} cannot be served in shared passes: at its logits, {reason}; that begins at "
        f"{first.module}.{first.port.value} ({name})"
    )


def _check_family(trial: Trial, seen: _Seen, sequence: list[int], family: Manner) -> None:
    """WrongMannerError unless the logits are those of the model as transformers runs it, but for rounding."""
    model = trial.runner.model
    own = attention_of(model)
    family.prepare(model)
    try:
        with torch.no_grad():
            ids = torch.tensor([sequence], device=trial.device)
            answer = model(input_ids=ids, use_cache=False, **beginning(model, trial.device))
    finally:
        use_attention(model, own)
    for selector, expected in row_leaves(answer, {}).items():
        place = "", Port.OUTPUT, selector
        if place in seen and expected.is_floating_point():
            found, scale = seen[place].float(), max(1.0, float(expected.abs().max()))
            far = float((found - expected[0].float()).abs().max()) / scale
            if not far <= largest_gap(expected.dtype):  # NaN is no small gap
                raise WrongMannerError(
                    f"{trial.probe.class_name} has other logits by {own} attention than by {family.attention}: "
                    f"they differ by {far:.2g} of the largest"
                )


def _split_dimensions(
    probe: Probe, model: nn.Module, ranks: int, packed: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
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
    dims = {path: dim for path, (dim, _) in split.items()}
    of_parts = [
        one for one in probe.weights if one.of not in dims or one.is_of_parts(dims[one.of], packed.get(one.of, 1))
    ]
    for path, tensor in NamedParameters(stored, of_parts, copies).named():
        differing = [dim for dim, size in enumerate(tensor.shape) if size != whole[path][dim]]
        if differing:
            (dim,) = differing
            split[path] = dim, tensor.shape[dim] * ranks // whole[path][dim]
    return split


class WrongMannerError(ServiceError):
    """The model has to be run in another manner: its logits depend on neighbours, or are not the family's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """Where a site that stands for a group of operations lies."""

    site: SiteInfo
    module: str
    way: str

    def place(self, selector: Selector) -> Place:
        return pattern_of(self.module), self.way, self.site.port, selector


def _operations(probe: Probe, links: Links) -> Iterator[_Operation]:
    """The operations that stand for all on this stage: those of one module of each group."""
    for group in probe.sources:
        for own, site in group.sites_on(links.stage, lambda site: stage_of(site, probe, links)):
            way = group.sites[own].module
            module = site.module.removesuffix(operation_path("", way)).removesuffix(".")
            yield _Operation(site=site, module=module, way=way)


def stage_of(site: SiteInfo, probe: Probe, links: Links) -> int:
    """The stage whose shards run the site's module."""
    if site.module.startswith(probe.layout.layers + "."):
        return probe.layout.home(site.module, links.stages)
    return 0 if site.order < probe.first_layer_order else links.stages - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What every forward of the gate needs, and the forwards: collective, each stage runs its part."""

    probe: Probe
    runner: StageRunner
    links: Links
    store: SpanStore
    device: torch.device
    multiple: int  # of rows
    levels: Levels
    operations: Mapping[tuple[str, Port], _Operation]  # that are tried on this stage, by path and side
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
        seen: _Seen = {}
        originals: dict[_Place, tuple[Tensor, int]] = {}

        def look(place: _Place, rows: Tensor, tensor: Tensor) -> None:
            seen[place] = rows.clone()
            originals[place] = (tensor, tensor._version)

        self._look_at_last(sequences, look)
        return seen, {place for place, (tensor, version) in originals.items() if tensor._version != version}

    def differing(
        self, sequences: list[list[int]], seen: _Seen, is_same: _IsSame, *, has_operations: bool = True
    ) -> set[_Place]:
        """Places where the last sequence has other rows than those seen: of these, or of as many as are there."""
        left = {place for place in seen if has_operations or place[:2] not in self.operations}

        def look(place: _Place, rows: Tensor, _tensor: Tensor) -> None:
            if place in left and is_same(place, rows[: len(seen[place])], seen[place]):
                left.remove(place)

        self._look_at_last(sequences, look, has_operations=has_operations)
        return left

    def _look_at_last(self, sequences: list[list[int]], look: _Look, *, has_operations: bool = True) -> None:
        """One forward that shows the last sequence's rows at every leaf that this stage owns."""
        last = slice(sum(map(len, sequences[:-1])), sum(map(len, sequences)))

        def looking(site: SiteInfo, streams: Streams) -> Callable[[Any], Any]:
            return _looking(site, streams.layer(0).num_padded, last, len(sequences), look)

        segments = [root_segment(sequence, self.probe.layout.num_layers) for sequence in sequences]
        self.run(segments, looking, has_operations=has_operations)

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

        @cache
        def pairs_of(rows: LevelRows) -> list[tuple[int | None, int | None]]:
            return [
                (own, base)
                for fork in range(1, len(segments))
                for position in range(length)
                if (own := rows.row(fork, position)) != (base := rows.row(0, position))
            ]

        def comparing(site: SiteInfo, streams: Streams) -> Callable[[Any], Any]:
            rows = streams.at(levels.of(site.order))
            pairs = pairs_of(rows)

            def visitor(value: Any) -> Any:
                if isinstance(value, Pairs) and pairs:
                    own_rows, base_rows = zip(*pairs, strict=True)
                    own, base = value.read(own_rows, length), value.read(base_rows, length)
                    if not self.is_same((site.module, site.port, ()), own, base):
                        differing.add((site.module, site.port, ()))
                for selector, tensor in row_leaves(value, site.layouts).items():
                    if tensor.ndim >= 2 and tensor.shape[1] == rows.num_padded and pairs:
                        here, there = (list(own) for own in zip(*pairs, strict=True))
                        place = site.module, site.port, selector
                        if not self.is_same(place, tensor[0, here], tensor[0, there]):
                            differing.add(place)
                return value

            return visitor

        self.run(segments, comparing)
        return differing

    def run(
        self,
        segments: list[Segment],
        visitor: Callable[[SiteInfo, Streams], Callable[[Any], Any]],
        *,
        has_operations: bool = True,
        sites: Sequence[SiteInfo] | None = None,
        grows: Sequence[Grow] = (),
    ) -> None:
        """This stage's part of one forward over some segments, with a visitor at all sites that it owns, or at some."""
        links = self.links
        plan = Plan(
            pass_id=PassId(-1),
            segments=tuple(segments),
            layer_rows=(0,) * self.probe.layout.num_layers,
            views=(),
            members=(),
            keeps=(),
            grows=tuple(grows),
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
                layouts=site.layouts,
            )
            for site in (self.probe.sites if sites is None else sites)
            if site.visit == 0 and _is_readable(site) and stage_of(site, self.probe, links) == links.stage
        ]
        visits += [
            Visit(
                order=one.site.order,
                module=one.module,
                operation=one.way,
                port=one.site.port,
                visitor=visitor(one.site, streams),
                layouts=one.site.layouts,
            )
            for one in (self.operations.values() if has_operations else ())
        ]
        hidden = None
        if links.stage > 0:
            shape = (1, streams.layer(self.runner.window.first).num_padded, self.probe.hidden_size)
            hidden = links.receive(shape, self.runner.model.dtype, links.stage - 1)
        left = self.runner.run(rows, hidden, visits, stop_after=None)
        if left is not None:
            links.send(left, links.stage + 1)
            links.flush()


def _is_readable(site: SiteInfo) -> bool:
    return any(leaf.read_refusal is None for leaf in site.leaves)


def root_segment(sequence: list[int], num_layers: int) -> Segment:
    """A sequence that shares nothing and keeps all its rows to the end."""
    return Segment(
        parent=None,
        starts=(0,) * (num_layers + 1),
        stops=(len(sequence),) * num_layers,
        head=tuple(range(len(sequence))),
        tokens=tuple(sequence),
    )


def _is_equal(_place: _Place, rows: Tensor, other: Tensor) -> bool:
    return torch.equal(rows, other)


def _looking(site: SiteInfo, num_rows: int, last: slice, num_sequences: int, look: _Look) -> Callable[[Any], Any]:
    """Shows the last sequence's rows of every leaf. The gate keeps all rows for the head, so both row spaces agree."""
    readable = {leaf.selector for leaf in site.leaves if leaf.read_refusal is None}
    decoded = {leaf.selector for leaf in site.leaves if leaf.num_columns is not None}

    def visitor(value: Any) -> Any:
        if isinstance(value, Pairs) and readable:
            rows = value.read(range(last.start, last.stop), last.stop - last.start)
            look((site.module, site.port, ()), rows, rows)
        for selector, tensor in row_leaves(value, site.layouts).items():
            if selector in decoded and selector in readable and tensor.shape[1] == num_sequences:
                look((site.module, site.port, selector), tensor[0, -1:], tensor)
            elif selector in readable and tensor.ndim >= 2 and tensor.shape[1] == num_rows:
                chosen = slice(last.stop - _WIDE_ROWS, last.stop) if isinstance(value, HeadOutputs) else last
                look((site.module, site.port, selector), tensor[0, chosen], tensor)
        return value

    return visitor
