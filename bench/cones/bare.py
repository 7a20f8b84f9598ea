"""A bare forward over the same rows: what the counted rows cost when nobody records, plans, edits or saves.

The model's own decoder layers are called one by one on `[1, rows]` hidden states, so the matrices are multiplied with
exactly the rows that each layer has to run. Runs from which others fork go first; the others follow in streams of
about 2,000 rows, since larger ones run slower a row on CPUs. Before a layer one `index_select` puts the rows into order
and copies a parent's rows to those that fork from it. Attention is the honest one for these rows, through
transformers' attention interface: whole sequences of one length as one causal batch; forks of one parent and position
as one batch whose keys are the parent's before the position, then their own. Both are torch's
`scaled_dot_product_attention`; nothing else is clever. The norm and the head run on the rows that are read.

When a receipt says that more rows ran in a layer than were counted, as many rows are added there; they attend to
nothing. Nothing is edited, so a fork gives what its own tokens give in a plain run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from bench.cones.cones import last_layers
from bench.cones.workloads import Read, Workload
from bench.plain import Plain

_NAME = "polytrace_bench_bare"
_STREAM_ROWS = 2048

# Where each token of a run is: in the streams of one layer, the parents' first.
_Rows = dict[int, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Neighbours in a stream that attend in one batch."""

    start: int
    count: int  # runs
    rows: int  # of each run
    parent_rows: Tensor | None  # where the keys before them are among the parents' rows; None: they are whole
    mask: Tensor | None  # [query heads a key head x rows, keys]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    index: Tensor  # which row before the layer each row was, or is copied from; before layer 0: which token
    positions: Tensor
    groups: Sequence[_Group]
    num_filler: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """Runs that go through the layers together."""

    layers: Sequence[_Layer]
    logit_rows: Tensor  # after the last layer
    lens_rows: Sequence[Tensor]  # by layer


@dataclass(slots=True)
class _Store:
    """The keys and values of the parents' rows in each layer, kept while the others run."""

    keys: list[Tensor]  # [key heads, rows, width]
    values: list[Tensor]


