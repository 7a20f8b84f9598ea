"""Tiny models of families that cannot be packed: their configurations, and where things are in them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from families import Family, Part, Place
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    FalconH1Config,
    GPTJConfig,
    GPTNeoConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    MptConfig,
    MT5Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
)

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, **_IDS}
_HEADS: dict[str, Any] = {**_SMALL, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_GPT: dict[str, Any] = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **_IDS}
_FALCON: dict[str, Any] = {**_SMALL, "num_attention_heads": 4}
_SSM: dict[str, Any] = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
OWN_FORMULA: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=4, n_head=4, **_IDS),
    "gptj": GPTJConfig(**_GPT, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=5,
        max_position_embeddings=64,
        intermediate_size=64,
        **_IDS,
    ),
    "falcon": FalconConfig(**_FALCON),
    "mpt": MptConfig(vocab_size=96, d_model=32, n_layers=4, n_heads=4, max_seq_len=64, expansion_ratio=2, **_IDS),
    "codegen": CodeGenConfig(**_GPT, n_ctx=64, rotary_dim=4),
}
MIXING: dict[str, PreTrainedConfig] = {
    "falcon_alibi": FalconConfig(**_FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "jamba": JambaConfig(
        **_HEADS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "mamba": MambaConfig(**_SMALL, state_size=4, time_step_rank=4),
    "mamba2": Mamba2Config(**_SMALL, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "falcon_h1": FalconH1Config(**_HEADS, **_SSM, mamba_d_ssm=32, mamba_n_heads=4),
    "lfm2": Lfm2Config(**_HEADS, layer_types=["conv", "full_attention"] * 2, block_multiple_of=8),
    "recurrent_gemma": RecurrentGemmaConfig(
        **{**_HEADS, "num_key_value_heads": 1},
        lru_width=32,
        attention_window_size=8,
        block_types=("recurrent", "attention"),
    ),
    "qwen3_next": Qwen3NextConfig(
        **_HEADS,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
}
CONFIGS = OWN_FORMULA | MIXING
# One for each way of attending and of mixing. The others are like one of them: gptj like codegen, falcon like
# falcon_alibi, mamba2 like mamba, falcon_h1 and lfm2 like jamba.
FEW = ("bloom", "codegen", "gpt_neo", "mpt", "falcon_alibi", "jamba", "mamba", "recurrent_gemma", "qwen3_next")
_T5: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
ENCODERS: dict[str, PreTrainedConfig] = {
    "t5": T5Config(**_T5),
    "mt5": MT5Config(**{**_T5, "feed_forward_proj": "gated-gelu"}),
}
LOOKS_INTO_LAYERS = RwkvConfig(**_SMALL, context_length=64, attention_hidden_size=32, intermediate_size=64)


class TupleFamily(Family):
    """Of layers that give a tuple."""

    def residual(self, layer: int) -> Place:
        return self.place(layer, ("", "output", (0,), self.width))


def _family(layers: str, norm: str, out: str, *parts: Part, kind: type[Family] = Family) -> Family:
    way = (0,) if kind is TupleFamily else ()
    residual: tuple[Part, ...] = (("", "output", way, 32), ("", "input", (), 32))
    return kind(layers, norm, 4, 96, 32, (*residual, *parts), out)


FAMILIES = {
    "bloom": _family(
        "transformer.h",
        "transformer.ln_f",
        "self_attention.dense",
        ("self_attention", "output", (0,), 32),
        ("self_attention.query_key_value", "output", (), 96),
        ("mlp", "output", (), 32),
        kind=TupleFamily,
    ),
    "gptj": _family(
        "transformer.h",
        "transformer.ln_f",
        "attn.out_proj",
        ("attn", "output", (0,), 32),
        ("mlp", "output", (), 32),
        kind=TupleFamily,
    ),
    "gpt_neo": _family(
        "transformer.h",
        "transformer.ln_f",
        "attn.attention.out_proj",
        ("attn", "output", (0,), 32),
        ("ln_2", "output", (), 32),
        kind=TupleFamily,
    ),
    "falcon": _family(
        "transformer.h",
        "transformer.ln_f",
        "self_attention.dense",
        ("self_attention", "output", (0,), 32),
        ("mlp.dense_4h_to_h", "input", (), 128),
        kind=TupleFamily,
    ),
    "mpt": _family(
        "transformer.blocks",
        "transformer.norm_f",
        "attn.out_proj",
        ("attn", "output", (0,), 32),
        ("ffn.down_proj", "input", (), 128),
        kind=TupleFamily,
    ),
    "codegen": _family(
        "transformer.h",
        "transformer.ln_f",
        "attn.out_proj",
        ("attn", "output", (0,), 32),
        ("mlp", "output", (), 32),
        kind=TupleFamily,
    ),
    "falcon_alibi": _family(
        "transformer.h",
        "transformer.ln_f",
        "self_attention.dense",
        ("self_attention", "output", (0,), 32),
        kind=TupleFamily,
    ),
    "jamba": _family("model.layers", "model.final_layernorm", "", ("input_layernorm", "output", (), 32)),
    "mamba": _family("backbone.layers", "backbone.norm_f", "mixer.out_proj", ("mixer", "output", (), 32)),
    "mamba2": _family("backbone.layers", "backbone.norm_f", "mixer.out_proj", ("mixer", "output", (), 32)),
    "falcon_h1": _family(
        "model.layers",
        "model.final_layernorm",
        "self_attn.o_proj",
        ("self_attn", "output", (0,), 32),
        ("mamba", "output", (), 32),
        ("feed_forward", "output", (), 32),
        kind=TupleFamily,
    ),
    "lfm2": _family("model.layers", "model.embedding_norm", "", ("feed_forward", "output", (), 32)),
    "recurrent_gemma": _family("model.layers", "model.final_norm", "", ("mlp_block", "output", (), 32)),
    "qwen3_next": _family("model.layers", "model.norm", "", ("input_layernorm", "output", (), 32)),
}


def model_of(family: str) -> PreTrainedModel:
    """A tiny model with weights large enough that edits matter, as transformers runs it by default."""
    return model_from((CONFIGS | ENCODERS)[family])


def model_from(config: PreTrainedConfig) -> PreTrainedModel:
    """Of a configuration."""
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:  # norms, biases
                parameter.add_(0.1 * torch.randn_like(parameter))
        if config.is_encoder_decoder:  # a head of its own, or each token would be its own successor
            model.get_output_embeddings().weight = torch.nn.Parameter(torch.randn(96, 32))
    return model
