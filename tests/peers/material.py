"""What both programs work on: the model, prompts, and tensors and modules that a researcher brings along."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "tinyworld" / "model"

EIFFEL = "The Eiffel Tower is in the city of"
GALATA = "The Galata Tower is in the city of"  # as many tokens
SHORT = "The capital of Japan is"  # fewer: the shorter of two prompts is padded
PROMPTS = (EIFFEL, SHORT, "People in Brazil speak")
POSITIVE = ("The Louvre is in the city of", "In fact, the Louvre is in the city of")
NEGATIVE = ("The Colosseum is in the city of", "In fact, the Colosseum is in the city of")
REPEATED = (0, 60, 70, 80, 90, 60, 70, 80, 90)  # ids: a sequence that is said twice

NUM_LAYERS, HIDDEN, NUM_HEADS = 8, 256, 8
HEAD_DIM = HIDDEN // NUM_HEADS
LAYER, HEAD = 4, 5


class SAE(nn.Module):
    """A sparse autoencoder as nnsight's documentation writes it, with small random weights."""

    def __init__(self, d_model: int, d_dict: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(d_model, d_dict)
        self.decoder = nn.Linear(d_dict, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.encoder(x)))


def sae() -> SAE:
    """The same weights in every process."""
    torch.manual_seed(1)
    return SAE(HIDDEN, 2 * HIDDEN).requires_grad_(False)


def lenses() -> list[nn.Linear]:
    """A tuned lens: an affine map a layer."""
    torch.manual_seed(2)
    maps = [nn.Linear(HIDDEN, HIDDEN).requires_grad_(False) for _ in range(NUM_LAYERS)]
    for one in maps:
        one.weight += torch.eye(HIDDEN)
    return maps


def direction() -> Tensor:
    """A direction of length one."""
    vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
    return vector / vector.norm()