class Bare:
    """The bare forward of one workload; laid out beforehand, called many times."""

    def __init__(
        self,
        plain: Plain,
        workload: Workload,
        *,
        ran: Sequence[int] | None = None,
        stream_rows: int = _STREAM_ROWS,
    ) -> None:
        AttentionInterface.register(_NAME, _attend)
        self._stream_rows = stream_rows
        self._root: Any = plain.model
        config = plain.model.config
        self._num_layers: int = config.num_hidden_layers
        self._heads_a_key: int = config.num_attention_heads // config.num_key_value_heads
        self._runs = workload.runs
        self._until = last_layers(workload, self._num_layers)
        self._tokens = torch.tensor([token for run in workload.runs for token in run.ids])
        self._longest = max(len(run.ids) for run in workload.runs)
        self._num_parent_rows = [0] * self._num_layers
        parents = sorted({run.parent for run in workload.runs if run.parent is not None})
        self._parents, tables = self._lay_out(parents, [], None)
        self._streams = [self._lay_out(members, tables, None)[0] for members in self._cut(parents)]
        if ran is not None:
            extra = [max(0, many - rows) for many, rows in zip(ran, self.layer_rows, strict=False)]
            self._parents, _ = self._lay_out(parents, [], extra)

    @property
    def layer_rows(self) -> tuple[int, ...]:
        """Rows that each layer runs."""
        streams = (self._parents, *self._streams)
        return tuple(
            sum(len(stream.layers[layer].positions) for stream in streams) for layer in range(self._num_layers)
        )

    @torch.inference_mode()
    def __call__(self) -> list[Tensor]:
        """Logits `[runs, vocabulary]` of the runs that read some: the parents' first, then stream by stream."""
        config = self._root.config
        rotary = self._root.model.rotary_emb(self._root.lm_head.weight, position_ids=torch.arange(self._longest)[None])
        before, config._attn_implementation = config._attn_implementation, _NAME
        try:
            store = _Store([], [])
            logits, between = self._run(self._parents, store, [], rotary)
            return [logits, *[self._run(stream, store, between, rotary)[0] for stream in self._streams]]
        finally:
            config._attn_implementation = before

    def _run(
        self, stream: _Stream, store: _Store, parents: Sequence[Tensor], rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The logits of one stream, and its rows before each layer and after the last."""
        model, (cos, sin) = self._root.model, rotary
        between: list[Tensor] = []
        hidden = model.embed_tokens(self._tokens)
        for number, (layer, block) in enumerate(zip(stream.layers, model.layers, strict=True)):
            hidden = hidden.index_select(0, layer.index)
            if layer.num_filler:
                hidden = torch.cat([hidden, hidden.new_zeros(layer.num_filler, hidden.shape[-1])])
            if len(hidden):
                angles = cos[:, layer.positions], sin[:, layer.positions]
                hidden = block(
                    hidden[None], None, position_embeddings=angles, bare_groups=layer.groups, bare_store=store
                )[0, : len(layer.index)]
            if len(stream.lens_rows[number]):
                self._root.lm_head(model.norm(hidden[stream.lens_rows[number]])).amax(-1)
            between.append(hidden)
            if parents:
                hidden = torch.cat([parents[number], hidden])
        return self._root.lm_head(model.norm(hidden.index_select(0, stream.logit_rows))), between

    def _cut(self, parents: Sequence[int]) -> Iterator[list[int]]:
        """The runs that are nobody's parent, a stream at a time; those that attend alike stay neighbours."""
        chosen: list[int] = []
        rows = 0
        is_parent = set(parents)
        for member in sorted(set(range(len(self._runs))) - is_parent, key=self._key):
            own = len(self._runs[member].ids) - self._runs[member].position
            if chosen and rows + own > self._stream_rows:
                yield chosen
                chosen, rows = [], 0
            chosen.append(member)
            rows += own
        if chosen:
            yield chosen

    def _key(self, member: int) -> tuple[int, int, int]:
        """What runs of one group have in common: parent (-1 for none), position, length."""
        run = self._runs[member]
        has_prefix = run.parent is not None and run.position > 0
        return run.parent if has_prefix and run.parent is not None else -1, run.position, len(run.ids)

    def _lay_out(
        self, members: Sequence[int], parents: Sequence[_Rows], filler: Sequence[int] | None
    ) -> tuple[_Stream, list[_Rows]]:
        """A stream of these runs, and where their rows are in each layer; `parents`: the same of the parents'."""
        # before layer 0 each run has its own tokens
        offsets, total = {}, 0
        for member, run in enumerate(self._runs):
            offsets[member] = torch.arange(total, total + len(run.ids))
            total += len(run.ids)
        tables: list[_Rows] = []
        layers = []
        before: Mapping[int, Tensor] = offsets
        for number in range(self._num_layers):
            base = dict(parents[number]) if parents else {}
            num_base = self._num_parent_rows[number] if parents else 0
            alive = [one for one in members if self._runs[one].first_layer <= number < self._until[one]]
            keyed: dict[tuple[int, int, int], list[int]] = {}
            for member in alive:
                keyed.setdefault(self._key(member), []).append(member)
            starts: dict[int, int] = {}
            count = 0
            for (_, position, length), alike in keyed.items():
                for member in alike:
                    starts[member] = count
                    count += length - position
            rows: _Rows = base
            for member in members:  # parents before their children
                rows[member] = self._rows_of(member, rows, num_base + starts[member] if member in starts else None)
            ordered = [member for alike in keyed.values() for member in alike]
            extra = filler[number] if filler else 0
            layers.append(
                _Layer(
                    index=_joined([before[member][self._runs[member].position :] for member in ordered]),
                    positions=_joined(
                        [
                            *[torch.arange(self._runs[one].position, len(self._runs[one].ids)) for one in ordered],
                            torch.zeros(extra, dtype=torch.long),
                        ]
                    ),
                    groups=[self._group(key, starts[alike[0]], len(alike), rows) for key, alike in keyed.items()],
                    num_filler=extra,
                )
            )
            before = rows
            tables.append(dict(rows))
        if not parents:
            self._num_parent_rows = [len(layer.index) for layer in layers]
        reads = [one for one in members if self._runs[one].read in (Read.LOGITS, Read.DIFFERENCE)]
        lenses = [one for one in members if self._runs[one].read is Read.LENS]
        stream = _Stream(
            layers=layers,
            logit_rows=_joined([before[member][-1:] for member in reads]),
            lens_rows=[_joined([table[member] for member in lenses]) for table in tables],
        )
        return stream, tables

    def _rows_of(self, member: int, rows: _Rows, start: int | None) -> Tensor:
        """Where a run's tokens are: its parent's rows, and from its position on its own, if it has some already."""
        run = self._runs[member]
        inherited = rows[run.parent] if run.parent is not None else torch.full((len(run.ids),), -1)
        if start is not None:
            return torch.cat([inherited[: run.position], torch.arange(start, start + len(run.ids) - run.position)])
        return inherited[: len(run.ids)]

    def _group(self, key: tuple[int, int, int], start: int, count: int, rows: _Rows) -> _Group:
        parent, position, length = key
        own = length - position
        if parent < 0:
            return _Group(start=start, count=count, rows=own, parent_rows=None, mask=None)
        mask = torch.ones(own, length, dtype=torch.bool).tril(position).repeat(self._heads_a_key, 1)
        return _Group(
            start=start,
            count=count,
            rows=own,
            parent_rows=rows[parent][:position],
            mask=mask if own > 1 else None,
        )


# H = query heads, K = key heads, T = rows of the stream, d = width of a head
def _attend(
    module: Any,
    query_HTd: Tensor,
    key_KTd: Tensor,
    value_KTd: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    bare_groups: Sequence[_Group],
    bare_store: _Store,
    **_: Any,
) -> tuple[Tensor, None]:
    query, key, value = query_HTd[0], key_KTd[0], value_KTd[0]
    if len(bare_store.keys) == module.layer_idx:  # these are the parents
        bare_store.keys.append(key)
        bare_store.values.append(value)
    parent_keys, parent_values = bare_store.keys[module.layer_idx], bare_store.values[module.layer_idx]
    num_heads, num_rows, width = query.shape
    num_keys = len(key)
    out = query.new_empty(num_rows, num_heads, width)
    end = 0
    for group in bare_groups:
        end = group.start + group.count * group.rows
        own = slice(group.start, end)
        into = out[own].view(group.count, group.rows, num_heads, width)
        q = query[:, own].view(num_heads, group.count, group.rows, width).transpose(0, 1)
        k = key[:, own].view(num_keys, group.count, group.rows, width).transpose(0, 1)
        v = value[:, own].view(num_keys, group.count, group.rows, width).transpose(0, 1)
        if group.parent_rows is None:
            mixed = _sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=num_heads != num_keys)
            into.copy_(mixed.transpose(1, 2))
            continue
        q = q.reshape(group.count, num_keys, -1, width)  # the query heads of a key head as further rows
        k = torch.cat([parent_keys[:, group.parent_rows].expand(group.count, -1, -1, -1), k], dim=2)
        v = torch.cat([parent_values[:, group.parent_rows].expand(group.count, -1, -1, -1), v], dim=2)
        mixed = _sdpa(q, k, v, attn_mask=group.mask, scale=scaling)
        into.copy_(mixed.view(group.count, num_heads, group.rows, width).transpose(1, 2))
    out[end:] = 0
    return out[None], None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    mixed: Tensor = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    return mixed


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(rows)) if rows else torch.arange(0)
