"""einops works on recorded values as it does on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import polytrace

einops = pytest.importorskip("einops")
layers = pytest.importorskip("einops.layers.torch")

PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as loaded:
        yield loaded


def packed(x: Tensor) -> Tensor:
    joined, shapes = einops.pack([x, x[:, 0]], "b * d")
    rows, one = einops.unpack(joined, shapes, "b * d")
    made: Tensor = rows * 2 + one[:, None]
    return made


PROGRAMS: dict[str, Callable[[Tensor], Any]] = {
    "heads": lambda x: einops.rearrange(x, "b t (h d) -> b h t d", h=2),
    "back": lambda x: einops.rearrange(einops.rearrange(x, "b t (h d) -> b h t d", h=2), "b h t d -> b t (h d)"),
    "flat": lambda x: einops.rearrange(x, "b t d -> (b t d)"),
    "stacked": lambda x: einops.rearrange([x, x * 2], "n b t d -> b t n d"),
    "sum": lambda x: einops.reduce(x, "b t d -> b d", "sum"),
    "mean of pairs": lambda x: einops.reduce(x, "b t (d pair) -> b t d", "mean", pair=2),
    "max": lambda x: einops.reduce(x, "b t d -> b 1 d", "max"),
    "min": lambda x: einops.reduce(x, "b t d -> b", "min"),
    "prod": lambda x: einops.reduce(x, "b t d -> t", "prod"),
    "logsumexp": lambda x: einops.reduce(x, "b t d -> b t", torch.logsumexp),
    "repeat": lambda x: einops.repeat(x, "b t d -> b t copies d", copies=3),
    "tile": lambda x: einops.repeat(x, "b t d -> (k b) t d", k=2),
    "einsum": lambda x: einops.einsum(x, x, "b q d, b k d -> b q k"),
    "einsum with a weight": lambda x: einops.einsum(x, torch.ones(4, 8), "b t d, out d -> b t out"),
    "packed": packed,
    "layer": lambda x: torch.nn.Sequential(layers.Rearrange("b t (h d) -> b h t d", h=2), torch.nn.Linear(4, 3))(x),
    "parsed": lambda x: einops.rearrange(x, "b ... d -> d ... b"),
    "shape": lambda x: x * einops.parse_shape(x, "b t d")["d"],
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_pattern_on_a_recorded_value_is_the_pattern(model: Any, name: str) -> None:
    torch.manual_seed(0)
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].mlp.output
        torch.manual_seed(1)
        made = PROGRAMS[name](hidden)
        shape = made.shape
        made, plain = made.save(), hidden.save()
    torch.manual_seed(1)
    with torch.no_grad():
        expected = PROGRAMS[name](plain)
    assert shape == expected.shape and made.dtype is expected.dtype
    assert torch.equal(made, expected)


def test_a_rearranged_head_is_written_back(model: Any) -> None:
    with model.trace(PROMPT):
        hidden = model.transformer.h[0].mlp.output
        before = hidden.clone().save()
        heads = einops.rearrange(hidden, "b t (h d) -> b h t d", h=2)
        kept = heads * torch.tensor([0.0, 1.0])[:, None, None]
        model.transformer.h[0].mlp.output = einops.rearrange(kept, "b h t d -> b t (h d)")
        after = model.transformer.h[0].mlp.output.save()
    assert torch.equal(after[..., 4:], before[..., 4:]) and not after[..., :4].any() and before[..., :4].any()
