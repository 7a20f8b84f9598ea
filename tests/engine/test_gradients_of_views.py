"""Gradients at tensors that are views, as a linear layer returns them of sequences: those of plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polytrace


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 5, 3)])
@pytest.mark.parametrize("has_gradients", [True, False])
def test_the_gradient_of_what_a_linear_layer_returns_is_that_of_autograd(
    shape: tuple[int, ...], has_gradients: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).requires_grad_(has_gradients)
    model, x = polytrace.load(plain), torch.randn(shape)
    with model.trace(x):
        first, last = model[0].output, model[2].output
        with last.square().sum().backward():
            given, behind = first.grad.save(), last.grad.save()
    hidden = plain[0](x).detach().requires_grad_()
    end = plain[2](plain[1](hidden))
    wanted = torch.autograd.grad(end.square().sum(), [hidden, end])
    assert torch.equal(given, wanted[0])
    assert torch.equal(behind, wanted[1])
    assert given.abs().max() > 0
