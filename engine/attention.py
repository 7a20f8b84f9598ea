"""The one attention function, registered with transformers: every row attends to the keys that its sequence has.

Owns how packed rows attend. A model whose attention implementation is `NAME` and whose forward runs inside `attending`
computes, for every segment of the pass, exactly what it would compute for that sequence alone; rows that belong to no
segment (padding) get zeros. No mask function is registered under `NAME`, so transformers builds no mask.

A row's bits depend on its query and on the keys and values at positions up to its own, and on nothing else: not on
which rows run beside it, nor on whether its earlier rows are its segment's own or a parent's. To that end keys are
taken in *pages* of `PAGE` positions counted from position 0 (as in paged attention; Kwon et al., SOSP 2023): scores
are products over the head dimension, the softmax of a row is taken over whole pages, and values are added up page by
page, always in products of the same inner size. What a page gives to a row that sees none of it is an exact zero.

Whole pages of a parent are read where they are, however many forks look at them; only the page in which a fork begins
is copied for it. Segments of like geometry over one prefix are one *chunk* and go through the kernels together. A call
of a kernel costs as much as some rows do, so what differs a little is made alike: shorter tiles repeat their last row,
and where few forks look at a parent its pages are copied for them.

On a GPU one kernel a layer keeps the same promise (`engine.flash`): pages are for CPUs, and for machines that cannot
compile a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from engine.copies import to_device
from engine.kernels import has_kernels
from engine.lanes import FLAT_MULTIPLE, least_rows
from engine.points import MASKED, Held, Pairs, Points, Watch, apart, visited
from engine.spans import Span, SpanStore
from engine.streams import Stream
from engine.tables import KeyTables
from engine.trunks import Trunks
from polytrace.errors import ServiceError
from polytrace.graph import Port
from scheduling.plan import PassId

# T = packed rows, R = those and the rows of trunks, H = query heads, G = key/value heads, E = query heads a key/value
# head (H = G E), C = head dimension, B = tiles of a chunk, Q = query rows of each, N = B Q E: query vectors of a chunk,
# P = columns of the prefix, O = columns of a tile's own pages, W = P + O

NAME = "polytrace"

PAGE = 32  # positions; also what element-wise kernels take at a time, so that no tail falls on a row's end
TILE = 128  # most query rows of a tile; longer segments are cut at multiples of it
_MAX_SCORES = 1 << 22  # floats of scores at a time: what stays in a cache near the core

# What the kernel calls of one more chunk cost, measured on one core with 256 to 1024 features:
_CHUNK_SCORES = 1024  # in rows x columns that are computed for nothing
_CHUNK_COPIES = 512  # in columns of keys and values that are copied

# What models pass beside the tensors and what has no effect on a causal, packed, dropout-free pass.
_HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "target_dtype",
        "training",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Some rows of one segment: positions from `start` to `stop`."""

    segment: int
    row: int  # of its first position
    start: int
    stop: int
    own: tuple[tuple[int, int], ...]  # rows of the positions from its first page's begin to `stop`


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What tiles have in common that are computed together."""

    prefix: tuple[tuple[int, int], ...]  # rows of all positions before the tiles' first page
    num_pages: int  # from the tiles' first page to their last

    @property
    def num_columns(self) -> int:
        """Positions that a row is held against."""
        return sum(stop - start for start, stop in self.prefix) + self.num_pages * PAGE


class Chunk:
    """Tiles of one geometry, and the indices that they need. Made once a level, used by every layer that has it."""

    def __init__(self, geometry: Geometry, tiles: list[Tile], device: torch.device) -> None:
        self.geometry = geometry
        self.tiles = tiles
        self.num_rows = max(tile.stop - tile.start for tile in tiles)  # of each: shorter ones repeat their last row
        self.device = device
        self.prefix_columns = sum(stop - start for start, stop in geometry.prefix)
        self.own_columns = geometry.num_pages * PAGE
        self._parts: dict[int, list[Chunk]] = {}
        self._hidden: dict[int | None, tuple[Tensor | None, Tensor]] = {}  # by window

    def of(self, tiles: list[Tile]) -> Chunk | None:
        """Some of its tiles, None when these are none."""
        if len(tiles) == len(self.tiles):
            return self
        return Chunk(self.geometry, tiles, self.device) if tiles else None

    def parts(self, most: int) -> list[Chunk]:
        """The chunk in parts of at most so many tiles."""
        if most >= len(self.tiles):
            return [self]
        if most not in self._parts:
            starts = range(0, len(self.tiles), most)
            self._parts[most] = [Chunk(self.geometry, self.tiles[i : i + most], self.device) for i in starts]
        return self._parts[most]

    @cached_property
    def rows(self) -> slice | Tensor:
        """The stream's rows of the tiles' queries, tile after tile."""
        num, first = self.num_rows, self.tiles[0].row
        is_run = all(
            tile.row == first + place * num and tile.stop - tile.start == num for place, tile in enumerate(self.tiles)
        )
        if is_run:
            return slice(first, first + len(self.tiles) * num)
        starts, lasts = torch.tensor([(tile.row, tile.row + tile.stop - tile.start - 1) for tile in self.tiles]).T
        rows = torch.minimum(starts[:, None] + torch.arange(num), lasts[:, None]).flatten()
        return to_device(rows, self.device)

    @cached_property
    def own_rows(self) -> slice | Tensor:
        """`[B O]` rows of the tiles' own pages; what lies behind a end repeats the last row, and nobody sees it."""
        if len(self.tiles) == 1 and len(self.tiles[0].own) == 1:
            ((start, stop),) = self.tiles[0].own
            if stop - start == self.own_columns:
                return slice(start, stop)
        rows: list[int] = []
        for place, tile in enumerate(self.tiles, 1):
            for start, stop in tile.own:
                rows.extend(range(start, stop))
            rows.extend([rows[-1]] * (place * self.own_columns - len(rows)))
        return to_device(rows, self.device)

    def hidden(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """Columns a row does not see: `[B, Q, 1, P]` of the prefix (None: it sees all), `[B, Q, 1, O]` of its own."""
        if window not in self._hidden:
            starts, lasts = torch.tensor([(tile.start, tile.stop - 1) for tile in self.tiles]).T
            position = torch.minimum(starts[:, None] + torch.arange(self.num_rows), lasts[:, None])[:, :, None, None]
            own = torch.arange(self.prefix_columns, self.prefix_columns + self.own_columns)
            prefix = None
            out = own > position
            if window is not None:
                out |= position - own >= window
                if self.prefix_columns and max(tile.stop for tile in self.tiles) > window:
                    prefix = to_device(position - torch.arange(self.prefix_columns) >= window, self.device)
            self._hidden[window] = prefix, to_device(out, self.device)
        return self._hidden[window]


class AttentionPass:
    """How the rows of a pass attend at the level that runs now, and the store they attend through."""

    def __init__(self, pass_id: PassId, store: SpanStore, device: torch.device, trunks: Trunks | None = None) -> None:
        self.pass_id = pass_id
        self.store = store
        self.device = device
        self.trunks = trunks  # None: there are none, neither to find nor to keep
        self.points: dict[int, Points] = {}  # visits inside of attention, by the module's id
        self.has_kernel = has_kernels(device)
        self.layer = 0  # that runs now
        self._stream = Stream((), 0, 1)

    def enter(self, layer: int, stream: Stream) -> None:
        """The layer that runs from now on, and its rows."""
        self.layer = layer
        if stream is not self._stream:
            self._stream = stream
            for made in ("chunks", "key_tables"):
                self.__dict__.pop(made, None)

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The tiles of the layer that runs now, for `_Layer`."""
        return list(chunks_of(self._stream, self.device))

    @cached_property
    def key_tables(self) -> KeyTables:
        """The tiles of the layer that runs now, for the kernel."""
        return KeyTables(self._stream, self.device)


def chunks_of(stream: Stream, device: torch.device) -> Iterator[Chunk]:
    """All tiles of a level, those of like geometry together."""
    groups: dict[Geometry, list[Tile]] = {}
    for geometry, tile in _tiles_of(stream):
        groups.setdefault(geometry, []).append(tile)
    for geometry, tiles in _with_copied_prefixes(stream, groups).items():
        for alike in _of_like_length(geometry, tiles):
            yield Chunk(geometry, alike, device)


def _tiles_of(stream: Stream) -> Iterator[tuple[Geometry, Tile]]:
    for segment in range(len(stream.segments)):
        own = stream.own(segment)
        start = own.start
        while start < own.stop:
            stop = min(own.stop, (start // TILE + 1) * TILE)
            page = start - start % PAGE
            geometry = Geometry(prefix=tuple(stream.runs(segment, 0, page)), num_pages=-(-(stop - page) // PAGE))
            row = stream.bases[segment] + start - own.start
            tile = Tile(segment=segment, row=row, start=start, stop=stop, own=tuple(stream.runs(segment, page, stop)))
            yield geometry, tile
            start = stop


def _with_copied_prefixes(stream: Stream, groups: dict[Geometry, list[Tile]]) -> dict[Geometry, list[Tile]]:
    """The groups, those over different prefixes joined where it costs less to copy their few prefixes' pages."""
    small: dict[Geometry, list[Geometry]] = {}  # without prefix -> those that it may stand for
    for geometry, tiles in groups.items():
        if geometry.prefix and len(tiles) * geometry.num_columns <= _CHUNK_COPIES:
            whole = Geometry(prefix=(), num_pages=geometry.num_columns // PAGE)
            small.setdefault(whole, []).append(geometry)
    for whole, parts in small.items():
        if len(parts) > 1 or whole in groups:
            joined = groups.setdefault(whole, [])
            for geometry in parts:
                joined.extend(
                    replace(tile, own=tuple(stream.runs(tile.segment, 0, tile.stop))) for tile in groups.pop(geometry)
                )
    return groups


def _of_like_length(geometry: Geometry, tiles: list[Tile]) -> Iterator[list[Tile]]:
    """Tiles that go together, longest first: the shorter ones where their padding costs less than a chunk."""
    by_length: dict[int, list[Tile]] = {}
    for tile in tiles:
        by_length.setdefault(tile.stop - tile.start, []).append(tile)
    longest, alike = 0, list[Tile]()
    for length in sorted(by_length, reverse=True):
        own = by_length[length]
        if alike and (longest - length) * len(own) * geometry.num_columns > _CHUNK_SCORES:
            yield alike
            alike = []
        longest = longest if alike else length
        alike.extend(own)
    yield alike


_current: ContextVar[AttentionPass | None] = ContextVar("attention_pass", default=None)
_watch: ContextVar[Watch | None] = ContextVar("attention_watch", default=None)


@contextmanager
def attending(attention_pass: AttentionPass) -> Iterator[None]:
    """Forwards inside attend by this pass. Refuses nesting."""
    if _current.get() is not None:
        raise ServiceError("a pass is already attending in this thread")
    token = _current.set(attention_pass)
    try:
        yield
    finally:
        _current.reset(token)
        attention_pass.store.clear()


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Forwards without data inside tell `watch` of every point as they come to it."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Makes a model attend by `packed_attention` from now on; ServiceError when its family cannot."""
    AttentionInterface.register(NAME, packed_attention)
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise ServiceError(f"{type(model).__name__} does not use transformers' attention interface")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The interface of transformers: `[1, H, T, C]` queries and `[1, G, T, C]` keys and values to `[1, T, H, C]`.

    On a CPU computed in float32 whatever the dtype, on a GPU as `engine.flash` says. `s_aux` are attention sinks, a
    logit a head that takes its share of the softmax and gives nothing. Raises ServiceError on anything a model passes
    that would change the numbers and is not understood here.
    """
    _refuse_unknown(module, attention_mask, rest)
    if query.is_meta:  # probing: only shapes matter
        return _without_data(module, query, key, value), None
    current = _current.get()
    if current is None:
        raise ServiceError("the model was run outside a pass: its attention only knows the rows of a plan")
    points = current.points.get(id(module), {})
    query = visited(points, Port.Q_ROT, query, 1)
    key_GRC = visited(points, Port.K_ROT, key, 1)[0]
    value_GRC = visited(points, Port.V, value, 1)[0]
    if current.trunks is not None:
        key_GRC, value_GRC = current.trunks.through(current.layer, key_GRC, value_GRC)
    formula = _Formula(
        scaling=query.shape[3] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
    )
    z = None
    if current.has_kernel:
        z = _by_kernel(current, query, key_GRC, value_GRC, formula)
    if z is None or any(port in points for port in MASKED):
        layer = _Layer(current, query, key_GRC, value_GRC, formula)
        written = layer.attend_visited(points)
        if z is None:
            for chunk in layer.others:
                layer.attend(chunk)
            z = layer.result(query.dtype)
        elif written:
            rows = to_device(written, current.device)
            z = z.index_copy(1, rows, layer.result(query.dtype).index_select(1, rows))
    return visited(points, Port.Z, z, 2), None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Formula:
    """How one layer attends."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks_H: Tensor | None


def _by_kernel(current: AttentionPass, query: Tensor, key_GRC: Tensor, value_GRC: Tensor, formula: _Formula) -> Tensor:
    """One layer's attention in one pass, `[1, T, H, C]`, in one launch."""
    from engine.flash import flash_attention  # Triton comes with torch for CUDA, and is not there without

    current.store.put(current.layer, current.pass_id, key_GRC, value_GRC)
    out_THC = flash_attention(
        query[0],
        key_GRC,
        value_GRC,
        current.key_tables,
        scaling=formula.scaling,
        window=formula.window,
        softcap=formula.softcap,
        sinks_H=formula.sinks_H,
    )
    current.store.drop(current.layer, current.pass_id)
    return out_THC[None]


def _without_data(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The result's shape; tells whoever watches of the points in their order."""
    z = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    watch = _watch.get()
    if watch is not None:
        pairs = torch.empty(1, query.shape[2], query.shape[1], device="meta")
        watch(module, Port.Q_ROT, query.transpose(1, 2))
        watch(module, Port.K_ROT, key.transpose(1, 2))
        watch(module, Port.V, value.transpose(1, 2))
        watch(module, Port.SCORES, pairs)
        watch(module, Port.PATTERN, pairs.clone())
        watch(module, Port.Z, z)
    return z


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, rest: dict[str, Any]) -> None:
    given = {name for name, value in rest.items() if value is not None and value is not False}
    unknown = sorted(given - _HARMLESS)
    if unknown or attention_mask is not None:
        names = ", ".join(unknown) or "attention_mask"
        raise ServiceError(f"{type(module).__name__} passes {names} to attention, which packed rows do not support yet")
    if not getattr(module, "is_causal", True) or rest.get("is_causal") is False:
        raise ServiceError(f"{type(module).__name__} is not causal: packed rows attend to earlier tokens only")


class _Layer:
    """One layer's attention in one pass, in pages."""

    def __init__(
        self, current: AttentionPass, query: Tensor, key_GRC: Tensor, value_GRC: Tensor, formula: _Formula
    ) -> None:
        self.current, self.formula = current, formula
        self.others = current.chunks  # that nobody has computed yet
        num_heads, self.num_groups, self.num_rows = query.shape[1], key_GRC.shape[0], query.shape[2]
        self.share = num_heads // self.num_groups
        sinks_H = formula.sinks_H
        self.sinks_GE = None if sinks_H is None else sinks_H.float().view(self.num_groups, self.share)
        queries_GETC = query[0].unflatten(0, (self.num_groups, self.share))
        scaled = torch.empty(self.num_groups, self.num_rows, self.share, query.shape[3], device=query.device)
        torch.mul(queries_GETC.transpose(1, 2), formula.scaling, out=scaled)
        self.queries_GTEC = scaled
        values_GRC = value_GRC.float()
        # A value that is not finite must not reach rows that do not see it, and zero times infinity is no zero.
        self.odd_GRC: Tensor | None = None
        if query.device.type == "cpu" and not bool(torch.isfinite(values_GRC.sum())):
            self.odd_GRC = values_GRC
            values_GRC = torch.where(torch.isfinite(values_GRC), values_GRC, 0.0)
        current.store.put(current.layer, current.pass_id, key_GRC.float(), values_GRC)
        self.out_GTEC = scaled.new_zeros(self.num_groups, self.num_rows, self.share, value_GRC.shape[2])

    def attend(self, chunk: Chunk) -> None:
        """Computes a chunk's rows, as many tiles at a time as the scores' memory allows."""
        width = chunk.prefix_columns + chunk.own_columns
        per_tile = self.num_groups * chunk.num_rows * self.share * width
        step = max(1, _MAX_SCORES // per_tile)
        prefix = self._prefix(chunk)
        for part in chunk.parts(step):
            own = self._own(part)
            self._give(part, prefix, own, self._pattern(self._scores(part, prefix, own)))

    def attend_visited(self, points: Points) -> list[int]:
        """Computes the rows whose scores or patterns somebody looks at, all together; rows that were written to."""
        pairs = [points[port] for port in MASKED if port in points]
        if not pairs:
            return []
        asked = sorted({row for point in pairs for row in point.rows})
        both = [apart(chunk, asked) for chunk in self.others]
        self.others = [others for _, others in both if others is not None]
        chunks = [own for own, _ in both if own is not None]
        prefixes, owns = [self._prefix(chunk) for chunk in chunks], [self._own(chunk) for chunk in chunks]
        parts = zip(chunks, prefixes, owns, strict=True)
        held = [Held(chunk, self._scores(chunk, prefix, own)) for chunk, prefix, own in parts]
        written = self._visit(points, Port.SCORES, held)
        held = [Held(one.chunk, self._pattern(one.values_GNW)) for one in held]
        written |= self._visit(points, Port.PATTERN, held)
        for one, prefix, own in zip(held, prefixes, owns, strict=True):
            self._give(one.chunk, prefix, own, one.values_GNW)
        return sorted(written)

    def _visit(self, points: Points, port: Port, held: list[Held]) -> set[int]:
        pairs = Pairs(held, MASKED[port], self.num_groups, self.share, self.queries_GTEC.device)
        if port in points:
            points[port].visit(pairs)
        return pairs.written

    def _prefix(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Keys and values before the tiles' own pages, `[G, P, C]`."""
        if not chunk.prefix_columns:
            return None
        spans = tuple(Span(self.current.pass_id, start, stop) for start, stop in chunk.geometry.prefix)
        return self.current.store.read(self.current.layer, spans)

    def result(self, dtype: torch.dtype) -> Tensor:
        """`[1, T, H, C]`; nothing is computed behind."""
        self.current.store.drop(self.current.layer, self.current.pass_id)
        out_1THC: Tensor = self.out_GTEC.transpose(0, 1).flatten(1, 2)[None].to(dtype)
        return out_1THC

    def _scores(self, chunk: Chunk, prefix: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor]) -> Tensor:
        """`[G, N, W]`: over the prefix and over the tiles' own pages; -inf where a row sees no key."""
        num_tiles, num_rows = len(chunk.tiles), chunk.num_rows
        if isinstance(chunk.rows, slice):
            q_GREC = self.queries_GTEC[:, chunk.rows]
        else:
            q_GREC = self.queries_GTEC.index_select(1, chunk.rows)
        q_GNC = q_GREC.flatten(1, 2)
        own_GNO = _product(_grouped(q_GNC, num_tiles), own[0].transpose(1, 2))
        parts = [own_GNO.view(self.num_groups, -1, chunk.own_columns)]
        if prefix is not None:
            parts.insert(0, _product(q_GNC, prefix[0].transpose(1, 2)))
        if self.formula.softcap is not None:
            parts = [_capped(part, self.formula.softcap) for part in parts]
        hidden = chunk.hidden(self.formula.window)
        for part, out in zip(reversed(parts), reversed(hidden), strict=False):
            if out is not None:
                part.view(self.num_groups, num_tiles, num_rows, self.share, -1).masked_fill_(out, -math.inf)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _pattern(self, scores_GNW: Tensor) -> Tensor:
        """The softmax over whole pages."""
        if self.sinks_GE is None:
            return torch.softmax(scores_GNW, 2)
        return torch.softmax(torch.cat([self._sink_page(scores_GNW.shape[1]), scores_GNW], 2), 2)[:, :, PAGE:]

    def _give(
        self, chunk: Chunk, prefix: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor], pattern_GNW: Tensor
    ) -> None:
        """Adds the values up, page by page, and puts down what comes of it."""
        num_tiles, values = len(chunk.tiles), own[1]
        own_pattern = _grouped(pattern_GNW[:, :, chunk.prefix_columns :], num_tiles)
        out_GNC = pattern_GNW.new_zeros(self.num_groups, pattern_GNW.shape[1], values.shape[2])
        if prefix is not None:
            out_GNC = _add_pages(out_GNC, pattern_GNW[:, :, : chunk.prefix_columns], prefix[1])
        out = _add_pages(_grouped(out_GNC, num_tiles), own_pattern, values)
        out = out.reshape(self.num_groups, -1, values.shape[2])
        if self.odd_GRC is not None:
            out = self._with_odd(chunk, out, pattern_GNW, chunk.hidden(self.formula.window))
        out_GREC = out.unflatten(1, (-1, self.share))
        if isinstance(chunk.rows, slice):
            self.out_GTEC[:, chunk.rows] = out_GREC
        else:
            self.out_GTEC.index_copy_(1, chunk.rows, out_GREC)

    def _own(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Keys and values of the tiles' own pages, `[G B, O, C]`."""
        rows, block = chunk.own_rows, self.current.pass_id
        if isinstance(rows, slice):
            return self.current.store.read(self.current.layer, (Span(block, rows.start, rows.stop),))
        keys, values = self.current.store.take(self.current.layer, block, rows)
        return _grouped(keys, len(chunk.tiles)), _grouped(values, len(chunk.tiles))

    def _sink_page(self, num_vectors: int) -> Tensor:
        """A page before all others, `[G, N, PAGE]`: the sink's logit, and columns that nobody sees."""
        assert self.sinks_GE is not None
        page = self.queries_GTEC.new_full((self.num_groups, num_vectors, PAGE), -math.inf)
        page.view(self.num_groups, -1, self.share, PAGE)[..., 0] = self.sinks_GE[:, None]
        return page

    def _with_odd(
        self, chunk: Chunk, out_GNC: Tensor, pattern_GNW: Tensor, hidden: tuple[Tensor | None, Tensor]
    ) -> Tensor:
        """Adds what values that are not finite give to the rows that see them. Rare, so column by column."""
        assert self.odd_GRC is not None
        num_tiles = len(chunk.tiles)
        rows = chunk.own_rows
        stream = torch.arange(self.odd_GRC.shape[1])
        own = (stream[rows] if isinstance(rows, slice) else rows).view(num_tiles, -1)
        before = torch.cat([stream[start:stop] for start, stop in chunk.geometry.prefix] or [stream[:0]])
        columns = torch.cat([before.expand(num_tiles, -1), own], 1)  # [B, W] rows of the stream
        is_odd = ~torch.isfinite(self.odd_GRC).all(2).all(0)
        shape = (self.num_groups, num_tiles, chunk.num_rows, self.share, -1)
        out, pattern = out_GNC.view(shape).clone(), pattern_GNW.reshape(shape)
        for column in is_odd[columns].any(0).nonzero().flatten().tolist():
            place = column - chunk.prefix_columns
            unseen = hidden[1][..., place] if place >= 0 else None if hidden[0] is None else hidden[0][..., column]
            value = self.odd_GRC[:, columns[:, column]][:, :, None, None]  # [G, B, 1, 1, C]
            given = torch.where(torch.isfinite(value), 0.0, pattern[..., column, None] * value)
            out += given if unseen is None else given.masked_fill(unseen[..., None], 0.0)
        return out.view(out_GNC.shape)


def _grouped(tensor_GNC: Tensor, num_tiles: int) -> Tensor:
    """`[G, B N, C]` as `[G B, N, C]`."""
    if num_tiles == 1:
        return tensor_GNC
    grouped: Tensor = tensor_GNC.unflatten(1, (num_tiles, -1)).flatten(0, 1)
    return grouped


def _product(a_BNC: Tensor, b_BCM: Tensor) -> Tensor:
    """`[B, N, M]`; with at least as many rows as keep a row's bits from their number."""
    rows, least = a_BNC.shape[1], least_rows(a_BNC.device)
    if rows < least:
        return torch.bmm(F.pad(a_BNC, (0, 0, 0, least - rows)), b_BCM)[:, :rows].contiguous()
    return torch.bmm(a_BNC, b_BCM)


def _add_pages(sum_BNC: Tensor, pattern_BNP: Tensor, values_BPC: Tensor) -> Tensor:
    """Adds a pattern's values to a sum in place, page by page, in order; returns the sum."""
    rows, least = sum_BNC.shape[1], least_rows(sum_BNC.device)
    if rows < least:
        more = (0, 0, 0, least - rows)
        return _add_pages(F.pad(sum_BNC, more), F.pad(pattern_BNP, more), values_BPC)[:, :rows]
    for first in range(0, pattern_BNP.shape[2], PAGE):
        sum_BNC.baddbmm_(pattern_BNP[:, :, first : first + PAGE], values_BPC[:, first : first + PAGE])
    return sum_BNC


def _capped(scores: Tensor, cap: float) -> Tensor:
    """`cap * tanh(scores / cap)`, with bits that do not depend on how many scores there are."""
    flat = F.pad(scores.flatten(), (0, -scores.numel() % FLAT_MULTIPLE))
    capped: Tensor = flat.div_(cap).tanh_().mul_(cap)[: scores.numel()].view(scores.shape)
    return capped
