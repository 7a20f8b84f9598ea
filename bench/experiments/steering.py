"""Steering: a direction measured in one trace and added in the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.experiments.experiment import FACTS, Answer, Values, layer_names
from bench.plain import Plain


def ask(model: Any, turn: int) -> Answer:
    """A direction from one fact towards another, measured in one trace and added in the next."""
    target, other, prompt = _steering_prompts(turn)
    layer = model.model.layers[_middle(len(model.model.layers))]
    with model.trace() as measuring:
        with measuring.invoke(target):
            towards = layer.output[0][:, -1]
        with measuring.invoke(other):
            direction = (towards.mean(0) - layer.output[0][:, -1].mean(0)).save()
    with model.trace(prompt) as steering:
        layer.output[0][:, -1] += 4 * direction
        logits = model.lm_head.output[:, -1].save()
    return Answer(values={"direction": direction, "logits": logits}, receipts=(measuring.receipt, steering.receipt))


def check(plain: Plain, turn: int) -> Values:
    """Means of kept residuals, and a hook that adds."""
    target, other, prompt = _steering_prompts(turn)
    names = layer_names(plain)
    name = names[_middle(len(names))]

    def mean(prompts: Sequence[str]) -> Tensor:
        return torch.cat([plain.read(plain.ids(text), outputs=[name])[name][:, -1] for text in prompts]).mean(0)

    direction = mean(target) - mean(other)

    def add(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] += 4 * direction
        return hidden

    return {"direction": direction, "logits": plain.logits(plain.ids(prompt), outputs={name: add})[:, -1]}


def tell(values: Values, model: Any, turn: int) -> str:
    """What the steered model says instead."""
    _, _, prompt = _steering_prompts(turn)
    said = model.tokenizer.decode([int(values["logits"].argmax())])
    return f"“{prompt}”, steered towards {FACTS[(turn + 1) % len(FACTS)][1].strip()}, goes on with {said!r}"


def _steering_prompts(turn: int) -> tuple[list[str], list[str], str]:
    target, other = FACTS[(turn + 1) % len(FACTS)][0], FACTS[turn % len(FACTS)][0]
    openings = ("", "In fact, ", "As everyone knows, ")
    return [opening + target for opening in openings], [opening + other for opening in openings], other


def _middle(num_layers: int) -> int:
    return num_layers // 2
