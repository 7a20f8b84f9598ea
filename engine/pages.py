"""Attention in pages: one layer's rows by products and a softmax, with every row's bits its own.

A row's bits depend on its query and on the keys and values at positions up to its own, and on nothing else: not on
which rows run beside it, nor on whether its earlier rows are its segment's own or a parent's. To that end scores are
products over the head dimension, the softmax of a row is taken over whole pages (`engine.chunks`), and values are added
up page by page, always in products of the same inner size. What a page gives to a row that sees none of it is an exact
zero.

This is how CPUs attend, machines that cannot compile a kernel, and rows whose scores or patterns somebody asks for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.chunks import Chunk
from engine.lanes import FLAT_MULTIPLE, least_rows
from engine.points import MASKED, Held, Pairs, Points, apart
from engine.spans import Span, SpanStore
from polytrace.graph import Port
from scheduling.plan import PAGE, PassId

# T = packed rows, R = those and the rows of trunks, H = query heads, G = key/value heads, E = query heads a key/value
# head (H = G E), C = head dimension, B = tiles of a chunk, Q = query rows of each, N = B Q E: query vectors of a chunk,
# P = columns of the prefix, O = columns of a tile's own pages, W = P + O

_MAX_SCORES = 1 << 22  # floats of scores at a time: what stays in a cache near the core


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """How one layer attends."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks_H: Tensor | None


class PagedLayer:
    """One layer's attention in one pass, in pages."""

    def __init__(
        self,
        store: SpanStore,
        block: tuple[int, PassId],  # the layer and the pass, in the store
        chunks: list[Chunk],
        query: Tensor,
        key_GRC: Tensor,
        value_GRC: Tensor,
        formula: Formula,
    ) -> None:
        self.store, self.block, self.formula = store, block, formula
        self.others = chunks  # that nobody has computed yet
        num_heads, self.num_groups, self.num_rows = query.shape[1], key_GRC.shape[0], query.shape[2]
        self.share = num_heads // self.num_groups
        sinks_H = formula.sinks_H
        self.sinks_GE = None if sinks_H is None else sinks_H.float().view(self.num_groups, self.share)
        self.query_TGEC = query[0].transpose(0, 1).unflatten(1, (self.num_groups, self.share))
        self.odd_GRC: Tensor | None = None
        if chunks:
            self._put(key_GRC, value_GRC.float())
        shape = (self.num_rows, self.num_groups, self.share, value_GRC.shape[2])
        self.out_TGEC = torch.zeros(shape, device=query.device)

    @cached_property
    def queries_GTEC(self) -> Tensor:
        """Scaled."""
        query_GTEC = self.query_TGEC.transpose(0, 1)
        scaled = torch.empty(query_GTEC.shape, device=query_GTEC.device)
        return torch.mul(query_GTEC, self.formula.scaling, out=scaled)

    def _put(self, key_GRC: Tensor, values_GRC: Tensor) -> None:
        # A value that is not finite must not reach rows that do not see it, and zero times infinity is no zero.
        if values_GRC.device.type == "cpu" and not bool(torch.isfinite(values_GRC.sum())):
            self.odd_GRC = values_GRC
            values_GRC = torch.where(torch.isfinite(values_GRC), values_GRC, 0.0)
        self.store.put(*self.block, key_GRC.float(), values_GRC)

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
        if port not in points:
            return set()
        pairs = Pairs(held, MASKED[port], self.num_groups, self.share, self.out_TGEC.device, self.sinks_GE)
        points[port].visit(pairs)
        return pairs.written

    def _prefix(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Keys and values before the tiles' own pages, `[G, P, C]`."""
        if not chunk.prefix_columns:
            return None
        spans = tuple(Span(self.block[1], start, stop) for start, stop in chunk.geometry.prefix)
        return self.store.read(self.block[0], spans)

    def result(self, dtype: torch.dtype) -> Tensor:
        """`[1, T, H, C]`; nothing is computed behind."""
        self.store.drop(*self.block)
        out_1THC: Tensor = self.out_TGEC.flatten(1, 2)[None].to(dtype)
        return out_1THC

    def _scores(self, chunk: Chunk, prefix: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor]) -> Tensor:
        """`[G, N, W]`: over the prefix and over the tiles' own pages; -inf where a row sees no key."""
        num_tiles, num_rows = len(chunk.tiles), chunk.num_rows
        if isinstance(chunk.rows, slice):
            q_GREC = self.queries_GTEC[:, chunk.rows]
        else:
            q_GREC = self.queries_GTEC.index_select(1, chunk.rows)
        q_GNC = q_GREC.flatten(1, 2)
        own_GNO = product(_grouped(q_GNC, num_tiles), own[0].transpose(1, 2))
        parts = [own_GNO.view(self.num_groups, -1, chunk.own_columns)]
        if prefix is not None:
            parts.insert(0, product(q_GNC, prefix[0].transpose(1, 2)))
        if self.formula.softcap is not None:
            parts = [capped(part, self.formula.softcap) for part in parts]
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
            out_GNC = add_pages(out_GNC, pattern_GNW[:, :, : chunk.prefix_columns], prefix[1])
        out = add_pages(_grouped(out_GNC, num_tiles), own_pattern, values)
        out = out.reshape(self.num_groups, -1, values.shape[2])
        if self.odd_GRC is not None:
            out = self._with_odd(chunk, out, pattern_GNW, chunk.hidden(self.formula.window))
        out_RGEC = out.unflatten(1, (-1, self.share)).transpose(0, 1)
        if isinstance(chunk.rows, slice):
            self.out_TGEC[chunk.rows] = out_RGEC
        else:
            self.out_TGEC.index_copy_(0, chunk.rows, out_RGEC)

    def _own(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Keys and values of the tiles' own pages, `[G B, O, C]`."""
        rows, (layer, block) = chunk.own_rows, self.block
        if isinstance(rows, slice):
            return self.store.read(layer, (Span(block, rows.start, rows.stop),))
        keys, values = self.store.take(layer, block, rows)
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


def product(a_BNC: Tensor, b_BCM: Tensor, least: int | None = None) -> Tensor:
    """`[B, N, M]`; with at least as many rows as keep a row's bits from their number: `least`, or what always does."""
    rows, least = a_BNC.shape[1], least or least_rows(a_BNC.device)
    if rows < least:
        return torch.bmm(F.pad(a_BNC, (0, 0, 0, least - rows)), b_BCM)[:, :rows].contiguous()
    return torch.bmm(a_BNC, b_BCM)


def add_pages(sum_BNC: Tensor, pattern_BNP: Tensor, values_BPC: Tensor, least: int | None = None) -> Tensor:
    """Adds a pattern's values to a sum in place, page by page, in order; returns the sum. `least` as in `product`."""
    rows, least = sum_BNC.shape[1], least or least_rows(sum_BNC.device)
    if rows < least:
        more = (0, 0, 0, least - rows)
        return add_pages(F.pad(sum_BNC, more), F.pad(pattern_BNP, more), values_BPC, least)[:, :rows]
    for first in range(0, pattern_BNP.shape[2], PAGE):
        sum_BNC.baddbmm_(pattern_BNP[:, :, first : first + PAGE], values_BPC[:, first : first + PAGE])
    return sum_BNC


def capped(scores: Tensor, cap: float) -> Tensor:
    """`cap * tanh(scores / cap)`, with bits that do not depend on how many scores there are."""
    flat = F.pad(scores.flatten(), (0, -scores.numel() % FLAT_MULTIPLE))
    capped: Tensor = flat.div_(cap).tanh_().mul_(cap)[: scores.numel()].view(scores.shape)
    return capped
