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
_WIDEST = 1024  # that heads of `_HEAD` features side by side may make the residual
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
# Of state-space layers: how many heads and of how many features; what says that these follow from the width; groups.
_STATES = (
    ("mamba_n_heads", "mamba_d_head"),
    ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
    ("num_heads", "head_dim"),
)
_SEEN_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_EXPANDS = ("mamba_expand", "expand")
_GROUPS = ("mamba_n_groups", "mamba_ngroups", "n_groups")


def shrink(config: Any, ranks: int, *, keeps_heads: bool = False) -> None:
    """Makes a configuration small in place; what decides how ranks share the model stays.

    `keeps_heads`: as many heads as there are, for families that insist on a number.
    """
    text = config.get_text_config(decoder=True)
    if text is not config and type(text) is type(config):  # an encoder and a decoder told in one: that was a copy
        config.is_encoder_decoder = False
        text = config
    config.dtype = text.dtype = torch.float32
    for each in (config, text):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    # 1) layers: one of each kind, at least two
    apart = _taken_apart(text)
    before = {name: _number(text, name) for own in apart.values() for name in own}
    kept_layers = _keep_layers(text, apart)
    # 2) heads: as few as the ranks can share in the same way, two each where there are so many
    heads = _number(text, "num_attention_heads")
    key_values = _number(text, "num_key_value_heads") or heads
    width = _number(text, "hidden_size")
    states = _state_heads(text, width)
    # Heads side by side are as wide as the residual, which some insist on; of very many heads it would be no tiny twin.
    is_square = _number(text, "head_dim") * heads == width
    if heads:
        common = (f for f in range(1, key_values + 1) if heads % f == key_values % f == 0)
        share = 1 if keeps_heads else max((f for f in common if key_values // f % (2 * ranks) == 0), default=1)
        _set(text, "num_attention_heads", heads // share)
        _set(text, "num_key_value_heads", key_values // share)
    # 3) widths
    kept = _number(text, "num_attention_heads") or _HIDDEN // _HEAD
    is_square &= kept * _HEAD <= _WIDEST
    per_head = _HEAD if is_square or not _number(text, "head_dim") else max(2, -(-_HIDDEN // kept))
    hidden = per_head * kept  # some insist on a multiple of the heads
    _set(text, "hidden_size", hidden)
    sizes: dict[str, int] = dict.fromkeys(_INNER, 16 * ranks)
    sizes |= dict.fromkeys(("head_dim", *_HEAD_PARTS), _HEAD) | dict.fromkeys(_LATENT, _HIDDEN // 2)
    sizes["qk_head_dim"] = 2 * _HEAD
    sizes["sliding_window"] = _WINDOW
    sizes["vocab_size"] = 32 * ranks + _number(text, "vocab_size") % ranks
    sizes |= dict.fromkeys(("vocab_size_per_layer_input", "decoder_vocab_size"), sizes["vocab_size"])
    sizes["hidden_size_per_layer_input"] = _HEAD
    if width:
        sizes["word_embed_proj_dim"] = hidden * _number(text, "word_embed_proj_dim") // width
    sizes["rotary_dim"] = min(_number(text, "rotary_dim"), _HEAD // 2)
    sizes |= {features: expand * hidden // _number(text, heads) for heads, features, expand in states}
    sizes["mamba_d_ssm"] = hidden * max((expand for *_, expand in states), default=0) or _number(text, "mamba_d_ssm")
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": len(kept_layers), f"{side}_attention_heads": kept, f"{side}_ffn_dim": 16 * ranks}
    for name, size in sizes.items():
        _set(text, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        for each in (config, text):
            setattr(each, name, None if getattr(each, name, None) is None else 0)
    for factors in _rotary_factors(getattr(text, "rope_parameters", None)):
        del factors[_HEAD // 2 :]
    _share_rotary(getattr(text, "rope_parameters", None))
    # 4) layers that have other numbers than all, in the same ratio
    if apart:
        ratios = {name: (_number(text, name), was) for name, was in before.items()}
        text.per_layer_config = {
            place: {name: _scaled(value, *ratios[name]) for name, value in apart.get(layer, {}).items()}
            for place, layer in enumerate(kept_layers)
        }


def shrink_seeing(config: Any) -> None:
    """Makes what sees images small in place, where a configuration has it: as many layers, which others may number."""
    vision: Any = getattr(config, "vision_config", None)
    if vision is None:
        return
    vision.dtype = torch.float32
    text = config.get_text_config(decoder=True)
    has_own_width = _number(vision, "embed_dim") > 0  # then its hidden size is that of its rows
    sizes = {"num_attention_heads": 2, "num_heads": 2, "embed_dim": _HEAD * 2, "out_hidden_size": text.hidden_size}
    sizes["hidden_size"] = text.hidden_size if has_own_width else _HEAD * 2
    for name, size in sizes.items():
        _set(vision, name, size)
    for name in _INNER:
        _set(vision, name, _HEAD * 2)
    for each in (config, vision):
        _set(each, "projection_dim", text.hidden_size)
    last = text.vocab_size - 1
    for place, name in enumerate(_SEEN_TOKENS):
        _set(config, name, last - place)


def _scaled(value: Any, now: int, was: int) -> Any:
    return value * now // was if isinstance(value, int) and not isinstance(value, bool) and was else value


def _state_heads(text: Any, width: int) -> list[tuple[str, str, int]]:
    """Names of how many heads a state has and of how many features, where together they are so many times the width.

    There are as few heads afterwards as their groups allow.
    """
    found = []
    for heads, features in _STATES:
        together = _number(text, heads) * _number(text, features)
        if width and together and together % width == 0 and any(_number(text, name) for name in _EXPANDS):
            groups = max((_number(text, name) for name in _GROUPS), default=0)
            setattr(text, heads, max(2, groups))
            found.append((heads, features, together // width))
    return found


def _number(config: Any, name: str) -> int:
    """A whole number of a configuration, 0 where it has none of this name; that of all layers where these differ."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _set(config: Any, name: str, size: int) -> None:
    """Where the configuration has such a number of its own, one or one a layer, and it does not follow from others."""
    own = getattr(type(config), config.attribute_map.get(name, name), None)
    value = getattr(config, name, None)
    if isinstance(own, property) and own.fset is None:
        return
    if _number(config, name):
        setattr(config, name, size)
    elif isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        setattr(config, name, [size] * len(value))


def _taken_apart(text: Any) -> dict[int, dict[str, Any]]:
    """What single layers have otherwise than all; from now on they do not."""
    told = text.to_dict().get("per_layer_config") or {}
    if told:
        text.per_layer_config = None
    return {int(layer): own for layer, own in told.items()}


def _keep_layers(text: Any, apart: dict[int, dict[str, Any]]) -> list[int]:
    """Of layers that the configuration tells apart, in lists or one by one, the first of each kind; which these are."""
    number = text.num_hidden_layers
    lists = {
        name: value for name, value in vars(text).items() if isinstance(value, (list, tuple)) and len(value) == number
    }
    shared = _number(text, "num_kv_shared_layers")  # the last ones, which use keys of those before
    kinds: dict[str, int] = {}
    for layer in range(number):
        kinds.setdefault(
            str([layer >= number - shared, apart.get(layer), *(values[layer] for values in lists.values())]), layer
        )
    kept = sorted(kinds.values())[:4]
    kept = kept if len(kept) > 1 else list(range(min(2, number)))
    if shared:
        text.num_kv_shared_layers = sum(1 for layer in kept if layer >= number - shared)
    text.num_hidden_layers = len(kept)
    for name, values in lists.items():
        setattr(text, name, [values[layer] for layer in kept])
    if isinstance(getattr(text, "first_k_dense_replace", None), int):
        text.first_k_dense_replace = min(1, text.first_k_dense_replace)
    if isinstance(getattr(text, "mlp_only_layers", None), list) and "mlp_only_layers" not in lists:
        text.mlp_only_layers = [layer for layer in text.mlp_only_layers if layer < len(kept)]
    return kept


def _share_rotary(rotary: Any) -> None:
    """Pairs of a head's features that turn with time, height and width: as many of each in the same ratio."""
    sections = rotary.get("mrope_section") if isinstance(rotary, dict) else None
    if sections:
        shares = [_HEAD // 2 * size // sum(sections) for size in sections]
        sections[:] = [*shares[:-1], _HEAD // 2 - sum(shares[:-1])]


def _rotary_factors(rotary: Any) -> Iterator[list[float]]:
    """Lists that have an entry for each pair of a head's features, wherever in the configuration."""
    for value in rotary.values() if isinstance(rotary, dict) else ():
        if isinstance(value, list):
            yield value
        else:
            yield from _rotary_factors(value)
