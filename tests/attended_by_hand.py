"""The oracle of what steps attend to: Hugging Face with a cache, a scores formula and hooks of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

LAYER = 1
NAME = "by_hand"
# Gets a point's name, the step and its value: k, k_rot, v `[1, tokens, heads, features]`, scores, pattern `[1, heads,
# queries, keys]`. Returns what goes on.
Edit = Callable[[str, int, Tensor], Tensor]


@dataclass
class ByHand:
    """Of one sequence, by step."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)  # of the last token
    keys: list[Tensor] = field(default_factory=list)  # [positions so far, heads, features]
    values: list[Tensor] = field(default_factory=list)


def unedited(_point: str, _step: int, value: Tensor) -> Tensor:
    return value


class _Cache(DynamicCache):
    """Whose keys and values at one layer are what an edit makes of them. It forgets nothing behind a window."""

    def __init__(self, edit: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self._edit = edit

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == LAYER:
            key_states = self._edit("k_rot", key_states.transpose(1, 2)).transpose(1, 2)
            value_states = self._edit("v", value_states.transpose(1, 2)).transpose(1, 2)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


_current: list[Callable[[str, Tensor], Tensor]] = []


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_rest: Any,
) -> tuple[Tensor, None]:
    """The textbook's formula."""
    share = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(share, 1).transpose(2, 3) * (scaling or query.shape[3] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask < 0, -torch.inf)
    edit = _current[-1] if module.layer_idx == LAYER else lambda _point, own: own
    pattern = edit("pattern", edit("scores", scores).softmax(-1))
    return (pattern @ value.repeat_interleave(share, 1)).transpose(1, 2).contiguous(), None


def use(model: PreTrainedModel) -> PreTrainedModel:
    """The model, attending by `_attend`."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)
    return model


def run(model: PreTrainedModel, prompt: list[int], steps: int, edit: Edit = unedited) -> ByHand:
    """Greedy, a sequence alone."""
    found, given = ByHand(), torch.tensor([prompt])

    def now(point: str, value: Tensor) -> Tensor:
        return edit(point, len(found.tokens), value)

    cache = _Cache(now)
    handle = _hook(model, now)
    _current.append(now)
    try:
        with torch.no_grad():
            for _ in range(steps):
                logits = model(given, past_key_values=cache, use_cache=True).logits[0, -1]
                found.keys.append(cache.layers[LAYER].keys[0].transpose(0, 1).clone())
                found.values.append(cache.layers[LAYER].values[0].transpose(0, 1).clone())
                found.logits.append(logits)
                found.tokens.append(int(logits.argmax()))
                given = torch.tensor([[found.tokens[-1]]])
    finally:
        _current.pop()
        handle.remove()
    return found


def _hook(model: Any, now: Callable[[str, Tensor], Tensor]) -> Any:
    """On the projection that gives the keys, before norms of their own and rotation."""
    if hasattr(model, "transformer"):
        attention = model.transformer.h[LAYER].attn

        def third(_module: Any, _args: Any, output: Tensor) -> Tensor:
            query, key, value = output.chunk(3, -1)
            return torch.cat([query, _by_heads(now, key, attention.head_dim), value], -1)

        return attention.c_attn.register_forward_hook(third)
    attention = model.model.layers[LAYER].self_attn
    return attention.k_proj.register_forward_hook(
        lambda _module, _args, output: _by_heads(now, output, attention.head_dim)
    )


def _by_heads(now: Callable[[str, Tensor], Tensor], key: Tensor, size: int) -> Tensor:
    return now("k", key.unflatten(-1, (-1, size))).flatten(-2)
