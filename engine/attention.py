"""The one attention function, registered with transformers: every row attends to the keys that its sequence has.

Owns how packed rows attend. A model whose attention implementation is `NAME` and whose forward runs inside `attending`
computes, for every segment of the pass, exactly what it would compute for that sequence alone; rows that belong to no
segment (padding) get zeros. No mask function is registered under `NAME`, so transformers builds no mask.

A row's bits depend on its query and on the keys and values at positions up to its own, and on nothing else: not on
which rows run beside it, nor on whether its earlier rows are its segment's own or a parent's. `engine.pages` keeps that
on CPUs, and on machines that cannot compile a kernel; on GPUs one kernel a layer does (`engine.flash`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from engine.chunks import Chunk, chunks_of
from engine.copies import to_device
from engine.decoding import Decoding
from engine.kernels import has_kernels
from engine.pages import Formula, PagedLayer
from engine.points import MASKED, Points, Watch, visited
from engine.spans import SpanStore
from engine.streams import Stream
from engine.tables import KeyTables
from engine.taped_attention import taped_attention
from engine.trunks import Trunks
from polytrace.errors import ServiceError
from polytrace.graph import Port
from scheduling.plan import PassId

# T = packed rows, R = those and the rows of trunks, H = query heads, G = key/value heads, C = head dimension

NAME = "polytrace"

# What models pass beside the tensors and what has no effect on a causal, packed, dropout-free pass.
_HARMLESS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "layer_idx",
        "logits_to_keep",
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


class Gathered:
    """Rows of a layer that look for keys behind the stream's, where those of trunks are gathered."""

    def __init__(self, stream: Stream, trunks: list[int], device: torch.device, without: frozenset[int]) -> None:
        """`trunks`: the places of those whose rows are gathered, in order; `without`: segments left to others."""
        self.trunks = trunks
        self._made = stream, device, without

    @cached_property
    def chunks(self) -> list[Chunk]:
        """Their tiles."""
        return list(chunks_of(*self._made))


class AttentionPass:
    """How the rows of a pass attend at the level that runs now, and the store they attend through."""

    def __init__(self, pass_id: PassId, store: SpanStore, device: torch.device, trunks: Trunks | None = None) -> None:
        self.pass_id = pass_id
        self.store = store
        self.device = device
        self.trunks = trunks  # None: there are none, neither to find nor to keep
        self.has_own_cache = False  # the model's: keys come to attention as it holds them, earlier ones first
        self.is_taped = False  # its gradients are run back later
        self.points: dict[int, Points] = {}  # visits inside of attention, by the module's id
        self.has_kernel = has_kernels(device)
        self.layer = 0  # that runs now
        self._stream = Stream((), 0, 1)
        self._gathered: dict[frozenset[int], Gathered] = {}  # by what would decode

    def enter(self, layer: int, stream: Stream) -> None:
        """The layer that runs from now on, and its rows."""
        self.layer = layer
        if stream is not self._stream:
            self._stream = stream
            for made in ("decoding", "key_tables"):
                self.__dict__.pop(made, None)
            self._gathered = {}

    def sequences(self) -> list[range]:
        """The rows of each sequence in the layer that runs now, where none forks from another."""
        stream = self._stream
        own = [(stream.bases[place], len(stream.own(place))) for place in range(len(stream.segments))]
        return [range(first, first + count) for first, count in own if count]

    @cached_property
    def decoding(self) -> Decoding | None:
        """The rows of the layer that runs now that decode, where the CPU attends."""
        if self.trunks is None or self.device.type != "cpu":
            return None
        return self.trunks.decoding(self._stream)

    def gathered(self, also: frozenset[int]) -> Gathered:
        """What of the layer that runs now `engine.pages` computes: all but what decodes, and some segments of that."""
        if also not in self._gathered:
            stream, trunks, without = self._stream, list[int](), frozenset[int]()
            if self.decoding is not None:
                without = self.decoding.segments - also
            if self.trunks is not None:
                stream, trunks = self.trunks.gathering(stream, None if self.decoding is None else also)
            self._gathered[also] = Gathered(stream, trunks, self.device, without)
        return self._gathered[also]

    @cached_property
    def key_tables(self) -> KeyTables:
        """The tiles of the layer that runs now, for the kernel."""
        return KeyTables(self._stream, self.device)


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
    if query.is_meta:  # probing: only shapes matter, and what gradients keep
        return _without_data(module, query, key, value), None
    current = _current.get()
    if current is None:
        raise ServiceError("the model was run outside a pass: its attention only knows the rows of a plan")
    points = current.points.get(id(module), {})
    if points:
        query = visited(points, Port.Q_ROT, query.transpose(1, 2)).transpose(1, 2)
        key = _visited_rows(current, points, Port.K_ROT, key, query.shape[2])
        value = _visited_rows(current, points, Port.V, value, query.shape[2])
        # To look at: what earlier steps had is told by `engine.attended`. Handed on, for gradients that stop there.
        key = visited(points, Port.KEYS, key.transpose(1, 2)).transpose(1, 2)
        value = visited(points, Port.VALUES, value.transpose(1, 2)).transpose(1, 2)
    formula = Formula(
        scaling=query.shape[3] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks_H=s_aux,
    )
    if current.is_taped and torch.is_grad_enabled():
        attend = partial(_attend, current, formula, {})
        z = taped_attention(attend, query, key[0], value[0], formula, current.sequences(), points)
    else:
        z = _attend(current, formula, points, query, key[0], value[0])
    return visited(points, Port.Z, z.contiguous()), None  # some families view it as one row a token


