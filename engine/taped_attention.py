"""Attention of a pass whose gradients are run back: forwards as ever, backwards sequence by sequence.

The rows attend by what attends in every pass, so they have its bits. What a sequence's rows give back is worked out
from its own queries, keys and values alone, in products whose shapes do not depend on who else is in the pass, some
queries at a time, so that no `[queries, keys]` of a whole sequence is kept (as Dao et al. 2022, arXiv:2205.14135, do).
Sequences whose scores or patterns somebody visits attend by plain differentiable products, with seams at both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from engine.pages import Formula
from engine.points import MASKED, Points
from engine.segment_pairs import SegmentPairs
from polytrace.graph import Port

# T = packed rows, L = rows of one sequence, R = queries at a time, M = keys that they see, H = query heads,
# G = key/value heads, E = query heads a key/value head (H = G E), C = head dimension

_MAX_SCORES = 1 << 22  # floats of scores at a time

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [1, H, T, C], [G, T, C], [G, T, C] to [1, T, H, C]


def taped_attention(
    attend: Attend,
    query: Tensor,
    key_GTC: Tensor,
    value_GTC: Tensor,
    formula: Formula,
    sequences: Sequence[range],
    points: Points,
) -> Tensor:
    """`[1, T, H, C]`, differentiable. `sequences` are the rows of each; what lies between gets no gradient."""
    asked = {row for port in MASKED if port in points for row in points[port].rows}
    visited = [rows for rows in sequences if not asked.isdisjoint(rows)]
    others = [rows for rows in sequences if asked.isdisjoint(rows)]
    z_1THC: Tensor = _Attended.apply(attend, query, key_GTC, value_GTC, formula, others)  # type: ignore[no-untyped-call]
    if not visited:
        return z_1THC
    own = _visited(query, key_GTC, value_GTC, formula, visited, points)
    parts, stop = [], 0
    for rows, z_LHC in zip(visited, own, strict=True):
        parts += [z_1THC[:, stop : rows.start], z_LHC[None]]
        stop = rows.stop
    return torch.cat([*parts, z_1THC[:, stop:]], 1)


def _visited(
    query: Tensor, key_GTC: Tensor, value_GTC: Tensor, formula: Formula, sequences: list[range], points: Points
) -> list[Tensor]:
    """`[L, H, C]` of each sequence, whose scores and patterns are visited together."""
    num_groups = key_GTC.shape[0]
    starts = [rows.start for rows in sequences]

    def visit(port: Port, parts: list[Tensor]) -> list[Tensor]:
        if port not in points:
            return parts
        pairs = SegmentPairs(starts, parts, MASKED[port], num_groups, formula.sinks_H)
        points[port].visit(pairs)
        return pairs.parts

    scores = []
    for rows in sequences:
        taken = slice(rows.start, rows.stop)
        own = _Queries(query[0, :, taken], key_GTC[:, taken], value_GTC[:, taken], formula)
        scores.append(own.scores(0, len(rows)).flatten(0, 1))  # [H, L, L]
    patterns = [_softmax(own_HLL, formula.sinks_H) for own_HLL in visit(Port.SCORES, scores)]
    found = []
    for rows, pattern_HLL in zip(sequences, visit(Port.PATTERN, patterns), strict=True):
        values_GLC = value_GTC[:, rows.start : rows.stop].float()
        z_GNC = torch.bmm(pattern_HLL.unflatten(0, (num_groups, -1)).flatten(1, 2), values_GLC)
        z_HLC = z_GNC.unflatten(1, (-1, len(rows))).flatten(0, 1)
        found.append(z_HLC.transpose(0, 1).to(query.dtype))
    return found


class _Queries:
    """One sequence: its queries against its keys."""

    def __init__(self, query_HLC: Tensor, key_GLC: Tensor, value_GLC: Tensor, formula: Formula) -> None:
        self.formula = formula
        self.query_GELC = (query_HLC.float() * formula.scaling).unflatten(0, (key_GLC.shape[0], -1)).contiguous()
        self.key_GLC, self.value_GLC = key_GLC.float().contiguous(), value_GLC.float().contiguous()

    def first_key(self, start: int) -> int:
        """The first that queries from `start` on see."""
        window = self.formula.window
        return 0 if window is None else max(0, start - window + 1)

    def products(self, start: int, stop: int) -> Tensor:
        """`[G, E, R, M]` of queries with the keys from the first that they see to the last."""
        q_GNC = self.query_GELC[:, :, start:stop].flatten(1, 2)
        keys_GMC = self.key_GLC[:, self.first_key(start) : stop].contiguous()
        products: Tensor = torch.bmm(q_GNC, keys_GMC.transpose(1, 2)).unflatten(1, (-1, stop - start))
        return products

    def hidden(self, start: int, stop: int) -> Tensor:
        """`[R, M]`: what a query does not see."""
        device = self.key_GLC.device
        queries = torch.arange(start, stop, device=device)[:, None]
        keys = torch.arange(self.first_key(start), stop, device=device)
        out = keys > queries
        return out if self.formula.window is None else out | (queries - keys >= self.formula.window)

    def scores(self, start: int, stop: int) -> Tensor:
        """`[G, E, R, M]`, capped; -inf where a query sees no key."""
        products = self.products(start, stop)
        cap = self.formula.softcap
        capped = products if cap is None else torch.tanh(products / cap) * cap
        return capped.masked_fill(self.hidden(start, stop), -math.inf)


def _softmax(scores: Tensor, sinks_H: Tensor | None) -> Tensor:
    """Over the keys of `[H, L, M]`; sinks take their share."""
    if sinks_H is None:
        return torch.softmax(scores, -1)
    sinks = sinks_H.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([sinks, scores], -1), -1)[..., 1:]


class _Attended(Function):
    @staticmethod
    def forward(
        ctx: Any,
        attend: Attend,
        query: Tensor,
        key_GTC: Tensor,
        value_GTC: Tensor,
        formula: Formula,
        sequences: Sequence[range],
    ) -> Tensor:
        ctx.save_for_backward(query, key_GTC, value_GTC)
        ctx.formula, ctx.sequences = formula, sequences
        return attend(query, key_GTC, value_GTC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1THC: Tensor) -> tuple[Tensor | None, ...]:
        query, key_GTC, value_GTC = ctx.saved_tensors
        of_query, of_key, of_value = (torch.zeros_like(one) for one in (query, key_GTC, value_GTC))
        for rows in ctx.sequences:
            taken = slice(rows.start, rows.stop)
            own = _Queries(query[0, :, taken], key_GTC[:, taken], value_GTC[:, taken], ctx.formula)
            given_HLC = gradient_1THC[0, taken].transpose(0, 1).float()
            of_query[0, :, taken], of_key[:, taken], of_value[:, taken] = _back(own, given_HLC)
        return None, of_query, of_key, of_value, None, None


def _back(own: _Queries, given_HLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a sequence's result gives to its queries, keys and values."""
    num_groups, share, length = own.query_GELC.shape[:3]
    given_GELC = given_HLC.unflatten(0, (num_groups, share))
    of_query, of_key, of_value = (torch.zeros_like(one) for one in (own.query_GELC, own.key_GLC, own.value_GLC))
    step = max(1, _MAX_SCORES // (num_groups * share * length))
    for start in range(0, length, step):
        stop = min(length, start + step)
        first, cap = own.first_key(start), own.formula.softcap
        scores = own.scores(start, stop)
        pattern = _softmax(scores.flatten(0, 1), own.formula.sinks_H).view(scores.shape)
        given_GNC = given_GELC[:, :, start:stop].flatten(1, 2)
        of_value[:, first:stop] += torch.bmm(pattern.flatten(1, 2).transpose(1, 2), given_GNC)
        values_GMC = own.value_GLC[:, first:stop].contiguous()
        of_pattern = torch.bmm(given_GNC, values_GMC.transpose(1, 2)).view(scores.shape)
        hidden = own.hidden(start, stop)
        of_pattern = of_pattern.masked_fill(hidden, 0.0)  # a value that is not finite is not everybody's
        of_scores = pattern * (of_pattern - (pattern * of_pattern).sum(-1, keepdim=True))
        if cap is not None:
            of_scores = of_scores * (1 - (scores / cap).masked_fill(hidden, 0.0).square())
        of_GNM = of_scores.flatten(1, 2)
        of_query[:, :, start:stop] = torch.bmm(of_GNM, own.key_GLC[:, first:stop].contiguous()).unflatten(
            1, (share, -1)
        )
        of_key[:, first:stop] += torch.bmm(of_GNM.transpose(1, 2), own.query_GELC[:, :, start:stop].flatten(1, 2))
    return (of_query * own.formula.scaling).flatten(0, 1), of_key, of_value
