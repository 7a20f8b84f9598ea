"""TransformerLens's names for activations: what it calls the points of a block, and its short forms for them.

Pure strings: what a name leads to in a model is told by `hook_table`.
"""

from __future__ import annotations

import re

BLOCK = (  # in the order in which a block's hooks run
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "attn.hook_result",
    "ln1_post.hook_scale",
    "ln1_post.hook_normalized",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_pre_linear",
    "mlp.hook_post",
    "ln2_post.hook_scale",
    "ln2_post.hook_normalized",
    "hook_mlp_out",
    "hook_resid_post",
)
# large, or beside the point: cached when they are named, not by a filter (TransformerLens has switches for the first)
BY_NAME_ALONE = ("attn.hook_result", "hook_mlp_in", "unembed.hook_in", "unembed.hook_out")
# that nothing here stands for, wherever they would be: why, and what to write
ABSENT = {
    "hook_attn_in": "heads do not get inputs of their own here: change `attn.hook_q`, `hook_k`, `hook_v` of a head",
    "hook_q_input": "heads do not get inputs of their own here: change `attn.hook_q` of a head",
    "hook_k_input": "heads do not get inputs of their own here: change `attn.hook_k` of a head",
    "hook_v_input": "heads do not get inputs of their own here: change `attn.hook_v` of a head",
}
_HEADS = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z", "hook_result")
_IN_ATTENTION = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
_IN_MLP = ("pre", "post", "mid", "pre_linear")
_PARTS = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}
_OTHER_WORDS = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full name of a short one, as TransformerLens's `utils.get_act_name` has it.

    `get_act_name("resid_post", 3)`, `("pattern", 0, "attn")`, `("scale", 4, "ln1")`, `"k6"`, `"scale4ln1"`,
    `"normalized"` (of the final norm); a full name is left alone.
    """
    if layer is None and layer_type is None and ("." in name or name.startswith("hook_")):
        return name
    part = layer_type
    if (short := re.match(r"([a-z]+)(\d+)([a-z]?.*)", name)) is not None:
        name, layer, part = short.groups()
    name = _OTHER_WORDS.get(name, name)
    if name in _IN_ATTENTION:
        part = "attn"
    elif name in _IN_MLP:
        part = "mlp"
    else:
        part = _PARTS.get(part or "", part)
    if layer is None and name in ("scale", "normalized"):
        return f"ln_final.{part + '.' if part else ''}hook_{name}"
    block = "" if layer is None else f"blocks.{layer}."
    return f"{block}{part + '.' if part else ''}hook_{name}"


def block_of(name: str) -> int | None:
    """The number of the block that an activation belongs to; None of those outside of blocks."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdecimal() else None


def position_dim(name: str) -> int:
    """The dimension of an activation that its positions are in, from the end; of pairs, the queries'."""
    return -3 if name.rpartition(".")[2] in _HEADS else -2
