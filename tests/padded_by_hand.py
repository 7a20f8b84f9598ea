"""Families of the padded layout beside Hugging Face's `generate` with hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from padded_families import ENCODERS, model_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from engine.local import LocalBackend
from engine.shard import Shard
from polytrace.graph import Port
from polytrace.model import Model

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
LAYERS = {
    "bloom": "transformer.h",
    "gptj": "transformer.h",
    "falcon": "transformer.h",
    "mamba": "backbone.layers",
    "jamba": "model.layers",
    "lfm2": "model.layers",
    "recurrent_gemma": "model.layers",
    "t5": "decoder.block",
    "mt5": "decoder.block",
}
RUNS_AGAIN = "recurrent_gemma"  # whose states are its modules', so that sequences side by side would share them
Change = Callable[[Tensor], Tensor]


class Loaded:
    """A family in one process, beside the plain model."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.set_num_threads(1)
        self.name, self.layers = name, LAYERS[name]
        model = model_of(name)
        if name == "mamba":  # its states multiply rounding: with larger weights plain float32 is off by more, too
            for parameter in model.parameters():
                parameter.data *= 0.7 if parameter.ndim > 1 else 1.0
        model.save_pretrained(folder)
        kind = AutoModelForSeq2SeqLM if name in ENCODERS else AutoModelForCausalLM
        self.plain: Any = kind.from_pretrained(folder).eval()
        self.backend = LocalBackend(str(folder), threads=1)
        self.shard: Shard = self.backend.shards.shard  # type: ignore[attr-defined]
        self.model: Any = Model(self.backend)

    def place(self, layer: int) -> tuple[str, Port]:
        return f"{self.layers}.{layer}", Port.OUTPUT


def by_hugging_face(
    loaded: Loaded, prompt: list[int], edits: Mapping[str, Change], steps: int
) -> tuple[list[int], list[Tensor]]:
    """The likeliest tokens, and each step's logits `[V]`, while hooks change what modules give at every step.

    By `generate`; where its own cache is the modules' state, by a forward of all tokens at each step.
    """
    plain, tokens, logits = loaded.plain, list(prompt), list[Tensor]()
    with changed(plain, edits), torch.no_grad():
        if loaded.name == RUNS_AGAIN:
            for _ in range(steps):
                logits.append(plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1])
                tokens.append(int(logits[-1].argmax()))
            return tokens[len(prompt) :], logits
        found = plain.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return found.sequences[0, -steps:].tolist(), [step[0] for step in found.logits]


@contextmanager
def changed(plain: Any, edits: Mapping[str, Change]) -> Iterator[None]:
    """What modules give is changed; of a tuple its first member."""
    with ExitStack() as hooks:
        for path, change in edits.items():

            def hook(_module: Any, _args: Any, output: Any, change: Change = change) -> Any:
                return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

            hooks.callback(plain.get_submodule(path).register_forward_hook(hook).remove)
        yield


def assert_close(ours: list[Tensor], theirs: list[Tensor]) -> None:
    scale = max(1.0, max(float(one.abs().max()) for one in theirs))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).abs().max()) <= FLOAT32_TOLERANCE * scale