def _attend(
    current: AttentionPass, formula: Formula, points: Points, query: Tensor, key_GTC: Tensor, value_GTC: Tensor
) -> Tensor:
    """`[1, T, H, C]` behind the visits of scores and patterns."""
    key_GRC, value_GRC, gathered = _with_trunks(current, key_GTC, value_GTC, points)
    z = None
    if current.has_kernel:
        z = _by_kernel(current, query, key_GRC, value_GRC, formula)
    if z is None or any(port in points for port in MASKED):
        block = (current.layer, current.pass_id)
        layer = PagedLayer(current.store, block, gathered.chunks, query, key_GRC, value_GRC, formula)
        if current.decoding is not None:
            current.decoding.attend(current.layer, layer)
        written = layer.attend_visited(points)
        if z is None:
            for chunk in layer.others:
                layer.attend(chunk)
            z = layer.result(query.dtype)
        elif written:
            rows = to_device(written, current.device)
            z = z.index_copy(1, rows, layer.result(query.dtype).index_select(1, rows))
    return z


def _visited_rows(current: AttentionPass, points: Points, port: Port, rows_1GRC: Tensor, num_rows: int) -> Tensor:
    """Keys or values behind the visit of their point, where those of this pass are seen."""
    own_1GTC = rows_1GRC[:, :, rows_1GRC.shape[2] - num_rows :]
    after_1GTC = visited(points, port, own_1GTC.transpose(1, 2)).transpose(1, 2)
    if not current.has_own_cache:
        return after_1GTC
    own_1GTC.copy_(after_1GTC)  # later tokens see what they have become
    return rows_1GRC


def _with_trunks(
    current: AttentionPass, key_GTC: Tensor, value_GTC: Tensor, points: Points
) -> tuple[Tensor, Tensor, Gathered]:
    """Keys and values with those of trunks, once caches have taken in what is theirs; what is computed with them.

    A row does not decode at a layer where somebody looks at its scores, or where it sees a value that is not finite.
    """
    trunks, layer, gathered = current.trunks, current.layer, current.gathered(frozenset())
    if trunks is None:
        return key_GTC, value_GTC, gathered
    key_GRC, value_GRC = trunks.through(layer, gathered.trunks, key_GTC, value_GTC)
    trunks.keep_keys(layer, key_GRC, value_GRC)
    if current.decoding is not None:
        also = current.decoding.apart(layer, {row for port in MASKED if port in points for row in points[port].rows})
        if also:
            gathered = current.gathered(also)
            key_GRC, value_GRC = trunks.through(layer, gathered.trunks, key_GTC, value_GTC)
    return key_GRC, value_GRC, gathered


def _by_kernel(current: AttentionPass, query: Tensor, key_GRC: Tensor, value_GRC: Tensor, formula: Formula) -> Tensor:
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

    def attend(query: Tensor, _key: Tensor, value_GTC: Tensor) -> Tensor:
        return query.new_empty(1, query.shape[2], query.shape[1], value_GTC.shape[2])

    formula = Formula(scaling=1.0, window=None, softcap=None, sinks_H=None)
    z = taped_attention(attend, query, key[0], value[0], formula, [], {})
    watch = _watch.get()
    if watch is not None:
        pairs = torch.empty(1, query.shape[2], query.shape[1], device="meta")
        watch(module, Port.Q_ROT, query.transpose(1, 2))
        watch(module, Port.K_ROT, key.transpose(1, 2))
        watch(module, Port.V, value.transpose(1, 2))
        watch(module, Port.KEYS, key.transpose(1, 2).clone())
        watch(module, Port.VALUES, value.transpose(1, 2).clone())
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
