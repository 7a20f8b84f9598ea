"""Attention that a family wrote itself, found by numbers: which call in its forward gives the pattern.

In such families scores and patterns are tensors between calls of the attention module's forward. A call whose result is
`[1, heads, tokens, tokens]`, of rows that sum to 1 over earlier tokens, gives the pattern; if it is the softmax of what
the call was given, that is the scores. The matrix that takes what the pattern makes of some other matrix's features is
the projection of all heads' results. Where a forward calls torch's fused attention instead there are no such tensors:
who attends, and with which heads, is known.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.arguments import Arguments, Selector
from polytrace.graph import Port
from polytrace.sources import split_operation

# T = tokens, H = heads, C = features of a head

_TOLERANCE = 1e-5
_FUSED = "scaled_dot_product_attention"  # of torch, which takes queries, keys and values first


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFormula:
    """Of one attention module."""

    way: str  # to the call that gives the pattern, inside of the module's forward
    pattern_HTT: Tensor
    scores: Selector | None  # of what that call is given, where that is the scores
    scores_HTT: Tensor | None

    def sources(self, z_TW: Tensor, features_TF: Tensor) -> list[int] | None:
        """Where in some features each head's begin whose mixture is its part of `z_TW`; None where not all do."""
        num_heads = self.pattern_HTT.shape[0]
        size = z_TW.shape[1] // num_heads
        if z_TW.shape[1] % num_heads or features_TF.shape[1] < size:
            return None
        mixed_HTPC = (self.pattern_HTT @ features_TF).unfold(2, size, 1)  # P = places
        wanted_HTC = z_TW.unflatten(1, (num_heads, size)).transpose(0, 1)
        far_HP = (mixed_HTPC - wanted_HTC[:, :, None]).abs().amax((1, 3))
        best, places = far_HP.min(1)
        is_there = float(best.max()) <= 10 * _TOLERANCE * float(z_TW.abs().max())
        return places.tolist() if is_there else None

    def is_of(self, query_THC: Tensor, key_TGC: Tensor) -> bool:
        """Whether the scores are these queries times these keys, but for a factor and what each key adds to all."""
        if self.scores_HTT is None:
            return False
        share = query_THC.shape[1] // key_TGC.shape[1]
        product_HTT = torch.einsum("qhc,khc->hqk", query_THC, key_TGC.repeat_interleave(share, 1))
        seen = torch.ones(product_HTT.shape[1:], dtype=torch.bool).tril()
        ours, theirs = (_varying(own, seen) for own in (product_HTT, self.scores_HTT.float()))
        likeness = float(ours @ theirs) / max(1e-12, float(ours.norm() * theirs.norm()))
        return likeness > 1 - 1e-4


@dataclass(slots=True)
class FormulaFinder:
    """Listens to the calls in a forward."""

    modules: Container[str]
    found: dict[str, OwnFormula] = field(default_factory=dict)  # by module: of its first call that gives a pattern
    fused: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # by module: q, k, v, z as [T, H, C]
    _given: dict[str, dict[Selector, Tensor]] = field(default_factory=dict)

    def watch(self, path: str, port: Port, value: Any, _called: Any) -> None:
        """As `operations.Watch`."""
        if path.rpartition(".")[2].rpartition("_")[0].endswith(_FUSED):
            self._watch_fused(path, port, value)
            return
        if port is Port.INPUTS:
            own = value.tensors() if isinstance(value, Arguments) else {}
            self._given[path] = {way: tensor[0].clone() for way, tensor in own.items() if _is_of_pairs(tensor)}
            return
        given = self._given.pop(path, {})
        split = split_operation(path, self.modules)
        if split is None or split[0] in self.found or not _is_of_pairs(value) or not _is_pattern(value[0]):
            return
        pattern = value[0].float().clone()
        own_scores = [(way, one) for way, one in given.items() if _is_softmax(pattern, one)]
        scores, scores_HTT = own_scores[0] if own_scores else (None, None)
        self.found[split[0]] = OwnFormula(way=split[1], pattern_HTT=pattern, scores=scores, scores_HTT=scores_HTT)

    def _watch_fused(self, path: str, port: Port, value: Any) -> None:
        split = split_operation(path, self.modules)
        if port is Port.INPUTS and isinstance(value, Arguments):
            self._given[path] = {way: tensor.clone() for way, tensor in value.tensors().items()}
        elif isinstance(value, Tensor) and split is not None:
            heads = [*list(self._given.pop(path, {}).values())[:3], value]
            if len(heads) == 4 and all(own.ndim == 4 and own.shape[0] == 1 for own in heads):
                self.fused[split[0]] = tuple(own[0].transpose(0, 1).clone() for own in heads)


def _varying(pairs_HTT: Tensor, seen: Tensor) -> Tensor:
    """How pairs that are seen differ from query to query, flat."""
    own = pairs_HTT.masked_fill(~seen, 0)
    return (own - own.sum(1, keepdim=True) / seen.sum(0)).masked_fill(~seen, 0).flatten()


def _is_of_pairs(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        return False
    return value.shape[0] == 1 and value.shape[2] == value.shape[3] > 1


def _is_pattern(pattern_HTT: Tensor) -> bool:
    sums, later = pattern_HTT.sum(2), pattern_HTT.triu(1)
    is_even = float((sums - 1).abs().max()) <= _TOLERANCE and float(pattern_HTT.min()) >= 0
    return is_even and not bool(later.any()) and bool((pattern_HTT.diagonal(dim1=1, dim2=2) > 0).all())


def _is_softmax(pattern_HTT: Tensor, scores_HTT: Tensor) -> bool:
    if scores_HTT.shape != pattern_HTT.shape:
        return False
    return float((scores_HTT.float().softmax(2) - pattern_HTT).abs().max()) <= _TOLERANCE
