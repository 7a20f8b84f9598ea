"""Small models with seeded weights, plain and loaded, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import polytrace

IDS = [3, 17, 42, 5, 9, 30, 11]
OTHER = [8, 25, 1, 60]
FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)


def small_llama(layers: int = 4) -> Any:
    """Width 32, float32."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def small_gpt2() -> Any:
    """The same size with learned positions and fused attention weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


@contextmanager
def loaded(plain: Any, folder: Path, **more: Any) -> Iterator[Any]:
    """The same weights, by polytrace in this process."""
    plain.save_pretrained(folder)
    with polytrace.load(str(folder), threads=1, **more) as model:
        yield model


class _Identity(nn.Module):
    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden


@contextmanager
def without_layers(plain: Any, layers: str, numbers: Collection[int]) -> Iterator[None]:
    """Inside, some decoder layers hand on what they get."""
    holder = plain.get_submodule(layers.rpartition(".")[0])
    name = layers.rpartition(".")[2]
    before = getattr(holder, name)
    setattr(holder, name, nn.ModuleList([_Identity() if n in numbers else layer for n, layer in enumerate(before)]))
    try:
        yield
    finally:
        setattr(holder, name, before)


def logits_of(plain: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = plain(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits


def close(ours: Tensor, theirs: Tensor) -> None:
    """Promise 1 of DESIGN against plain Hugging Face, in float32."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert (ours - theirs).abs().max() <= FLOAT32_TOLERANCE * max(1.0, float(theirs.abs().max()))
