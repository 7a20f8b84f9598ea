"""Tiny models of a few families, served and as plain Hugging Face with hooks written by hand, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import CONFIGS
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig
from transformers.pytorch_utils import Conv1D

import polytrace

PROMPTS = [[3, 17, 42, 5, 9, 30, 11], [8, 25, 1, 60]]  # of different lengths
Change = Callable[[Tensor], Tensor]  # of [1, tokens, features]

_GRANITE = GraniteConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    residual_multiplier=0.3, embedding_multiplier=3.0, logits_scaling=2.0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Names:
    """Where things are in a family."""

    layers: str = "model.layers"
    attention: str = "self_attn"  # what gives attention's part, behind a norm of its own
    out: str = "self_attn.o_proj"  # takes the heads side by side
    mlp: str = "mlp"
    down: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    factor: float = 1.0  # of what is added
    is_sandwich: bool = False

    def layer(self, number: int, path: str = "") -> str:
        return f"{self.layers}.{number}" + (f".{path}" if path else "")


NAMES = {
    "llama": Names(),
    "gpt2": Names(
        layers="transformer.h",
        attention="attn",
        out="attn.c_proj",
        down="mlp.c_proj",
        final_norm="transformer.ln_f",
    ),
    "gemma2": Names(attention="post_attention_layernorm", mlp="post_feedforward_layernorm", is_sandwich=True),
    "gpt_neox": Names(
        layers="gpt_neox.layers",
        attention="attention",
        out="attention.dense",
        down="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
    ),
    "granite": Names(factor=0.3),
}


@dataclass(frozen=True, kw_only=True)
class Both:
    """A family's tiny model twice."""

    names: Names
    plain: Any
    model: Any

    def run(
        self,
        ids: Sequence[int],
        reads: Sequence[tuple[str, str]] = (),
        changes: Mapping[tuple[str, str], Change] | None = None,
    ) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
        """What the head gives for one prompt, `[tokens, vocabulary]`, and what was read, by module and side.

        What the model returns, capped and scaled where it does that, is among it as `"", "output"`.
        """
        changes = changes or {}
        seen: dict[tuple[str, str], Tensor] = {}
        handles = []

        def hook(place: tuple[str, str], value: Any) -> Any:
            tensor = value[0] if isinstance(value, tuple) else value
            if place in changes:
                tensor = changes[place](tensor.clone())
            seen[place] = tensor.clone()
            return (tensor, *value[1:]) if isinstance(value, tuple) else tensor

        for place in {*reads, *changes, ("lm_head", "output")}:
            module = self.plain.get_submodule(place[0])
            if place[1] == "output":
                handles.append(module.register_forward_hook(lambda m, a, out, place=place: hook(place, out)))
            else:
                handles.append(module.register_forward_pre_hook(_before(place, hook), with_kwargs=True))
        try:
            with torch.no_grad():
                returned = self.plain(input_ids=torch.tensor([list(ids)]), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        seen["", "output"] = returned.logits
        return seen["lm_head", "output"][0], seen

    def out_weight(self, path: str) -> Tensor:
        """A projection's weight as `[inputs, outputs]`."""
        module = self.plain.get_submodule(path)
        weight: Tensor = module.weight.detach()
        return weight if isinstance(module, Conv1D) else weight.T


def _before(place: tuple[str, str], hook: Callable[[tuple[str, str], Any], Any]) -> Callable[..., Any]:
    def run(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (hook(place, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hook(place, kwargs["hidden_states"])}

    return run


@contextmanager
def both(family: str, folder: Path) -> Iterator[Both]:
    """A family's tiny model, with weights large enough that edits matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(_GRANITE if family == "granite" else CONFIGS[family])
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    plain.save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as model:
        yield Both(names=NAMES[family], plain=plain, model=model)


def close(ours: Any, theirs: Tensor, scale: float = 1.0) -> None:
    """Promise 1, in float32: `max|a - b| <= 1e-5 max(1, max|b|)`."""
    mine = ours if isinstance(ours, Tensor) else torch.as_tensor(getattr(ours, "values", ours))
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max()) <= scale * 1e-5 * max(1.0, float(theirs.abs().max()))
