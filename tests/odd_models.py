"""Llamas with one thing done otherwise, registered with transformers: each breaks one promise of a standard name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def _layer_gain(layer: Any) -> None:
    """The layer multiplies what attention gives by a gain of its own before it adds it."""
    layer.gain = _ones(layer)
    kind = type(layer)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        given = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        middle = hidden_states + given * self.gain
        made: Tensor = middle + self.mlp(self.post_attention_layernorm(middle))
        return made

    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _layer_number(layer: Any) -> None:
    """The layer adds attention as many times as its own number says."""
    kind = type(layer)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        given = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        middle = hidden_states + given * (1.0 + self.self_attn.layer_idx)
        made: Tensor = middle + self.mlp(self.post_attention_layernorm(middle))
        return made

    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _with_residual(layer: Any) -> None:
    """Attention gives the residual with what it found in it, as BLOOM's does."""

    class Attention(type(layer.self_attn)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, residual: Tensor, **kwargs: Any) -> Any:
            given, weights = super().forward(hidden_states=hidden_states, **kwargs)
            return residual + given, weights

    layer.self_attn.__class__ = Attention
    kind = type(layer)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        middle = self.self_attn(self.input_layernorm(hidden_states), residual=hidden_states, **kwargs)[0]
        made: Tensor = middle + self.mlp(self.post_attention_layernorm(middle))
        return made

    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _projection_gain(layer: Any) -> None:
    """What is projected back from the heads is multiplied by a gain inside of the projection."""

    class Projection(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    layer.self_attn.o_proj.__class__ = Projection
    layer.self_attn.o_proj.gain = _ones(layer)


def _dead_activation(layer: Any) -> None:
    """The MLP shows what its activation takes to a module whose answer nobody wants."""

    class Mlp(type(layer.mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate_proj(x)
            self.dead(gate)
            made: Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(x))
            return made

    layer.mlp.__class__ = Mlp
    layer.mlp.dead = nn.SiLU()


def _ones(layer: Any) -> nn.Parameter:
    """A gain for each feature: without effect, until a checkpoint says otherwise."""
    return nn.Parameter(torch.ones_like(layer.input_layernorm.weight))


_CHANGES = {
    "layer_gain": _layer_gain,
    "layer_number": _layer_number,
    "with_residual": _with_residual,
    "projection_gain": _projection_gain,
    "dead_activation": _dead_activation,
}


def _register(name: str) -> type[LlamaConfig]:
    config: Any = type(f"{name}Config", (LlamaConfig,), {"model_type": f"odd_{name}"})

    class Odd(LlamaForCausalLM):
        config_class = config

        def __init__(self, own: Any) -> None:
            super().__init__(own)
            for layer in self.model.layers:
                _CHANGES[name](layer)

    Odd.__name__ = f"Odd{name}"
    AutoConfig.register(f"odd_{name}", config)
    AutoModelForCausalLM.register(config, Odd)
    kind: type[LlamaConfig] = config
    return kind


CONFIGS = {name: _register(name) for name in _CHANGES}


def save_odd(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """A model with weights large enough that everything shows; gains are not ones."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[name](**SIZES, **HEADS))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            elif path.endswith("gain"):
                parameter.uniform_(0.5, 2.0)
    model.to(dtype).save_pretrained(folder)
    return str(folder)
