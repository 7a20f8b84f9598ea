"""The Hugging Face model in this process with hooks written by hand: what every number of polytrace is held against.

Owns nothing of polytrace and imports none of it, so an error there cannot hide here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

# Sees a tensor `[1, tokens, features]`; returns what stands in its place, or None to leave it.
Edit = Callable[[Tensor], Tensor | None]

# The rule for "equal": sums are taken in another order, so the last bits may differ.
TOLERANCE = 1e-5


class Plain:
    """A model in float32 and its tokenizer."""

    def __init__(self, folder: str | Path, *, device: str = "cpu") -> None:
        logging.disable_progress_bar()  # a second of loading would draw over the caller's own progress
        self.device = device
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval().to(device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        """The tokens of a prompt, special ones included."""
        return list(self._tokenizer(text)["input_ids"])

    def text(self, ids: Sequence[int]) -> str:
        """What tokens say, special ones included."""
        return str(self._tokenizer.decode(list(ids)))

    def first_token(self, word: str) -> int:
        """The first token of a word inside a sentence, without special tokens."""
        return int(self._tokenizer(word, add_special_tokens=False)["input_ids"][0])

    @torch.inference_mode()
    def logits(
        self, ids: Sequence[int], *, outputs: Mapping[str, Edit] | None = None, inputs: Mapping[str, Edit] | None = None
    ) -> Tensor:
        """One forward of one sequence, `[1, tokens, vocabulary]`, with edits at outputs and inputs of modules."""
        with hooked(self.model, outputs=outputs or {}, inputs=inputs or {}):
            logits: Tensor = self.model(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False).logits
            return logits

    def read(self, ids: Sequence[int], *, outputs: Sequence[str] = (), inputs: Sequence[str] = ()) -> dict[str, Tensor]:
        """What stood at outputs and inputs of modules in one forward, by the module's name."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Edit:
            return lambda value: seen.__setitem__(name, value.clone())

        self.logits(ids, outputs={name: keep(name) for name in outputs}, inputs={name: keep(name) for name in inputs})
        return seen


@contextlib.contextmanager
def hooked(model: nn.Module, *, outputs: Mapping[str, Edit], inputs: Mapping[str, Edit]) -> Iterator[None]:
    """Runs the block with an edit at each named module's output or first input."""
    handles = []
    try:
        for name, edit in outputs.items():
            handles.append(model.get_submodule(name).register_forward_hook(_on_output(edit)))
        for name, edit in inputs.items():
            handles.append(model.get_submodule(name).register_forward_pre_hook(_on_input(edit)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference(ours: Tensor, plain: Tensor) -> float:
    """`max|a - b| / max(1, max|b|)`: at most `TOLERANCE` where two runs count as equal.

    Infinite when shapes differ, when integers do, or when ours is not finite.
    """
    if ours.shape != plain.shape:
        return float("inf")
    ours, plain = ours.cpu(), plain.cpu()
    if not plain.is_floating_point():
        return 0.0 if torch.equal(ours, plain) else float("inf")
    if ours.numel() == 0:
        return 0.0
    ours, plain = ours.double(), plain.double()
    worst = (ours - plain).abs().max() / plain.abs().max().clamp(min=1.0)
    return float(worst) if torch.isfinite(worst) else float("inf")


def _on_output(edit: Edit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            changed = edit(output[0])
            return None if changed is None else (changed, *output[1:])
        return edit(output)

    return hook


def _on_input(edit: Edit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = edit(args[0])
        return None if changed is None else (changed, *args[1:])

    return hook
