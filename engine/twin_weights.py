"""Weights of tiny twins, drawn so that what is wrong anywhere makes a large difference."""

from __future__ import annotations

import zlib

import torch
from torch import nn


def draw_weights(model: nn.Module, *, has_odd_vectors: bool = True) -> None:
    """In place, each parameter by its path alone. Matrices keep the size of what goes through them.

    `has_odd_vectors`: norms' gains, biases and attention sinks are not what they begin with either.
    """
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(drawn * parameter.shape[-1] ** -0.5)
            elif has_odd_vectors:
                parameter.add_(0.1 * drawn)
