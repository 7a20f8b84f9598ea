"""Which bodies work on each prompt by itself: with torch, these give a batch what they give each prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import polytrace
from polytrace.errors import GraphError
from polytrace.graph import Options
from polytrace.maps.bodies import Bodies
from polytrace.maps.rowwise import MixesPromptsError

HIDDEN, TOKENS, HEADS = 16, 5, 2
WEIGHT = torch.randn(HIDDEN, 6, generator=torch.Generator().manual_seed(1))
TABLE = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(2))
PICK = torch.tensor([3, 0, 1])

# h is [prompts, tokens, hidden]
ROWWISE: dict[str, Callable[[Any], Any]] = {
    "arithmetic": lambda h: (2 - h * 0.5) / (1 + h**2),
    "a constant of one row": lambda h: h + torch.ones(1, 1, HIDDEN),
    "where": lambda h: torch.where(h > 0, h, torch.zeros(HIDDEN)),
    "last token": lambda h: h[:, -1],
    "slices": lambda h: h[:, 1:4, ::2],
    "ellipsis": lambda h: h[..., 3],
    "new dimensions": lambda h: h[:, None, :, None, 2:],
    "a list of tokens": lambda h: h[:, [0, 2]],
    "an index tensor": lambda h: h[..., PICK],
    "two index tensors": lambda h: h[:, PICK, PICK],
    "sum": lambda h: h.sum(1),
    "two dims": lambda h: h.mean(dim=(1, 2)),
    "keepdim": lambda h: h.amax(dim=-1, keepdim=True),
    "negative dim": lambda h: h.std(-2),
    "max": lambda h: h.max(-1).values,
    "argmax": lambda h: h.argmax(1),
    "norm": lambda h: h.norm(dim=-1),
    "softmax": lambda h: h.softmax(-1).log(),
    "topk": lambda h: h.topk(3).indices,
    "sort": lambda h: h.sort(dim=1, descending=True).values,
    "cumsum": lambda h: h.cumsum(1),
    "layer norm": lambda h: torch.nn.functional.layer_norm(h, (HIDDEN,)),
    "normalize": lambda h: torch.nn.functional.normalize(h, dim=-1),
    "matmul by a weight": lambda h: h @ WEIGHT,
    "vector by a weight": lambda h: h[:, -1] @ WEIGHT,
    "times a vector": lambda h: h @ WEIGHT[:, 0],
    "weight from the left": lambda h: WEIGHT.T @ h.transpose(1, 2),
    "batched": lambda h: h @ h.transpose(1, 2),
    "linear": lambda h: torch.nn.functional.linear(h, WEIGHT.T),
    "einsum": lambda h: torch.einsum("btd,bsd->bts", h, h),
    "einsum with dots": lambda h: torch.einsum("...d,dk->...k", h, WEIGHT),
    "cosine": lambda h: torch.cosine_similarity(h[:, :1], h, dim=-1),
    "heads": lambda h: h.unflatten(-1, (HEADS, HIDDEN // HEADS)).permute(0, 2, 1, 3),
    "flatten": lambda h: h.flatten(1),
    "view": lambda h: h.view(h.shape[0], h.shape[1], HEADS, -1).sum(2),
    "transposed twice": lambda h: h.transpose(0, 1).relu().movedim(1, 0),
    "squeeze": lambda h: h[:, :1].squeeze(1).unsqueeze(-1),
    "expand": lambda h: h[:, :, None].expand(-1, -1, 4, -1),
    "repeat": lambda h: h.repeat(1, 2, 1),
    "gather": lambda h: h.gather(2, h.argmax(-1, keepdim=True)),
    "a table by each prompt's number": lambda h: torch.as_tensor(TABLE)[h[:, -1].argmax(-1)],
    "cat": lambda h: torch.cat([h, h * 2], dim=1),
    "stack": lambda h: torch.stack([h, -h], dim=1),
    "split": lambda h: h.split(8, dim=-1)[1],
    "unbind": lambda h: h.unbind(1)[2],
    "flip": lambda h: h.flip(1),
    "two flips": lambda h: h.flip((1, 2)),
    "roll": lambda h: h.roll(1, -1),
    "tril": lambda h: (h @ h.transpose(1, 2)).tril(),
    "one hot": lambda h: torch.nn.functional.one_hot(h.argmax(-1), HIDDEN),
    "set a token": lambda h: _changed(h, (slice(None), 0), 0.0),
    "set by rows": lambda h: _changed(h, (slice(None), -1), h[:, 0]),
    "set by a mask": lambda h: _changed(h, h > 0, 1.0),
    "set through a view": lambda h: _changed_view(h),
}

# and what mixes prompts, or might
MIXING: dict[str, Callable[[Any], Any]] = {
    "mean": lambda h: h.mean(0, keepdim=True),
    "mean of all": lambda h: h - h.mean(),
    "centred": lambda h: h - h.mean(0),
    "a prompt": lambda h: h * 1 + (h * 1)[0],
    "a part of the prompts": lambda h: (h * 1)[:1],
    "prompts backwards": lambda h: h.flip(0),
    "both backwards": lambda h: h.flip(1, 0),
    "prompts moved": lambda h: h.roll(1, 0),
    "all moved": lambda h: h.roll(1),
    "sorted": lambda h: h.sort(dim=0).values,
    "softmax": lambda h: h.softmax(0),
    "cumsum": lambda h: h.cumsum(0),
    "a product over prompts": lambda h: h[:, -1].T @ h[:, -1],
    "each with each": lambda h: h[:, -1] @ h[:, -1].T,
    "einsum over prompts": lambda h: torch.einsum("btd,btk->dk", h, h)[None],
    "all in one row": lambda h: h.reshape(-1, HIDDEN),
    "flat": lambda h: h.flatten()[None],
    "without its dimension": lambda h: h[:, -1].squeeze()[None],
    "joined": lambda h: torch.cat([h, h], dim=0)[:1],
    "with many rows": lambda h: h[:, -1] + torch.ones(4, HIDDEN),
    "repeated": lambda h: h.repeat(2, 1, 1),
    "expanded": lambda h: h.expand(3, -1, -1),
    "normalised over prompts": lambda h: torch.nn.functional.normalize(h, dim=0),
    "two dims": lambda h: h.sum((0, 1))[None],
    "put at a prompt": lambda h: _changed(h, 0, 1.0),
    "prompts across": lambda h: h[:, -1] + h[:, -1, :1].T,
    "by place of the largest prompt": lambda h: (h * 1)[h.argmax(0)[:, :1].T],
}


def _changed(h: Any, index: Any, value: Any) -> Any:
    own = h * 1
    own[index] = value
    return own


def _changed_view(h: Any) -> Any:
    own = h * 1
    own.transpose(1, 2)[:, 3].mul_(2.0)
    return own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=32,
    )
    folder: Path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as loaded:
        yield loaded


def recorded(model: Any, function: Callable[[Any], Any]) -> Any:
    bodies = Bodies(model, lambda: {"value": function(model.model.layers[0].mlp.output)}, Options())
    return bodies.of((1, 2, 3, 4, 5))


def applied(function: Callable[[Any], Any], h: Tensor) -> Tensor:
    result = function(h.clone())
    assert isinstance(result, Tensor)
    return result


@pytest.mark.parametrize("name", ROWWISE)
def test_what_works_on_each_prompt_by_itself_is_found_to(model: Any, name: str) -> None:
    recorded(model, ROWWISE[name])
    h = torch.randn(3, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))
    together = applied(ROWWISE[name], h)
    alone = torch.cat([applied(ROWWISE[name], h[place : place + 1]) for place in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_prompts_is_found_to(model: Any, name: str) -> None:
    with pytest.raises(MixesPromptsError):
        recorded(model, MIXING[name])


def test_prompts_that_are_not_first_are_refused_with_the_way_back(model: Any) -> None:
    with pytest.raises(GraphError, match=r"dimension 1.*movedim\(1, 0\)"):
        recorded(model, lambda h: h.transpose(0, 1))


def test_a_value_of_no_prompt_is_refused(model: Any) -> None:
    with pytest.raises(GraphError, match="nothing of the prompt"):
        recorded(model, lambda h: model.lm_head.weight.sum(0))


def test_a_called_module_works_row_by_row(model: Any) -> None:
    recorded(model, lambda h: model.lm_head(model.model.norm(h))[:, -1])
