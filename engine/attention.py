"""The one attention function, registered with transformers: attends segment by segment through the span store.

Owns how packed rows attend. A model whose attention implementation is `NAME` and whose forward runs inside `attending`
computes, for every segment of the pass, exactly what it would compute for that sequence alone; rows that belong to no
segment (padding to the floor) get zeros. No mask function is registered under `NAME`, so transformers builds no mask.

Segments of equal length are computed in one call where the kernel gives the bits it gives alone: torch's fused
attention does for every shape tried; batched matrix products of the explicit path (soft-capped scores) do not for short
sequences, so there each segment is computed by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from engine.spans import SpanStore
from polytrace.errors import ServiceError
from scheduling.plan import PassId, Segment

# T = packed rows, H = query heads, G = key/value heads, C = head dimension
# B = segments of one group, Q = query rows of each, K = keys of each

NAME = "polytrace"

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
class SegmentGroup:
    """Segments computed in one call: as many query rows and as many keys each."""

    segments: tuple[Segment, ...]
    num_rows: int  # query rows of each
    num_keys: int

    @property
    def is_own(self) -> bool:
        """Whether every segment attends to its own rows of this pass only."""
        return all(
            len(s.spans) == 1 and (s.spans[0].start, s.spans[0].stop) == (s.start, s.stop) for s in self.segments
        )

    @property
    def is_adjacent(self) -> bool:
        """Whether the segments lie one after another, so that a reshape is enough to batch them."""
        return all(a.stop == b.start for a, b in pairwise(self.segments))


class AttentionPass:
    """The segments of one pass and the store they attend through. Made once a pass, used by every layer."""

    def __init__(self, pass_id: PassId, segments: tuple[Segment, ...], store: SpanStore) -> None:
        self.pass_id = pass_id
        self.segments = segments
        self.store = store
        self._rows: dict[int, Tensor] = {}  # batch -> its rows in the stream, where they are not adjacent

    @cached_property
    def batches(self) -> tuple[SegmentGroup, ...]:
        """Segments of like shape together."""
        by_shape: dict[tuple[int, int, bool], list[Segment]] = {}
        for segment in self.segments:
            is_own = len(segment.spans) == 1 and segment.spans[0].block == self.pass_id
            by_shape.setdefault((*_sizes(segment), is_own), []).append(segment)
        return tuple(
            SegmentGroup(segments=tuple(group), num_rows=rows, num_keys=keys)
            for (rows, keys, _), group in by_shape.items()
        )

    @cached_property
    def singles(self) -> tuple[SegmentGroup, ...]:
        """Each segment by itself."""
        sizes = [(segment, *_sizes(segment)) for segment in self.segments]
        return tuple(SegmentGroup(segments=(s,), num_rows=rows, num_keys=keys) for s, rows, keys in sizes)

    def rows(self, index: int, device: torch.device) -> Tensor:
        """Stream rows of a batch's segments, `[B * Q]`."""
        if index not in self._rows:
            spans = [torch.arange(s.start, s.stop) for s in self.batches[index].segments]
            self._rows[index] = torch.cat(spans).to(device)
        return self._rows[index]


def _sizes(segment: Segment) -> tuple[int, int]:
    """Query rows of a segment and the keys it attends to."""
    return segment.stop - segment.start, sum(span.stop - span.start for span in segment.spans)


_current: ContextVar[AttentionPass | None] = ContextVar("attention_pass", default=None)


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
    **rest: Any,
) -> tuple[Tensor, None]:
    """The interface of transformers: `[1, H, T, C]` queries and `[1, G, T, C]` keys and values to `[1, T, H, C]`.

    Raises ServiceError on anything a model passes that would change the numbers and is not understood here.
    """
    _refuse_unknown(module, attention_mask, rest)
    if query.is_meta:  # probing: only shapes matter
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None
    current = _current.get()
    if current is None:
        raise ServiceError("the model was run outside a pass: its attention only knows the rows of a plan")
    layer = id(module)
    current.store.put(layer, current.pass_id, key, value)
    out_1THC = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    for index, group in enumerate(current.batches if softcap is None else current.singles):
        q_BHQC, k_BGKC, v_BGKC = _gather(current, layer, index, group, query, key, value)
        o_BHQC = _attend(q_BHQC, k_BGKC, v_BGKC, scaling, sliding_window, softcap)
        _scatter(current, index, group, out_1THC, o_BHQC)
    current.store.drop(layer, current.pass_id)
    return out_1THC, None


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, rest: dict[str, Any]) -> None:
    given = {name for name, value in rest.items() if value is not None and value is not False}
    unknown = sorted(given - _HARMLESS)
    if unknown or attention_mask is not None:
        names = ", ".join(unknown) or "attention_mask"
        raise ServiceError(f"{type(module).__name__} passes {names} to attention, which packed rows do not support yet")
    if not getattr(module, "is_causal", True) or rest.get("is_causal") is False:
        raise ServiceError(f"{type(module).__name__} is not causal: packed rows attend to earlier tokens only")


