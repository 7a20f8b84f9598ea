"""Logit lens: what every layer would say next, at every token."""

from __future__ import annotations

from typing import Any

import torch

from bench.experiments.experiment import FACTS, Answer, Values, layer_names
from bench.plain import Plain


def ask(model: Any, turn: int) -> Answer:
    """What every layer would say next, and how surely, at every token."""
    prompt, _ = FACTS[turn % len(FACTS)]
    probabilities, tokens = [], []
    with model.trace(prompt) as tracer:
        for layer in model.model.layers:
            guess = model.lm_head(model.model.norm(layer.output[0])).softmax(-1)
            probability, token = guess.max(-1)
            probabilities.append(probability.save())
            tokens.append(token.save())
    values = {"probabilities": torch.cat(probabilities), "tokens": torch.cat(tokens)}
    return Answer(values=values, receipts=(tracer.receipt,))


def check(plain: Plain, turn: int) -> Values:
    """Hooks keep each layer's output; final norm and head are called on them."""
    prompt, _ = FACTS[turn % len(FACTS)]
    names = layer_names(plain)
    kept = plain.read(plain.ids(prompt), outputs=names)
    root: Any = plain.model
    with torch.inference_mode():
        guesses = [root.lm_head(root.model.norm(kept[name])).softmax(-1).max(-1) for name in names]
    return {"probabilities": torch.cat([g.values for g in guesses]), "tokens": torch.cat([g.indices for g in guesses])}


def tell(values: Values, model: Any, turn: int) -> str:
    """From which layer on the answer stands first."""
    prompt, _ = FACTS[turn % len(FACTS)]
    last = values["tokens"][:, -1].tolist()
    wrong = [layer for layer, token in enumerate(last) if token != last[-1]]
    said = model.tokenizer.decode([last[-1]])
    return f"“{prompt}”: {said!r} is the first guess from layer {max(wrong, default=-1) + 1} on"
