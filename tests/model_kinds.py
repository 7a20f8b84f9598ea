"""Tiny models of many kinds with seeded weights: the model, a module inside of it, and two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Kind = tuple[nn.Module, str, dict[str, Any], dict[str, Any]]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Its weights are large enough that edits show."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model


def ids(*shape: int, top: int = 60) -> Tensor:
    return torch.randint(3, top, shape)


class Looped(nn.Module):
    """A module that runs several times in one forward, and returns several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        hidden = torch.relu(self.first(x))
        for _ in range(3):
            hidden = torch.tanh(self.shared(hidden))
        return {"y": self.last(hidden) * scale, "hidden": (hidden, hidden.sum())}


def looped() -> Kind:
    model = seeded(Looped)
    return model, "shared", {"x": torch.randn(3, 4)}, {"x": torch.randn(3, 4), "scale": 2.0}


def bert() -> Kind:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = seeded(lambda: transformers.BertModel(config))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    call = {"input_ids": ids(2, 5), "attention_mask": mask}
    return model, "encoder.layer.0", call, {"input_ids": ids(2, 5), "attention_mask": mask}


KINDS: dict[str, Callable[[], Kind]] = {"module": looped, "bert": bert}
