"""Tensor-parallel plans for families that transformers has none for, in transformers' words.

Pure data, which `engine.splits` reads. A family is here when the engine packs it and its attention can be cut by heads.
An entry is trusted as little as any plan: a twin proves it before a model serves. Embeddings and heads that are tied
stay whole. Not here: GPT-BigCode, whose one key/value head lies in one matrix with all queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPlan:
    """How the layers of a family are split."""

    styles: Mapping[str, str]
    counts: tuple[str, ...] = ()  # attributes of attention modules that count heads or features, to be those of a rank


def _llama_like(attention: str, output: str, *more: tuple[str, str]) -> Mapping[str, str]:
    inputs = {f"{attention}.{name}_proj": "colwise" for name in ("q", "k", "v")}
    return {**inputs, f"{attention}.{output}": "rowwise", **dict(more)}


def _opt_like(layer: str) -> Mapping[str, str]:
    return _llama_like(f"{layer}.self_attn", "out_proj", (f"{layer}.fc1", "colwise"), (f"{layer}.fc2", "rowwise"))


_LLAMA = _llama_like(
    "model.layers.*.self_attn",
    "o_proj",
    ("model.layers.*.mlp.gate_proj", "colwise"),
    ("model.layers.*.mlp.up_proj", "colwise"),
    ("model.layers.*.mlp.down_proj", "rowwise"),
    ("lm_head", "colwise_gather_output"),
)

OWN_PLANS: Mapping[str, OwnPlan] = {
    "gpt2": OwnPlan(
        styles={
            "transformer.h.*.attn.c_attn": "fused_qkv",
            "transformer.h.*.attn.c_proj": "rowwise",
            "transformer.h.*.mlp.c_fc": "colwise",
            "transformer.h.*.mlp.c_proj": "rowwise",
        },
        counts=("split_size",),
    ),
    "opt": OwnPlan(
        styles=_opt_like("model.decoder.layers.*"),
        counts=("num_heads",),
    ),
    "stablelm": OwnPlan(
        styles=_LLAMA,
        counts=("num_heads", "num_key_value_heads"),
    ),
    "hunyuan_v1_dense": OwnPlan(styles=_LLAMA),
    "persimmon": OwnPlan(
        styles={
            "model.layers.*.self_attn.query_key_value": "colwise",  # one head's three after another's
            "model.layers.*.self_attn.dense": "rowwise",
            "model.layers.*.mlp.dense_h_to_4h": "colwise",
            "model.layers.*.mlp.dense_4h_to_h": "rowwise",
            "lm_head": "colwise_gather_output",
        },
        counts=("num_heads",),
    ),
    "biogpt": OwnPlan(styles=_opt_like("biogpt.layers.*")),
    "gpt_oss": OwnPlan(  # its experts are split by transformers' plan
        styles=_llama_like(
            "model.layers.*.self_attn",
            "o_proj",
            ("model.layers.*.self_attn.sinks", "colwise"),
            ("model.layers.*.self_attn", "local_params"),
            ("lm_head", "colwise_gather_output"),
        )
    ),
}
