"""Probing: residuals of many prompts, and how well the nearest mean of a class tells the class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.experiments.experiment import COUNTRIES, Answer, Values, layer_names
from bench.plain import Plain


def ask(model: Any, turn: int) -> Answer:
    """The residual at the last token of many prompts, at every layer, to fit a probe on."""
    prompts = _probing_prompts(turn)
    residuals = []
    with model.trace(prompts) as tracer:
        for layer in model.model.layers:
            residuals.append(layer.output[0][:, -1].save())
    return Answer(values={"residuals": torch.stack(list(residuals))}, receipts=(tracer.receipt,))


def check(plain: Plain, turn: int) -> Values:
    """One forward a prompt."""
    names = layer_names(plain)
    rows = [plain.read(plain.ids(prompt), outputs=names) for prompt in _probing_prompts(turn)]
    return {"residuals": torch.stack([torch.cat([row[name][:, -1] for row in rows]) for name in names])}


def tell(values: Values, model: Any, turn: int) -> str:
    """How well the nearest mean of the other countries tells the continent, by layer."""
    labels = torch.tensor([index for index, names in enumerate(COUNTRIES.values()) for _ in names])
    scores = [_leave_one_out(residuals, labels) for residuals in values["residuals"].float()]
    best = max(range(len(scores)), key=scores.__getitem__)
    return f"a nearest-mean probe names the continent of {scores[best]:.0%} of unseen countries at layer {best}"


def _leave_one_out(features: Tensor, labels: Tensor) -> float:
    right = 0
    for index, label in enumerate(labels.tolist()):
        others = torch.arange(len(labels)) != index
        means = torch.stack([features[others & (labels == group)].mean(0) for group in labels.unique()])
        right += int((means - features[index]).norm(dim=-1).argmin() == label)
    return right / len(labels)


def _probing_prompts(turn: int) -> list[str]:
    phrasings = ("The capital city of {} is", "On a map of {} the capital city is", "People in {}")
    return [phrasings[turn % len(phrasings)].format(name) for names in COUNTRIES.values() for name in names]