def _gather(
    current: AttentionPass, layer: int, index: int, group: SegmentGroup, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Batches a group: `[B, heads, rows, C]` of queries, keys and values; views where the layout allows."""
    if len(group.segments) == 1:
        (segment,) = group.segments
        return query[:, :, segment.start : segment.stop], *current.store.read(layer, segment.spans)
    q_BHQC = _batch(current, index, group, query)
    if group.is_own:
        return q_BHQC, _batch(current, index, group, key), _batch(current, index, group, value)
    spans = [current.store.read(layer, segment.spans) for segment in group.segments]
    return q_BHQC, torch.cat([k for k, _ in spans]), torch.cat([v for _, v in spans])


def _batch(current: AttentionPass, index: int, group: SegmentGroup, stream_1HTC: Tensor) -> Tensor:
    if group.is_adjacent:
        rows_1HRC = stream_1HTC[:, :, group.segments[0].start : group.segments[-1].stop]
    else:
        rows_1HRC = stream_1HTC.index_select(2, current.rows(index, stream_1HTC.device))
    rows_HBQC: Tensor = rows_1HRC[0].unflatten(1, (len(group.segments), group.num_rows))
    return rows_HBQC.transpose(0, 1)


def _scatter(current: AttentionPass, index: int, group: SegmentGroup, out_1THC: Tensor, o_BHQC: Tensor) -> None:
    o_BQHC = o_BHQC.transpose(1, 2)
    if group.is_adjacent:
        rows_RHC = out_1THC[0, group.segments[0].start : group.segments[-1].stop]
        rows_RHC.unflatten(0, (len(group.segments), group.num_rows)).copy_(o_BQHC)
    else:
        out_1THC[0].index_copy_(0, current.rows(index, out_1THC.device), o_BQHC.flatten(0, 1))


def _attend(
    q_BHQC: Tensor,
    k_BGKC: Tensor,
    v_BGKC: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention where the queries are the last rows of the keys' sequence."""
    num_rows, num_keys = q_BHQC.shape[2], k_BGKC.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < num_keys else None
    is_grouped = q_BHQC.shape[1] != k_BGKC.shape[1]
    if softcap is None:
        if window is None and num_rows in (1, num_keys):
            return F.scaled_dot_product_attention(
                q_BHQC, k_BGKC, v_BGKC, is_causal=num_rows > 1, scale=scaling, enable_gqa=is_grouped
            )
        mask = _visible(num_rows, num_keys, window, q_BHQC.device)
        return F.scaled_dot_product_attention(
            q_BHQC, k_BGKC, v_BGKC, attn_mask=mask, scale=scaling, enable_gqa=is_grouped
        )
    if is_grouped:
        repeats = q_BHQC.shape[1] // k_BGKC.shape[1]
        k_BGKC, v_BGKC = k_BGKC.repeat_interleave(repeats, 1), v_BGKC.repeat_interleave(repeats, 1)
    scale = scaling if scaling is not None else q_BHQC.shape[-1] ** -0.5
    scores_BHQK = torch.tanh((q_BHQC @ k_BGKC.transpose(2, 3)) * scale / softcap) * softcap
    scores_BHQK = scores_BHQK.masked_fill(~_visible(num_rows, num_keys, window, q_BHQC.device), -torch.inf)
    pattern_BHQK = torch.softmax(scores_BHQK, -1, dtype=torch.float32).to(q_BHQC.dtype)
    return pattern_BHQK @ v_BGKC


def _visible(num_rows: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """`[Q, K]` bool: which keys a query row sees. Windows count the row itself, as transformers does."""
    query = torch.arange(num_keys - num_rows, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None]
    visible = key <= query
    return visible if window is None else visible & (query - key < window)
