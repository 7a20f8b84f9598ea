"""A small Llama in plain Hugging Face, and what it gives with hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, VOCABULARY, LAYERS = 32, 64, 4
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
    """Promise 1's tolerance in float32."""
    assert type(ours) is Tensor
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
