"""Small models with seeded weights, plain and loaded, for tests that compare the two."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import polytrace

WIDTH, VOCABULARY, LAYERS = 32, 64, 4
IDS = [3, 17, 42, 5, 9, 30, 11]
OTHER = [8, 25, 1, 60]
FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
Change = Callable[[Tensor], Tensor]


def small_llama(**changes: Any) -> LlamaForCausalLM:
    """Seeded, float32; its weights are large enough that every edit shows."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


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


def hooked(plain: Any, ids: list[int], edits: dict[str, Change] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of one prompt `[1, tokens, vocabulary]` with edits of modules' outputs, and every module's output."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., Any]:
        def run(module: Any, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output
            changed = (edits or {})[name](output.clone()) if name in (edits or {}) else output
            seen[name] = changed.clone()
            return changed

        return run

    with ExitStack() as stack, torch.no_grad():
        for name, module in plain.named_modules():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        return plain(input_ids=torch.tensor([ids]), use_cache=False).logits, seen


def at_last(vector: Tensor) -> Change:
    """Adds a vector to the last token's row."""

    def change(hidden: Tensor) -> Tensor:
        hidden[:, -1] += vector
        return hidden

    return change


def close(ours: Tensor, theirs: Tensor) -> None:
    """Promise 1 of DESIGN against plain Hugging Face, in float32."""
    assert type(ours) is Tensor, "it has its data"
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert (ours - theirs).abs().max() <= FLOAT32_TOLERANCE * max(1.0, float(theirs.abs().max()))
