"""A model's configuration made tiny, with all that decides how ranks share the model kept.

Kept are the ratio of query to key/value heads and the copies that ranks hold of these, kinds of layers, experts and
their routing, fused and tied matrices, and whether the vocabulary can be shared. Knows configurations by the names that
families have in common; nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_HIDDEN = 64
_HEAD = 16  # features of a head; all kinds of it, so that rotary and latent parts fit whatever share they have
_WINDOW = 7  # positions, of sliding attention
_INNER = (  # features inside an MLP
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "intermediate_size_mlp",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_LATENT = ("q_lora_rank", "kv_lora_rank")
_HEAD_PARTS = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


def shrink(config: Any, ranks: int, *, keeps_heads: bool = False) -> None:
    """Makes a configuration small in place; what decides how ranks share the model stays.

    `keeps_heads`: as many heads as there are, for families that insist on a number.
    """
    text = config.get_text_config(decoder=True)
    config.dtype = text.dtype = torch.float32
    for each in (config, text):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    # 1) layers: one of each kind, at least two
    _keep_layers(text)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        for each in (config, text):
            setattr(each, name, None if getattr(each, name, None) is None else 0)
    text.vocab_size = 32 * ranks + text.vocab_size % ranks
    # 2) heads: as few as the ranks can share in the same way, two each where there are so many
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:  # widths without heads keep their ratios only as they are
        return
    key_values = getattr(text, "num_key_value_heads", None) or heads
    common = (f for f in range(1, key_values + 1) if heads % f == key_values % f == 0)
    share = 1 if keeps_heads else max((f for f in common if key_values // f % (2 * ranks) == 0), default=1)
    text.num_attention_heads = heads // share
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = key_values // share
    # 3) widths
    width = text.hidden_size
    has_head_dim = isinstance(getattr(text, "head_dim", None), int)
    per_head = max(2, -(-_HIDDEN // text.num_attention_heads)) if has_head_dim else _HEAD  # some insist on a multiple
    text.hidden_size = per_head * text.num_attention_heads
    sizes: dict[str, int] = dict.fromkeys(_INNER, 16 * ranks)
    sizes |= dict.fromkeys(("head_dim", *_HEAD_PARTS), _HEAD) | dict.fromkeys(_LATENT, _HIDDEN // 2)
    sizes["qk_head_dim"] = 2 * _HEAD
    sizes["sliding_window"] = _WINDOW
    sizes["rotary_dim"] = min(_HEAD, per_head)
    sizes["word_embed_proj_dim"] = text.hidden_size * getattr(text, "word_embed_proj_dim", width) // width
    for name, size in sizes.items():
        if isinstance(getattr(text, name, None), int) and not isinstance(getattr(type(text), name, None), property):
            setattr(text, name, size)
    for factors in _rotary_factors(getattr(text, "rope_parameters", None)):
        del factors[_HEAD // 2 :]


def _keep_layers(text: Any) -> None:
    """Of layers that lists of the configuration tell apart, the first of each kind."""
    number = text.num_hidden_layers
    lists = {
        name: value for name, value in vars(text).items() if isinstance(value, (list, tuple)) and len(value) == number
    }
    kinds: dict[str, int] = {}
    for layer in range(number):
        kinds.setdefault(str([values[layer] for values in lists.values()]), layer)
    kept = sorted(kinds.values())[:4]
    kept = kept if len(kept) > 1 else list(range(min(2, number)))
    text.num_hidden_layers = len(kept)
    for name, values in lists.items():
        setattr(text, name, [values[layer] for layer in kept])
    if isinstance(getattr(text, "first_k_dense_replace", None), int):
        text.first_k_dense_replace = min(1, text.first_k_dense_replace)
    if isinstance(getattr(text, "mlp_only_layers", None), list) and "mlp_only_layers" not in lists:
        text.mlp_only_layers = [layer for layer in text.mlp_only_layers if layer < len(kept)]


def _rotary_factors(rotary: Any) -> Iterator[list[float]]:
    """Lists that have an entry for each pair of a head's features, wherever in the configuration."""
    for value in rotary.values() if isinstance(rotary, dict) else ():
        if isinstance(value, list):
            yield value
        else:
            yield from _rotary_factors(value)
