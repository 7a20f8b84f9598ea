"""Tiny models of thirteen families: their configurations, and where things are in them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)
from width import keeping

_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
_HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA: dict[str, Any] = {**_SIZES, **_HEADS, **_IDS, "num_key_value_heads": 2}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, **_HEADS, num_key_value_heads=4),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64, **_IDS),
    "gemma2": Gemma2Config(
        **_SIZES, **_HEADS, num_key_value_heads=4, head_dim=8, sliding_window=5, query_pre_attn_scalar=8
    ),
    "mistral": MistralConfig(**_LLAMA, sliding_window=5),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=8),
    "gemma3": Gemma3TextConfig(
        **_LLAMA, head_dim=8, sliding_window=5, query_pre_attn_scalar=8, layer_types=_ALTERNATING
    ),
    "gpt_neox": GPTNeoXConfig(**_SIZES, **_HEADS, **_IDS),
    "opt": OPTConfig(**_SIZES, **_HEADS, **_IDS, ffn_dim=64, word_embed_proj_dim=32),
    "phi": PhiConfig(**_SIZES, **_HEADS, **_IDS),
    "phi3": Phi3Config(**_LLAMA),
    "mixtral": MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **_LLAMA, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1]
    ),
    "gpt_oss": GptOssConfig(
        **_LLAMA, head_dim=8, num_local_experts=4, sliding_window=5, layer_types=_ALTERNATING, num_experts_per_tok=2
    ),
}

# One for each way through the engine: rotary, learned positions and fused rows, soft caps, normed queries and windows,
# side by side and fused by head, fused blocks, sinks and experts, positions that begin at 2. The others are like one of
# them: mistral and qwen3 like llama and gemma3, phi like gpt_neox, mixtral and qwen3_moe like gpt_oss.
FEW = ("llama", "gpt2", "gemma2", "gemma3", "gpt_neox", "phi3", "gpt_oss", "opt")


def few_of(families: Iterable[str]) -> list[Any]:
    """As parameters of a test; those that are not among the few are wide."""
    return keeping(families, FEW.__contains__)


@dataclass(frozen=True)
class Place:
    """A site by the names of the Hugging Face model."""

    module: str
    port: str
    selector: tuple[int, ...]
    width: int


Part = tuple[str, str, tuple[int, ...], int]  # path in a layer, port, way into the value, width


@dataclass(frozen=True)
class Family:
    """Where things are in a model, and how wide."""

    layers: str
    norm: str
    num_layers: int
    vocabulary: int
    width: int
    parts: tuple[Part, ...]
    out_projection: str  # in a layer: its input holds the heads side by side
    num_heads: int = 4

    @property
    def attention(self) -> str:
        """In a layer: the module that attends."""
        return self.out_projection.rpartition(".")[0]

    def place(self, layer: int, part: Part) -> Place:
        path, port, selector, width = part
        return Place(f"{self.layers}.{layer}" + (f".{path}" if path else ""), port, selector, width)

    def residual(self, layer: int) -> Place:
        """What a layer hands on."""
        return self.place(layer, ("", "output", (), self.width))

    def heads(self, layer: int) -> Place:
        """What the heads of a layer found, side by side."""
        return self.place(layer, (self.out_projection, "input", (), self.width))

    def logits(self) -> Place:
        return Place("lm_head", "output", (), self.vocabulary)


def llama_like(num_layers: int, vocabulary: int, width: int, neurons: int) -> Family:
    return Family(
        "model.layers",
        "model.norm",
        num_layers,
        vocabulary,
        width,
        (
            ("", "output", (), width),
            ("", "input", (), width),
            ("input_layernorm", "input", (), width),
            ("post_attention_layernorm", "output", (), width),
            ("self_attn", "output", (0,), width),
            ("self_attn.q_proj", "output", (), width),
            ("self_attn.o_proj", "input", (), width),
            ("mlp", "output", (), width),
            ("mlp.down_proj", "input", (), neurons),
        ),
        "self_attn.o_proj",
    )


def _family(layers: str, norm: str, out_projection: str, *parts: Part) -> Family:
    residual: tuple[Part, ...] = (("", "output", (), 32), ("", "input", (), 32))
    return Family(layers, norm, 4, 96, 32, (*residual, *parts), out_projection)


_LLAMA_LIKE = llama_like(4, 96, 32, 64)
_GROUPED = replace(
    _LLAMA_LIKE,
    parts=(*_LLAMA_LIKE.parts, ("self_attn.k_proj", "output", (), 16), ("self_attn.v_proj", "output", (), 16)),
)
_ATTENTION: Part = ("self_attn", "output", (0,), 32)
_MIXTURE = _family(
    "model.layers",
    "model.norm",
    "self_attn.o_proj",
    _ATTENTION,
    ("self_attn.o_proj", "input", (), 32),
    ("input_layernorm", "input", (), 32),
    ("mlp", "input", (), 32),
    ("mlp", "output", (), 32),
)
FAMILIES = {
    "llama": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE,
    "gpt2": _family(
        "transformer.h",
        "transformer.ln_f",
        "attn.c_proj",
        ("ln_1", "input", (), 32),
        ("ln_2", "output", (), 32),
        ("attn", "output", (0,), 32),
        ("attn.c_attn", "output", (), 96),
        ("attn.c_proj", "input", (), 32),
        ("mlp", "output", (), 32),
        ("mlp.c_proj", "input", (), 128),
    ),
    "mistral": _GROUPED,
    "qwen3": _GROUPED,
    "gemma3": _GROUPED,
    "gpt_neox": _family(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        "attention.dense",
        ("attention", "output", (0,), 32),
        ("attention.query_key_value", "output", (), 96),
        ("mlp", "output", (), 32),
        ("mlp.dense_4h_to_h", "input", (), 64),
    ),
    "opt": _family(
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        "self_attn.out_proj",
        _ATTENTION,
        ("self_attn_layer_norm", "output", (), 32),
        ("self_attn.v_proj", "output", (), 32),
    ),
    "phi": _family(
        "model.layers",
        "model.final_layernorm",
        "self_attn.dense",
        _ATTENTION,
        ("input_layernorm", "output", (), 32),
        ("mlp", "output", (), 32),
        ("mlp.fc2", "input", (), 64),
    ),
    "phi3": _family(
        "model.layers",
        "model.norm",
        "self_attn.o_proj",
        _ATTENTION,
        ("self_attn.qkv_proj", "output", (), 64),
        ("mlp", "output", (), 32),
        ("mlp.gate_up_proj", "output", (), 128),
    ),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "gpt_oss": replace(_MIXTURE, parts=(*_MIXTURE.parts[:-1], ("mlp", "output", (0,), 32))),
}


def model_of(family: str, dtype: torch.dtype = torch.float32, positions: int = 64) -> PreTrainedModel:
    """A tiny model with weights large enough that edits matter."""
    torch.manual_seed(0)
    config: Any = copy.deepcopy(CONFIGS[family])
    config.max_position_embeddings = positions
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:  # norms, biases, attention sinks
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)
