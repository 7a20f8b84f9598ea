"""Gradients of models that work out anew on the way back what they did not keep, against plain torch with hooks.

What is written inside would be missing there, so such a gradient is refused; one beside it is plain torch's.
"""

from __future__ import annotations

import pytest
import torch
from model_kinds import seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTModel

import polytrace
from polytrace.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.behind = nn.Identity()

    def _block(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(torch.tanh(self.inside(x)))
        return made**2

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        block: Tensor = checkpoint(self._block, hidden, use_reentrant=False)
        out: Tensor = block + self.behind(hidden) ** 2
        return out


class Reversed(torch.autograd.Function):
    """Keeps its input alone, as the layers of a reversible model do."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, module: nn.Module) -> Tensor:
        ctx.x, ctx.module = x.detach(), module  # type: ignore[attr-defined]
        with torch.no_grad():
            made: Tensor = module(x)
        return made

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        with torch.enable_grad():
            x = ctx.x.requires_grad_()  # type: ignore[attr-defined]
            (found,) = torch.autograd.grad(ctx.module(x), x, gradient)  # type: ignore[attr-defined]
        return found, None


class Reversible(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = Reversed.apply(self.before(x), nn.Sequential(self.inside, nn.Tanh()))  # type: ignore[no-untyped-call]
        return made**2


@pytest.mark.parametrize("kind", [Checkpointed, Reversible])
@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_gradient_through_what_would_run_again_without_a_write_is_refused(
    kind: type[Checkpointed], *, is_in_place: bool
) -> None:
    plain = seeded(kind)
    model = polytrace.load(plain)
    with (
        pytest.raises(RunError, match=r"inside runs again on the way back .*test_checkpointed.py:\d+"),
        model.trace(X),
    ):
        hidden = model.before.output
        if is_in_place:
            model.inside.output[:] = model.inside.output * 3
        else:
            model.inside.output = model.inside.output * 3
        model.output.sum().backward()
        hidden.grad.save()
    assert not plain.inside._forward_hooks


@pytest.mark.parametrize("is_in_place", [False, True])
def test_gradients_beside_what_runs_again_are_those_of_torch(*, is_in_place: bool) -> None:
    plain = seeded(Checkpointed)
    model = polytrace.load(plain)
    with model.trace(X):
        hidden, middle = model.before.output, model.inside.output
        if is_in_place:
            model.behind.input[:] = model.behind.input * 3  # the block has run, with what was there before
        else:
            model.behind.output = model.behind.output * 3
        (model.output**2).sum().backward()
        gradients = hidden.grad.save(), middle.grad.save()
    own = plain.before(X).detach().requires_grad_()
    inside = plain.inside(own)
    inside.retain_grad()
    ((plain.last(torch.tanh(inside)) ** 2 + (own * 3) ** 2) ** 2).sum().backward()
    for ours, wanted in zip(gradients, (own.grad, inside.grad), strict=True):
        assert wanted is not None
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(ours, wanted)


def test_a_write_beside_a_call_whose_gradient_is_asked_for_is_no_write_of_it() -> None:
    plain = seeded(Checkpointed)
    model = polytrace.load(plain)
    with model.trace() as tracer:
        with tracer.invoke(X):
            model.inside.output = model.inside.output * 3
            model.output.save()
        with tracer.invoke(X):
            hidden = model.before.output
            (model.output**2).sum().backward()
            gradient = hidden.grad.save()
    own = plain.before(X).detach().requires_grad_()
    ((plain.last(torch.tanh(plain.inside(own))) ** 2 + own**2) ** 2).sum().backward()
    torch.testing.assert_close(gradient, own.grad)


def vit() -> ViTModel:
    small = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    plain = ViTModel(small)
    seeded(lambda: plain).train()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    return plain


def test_what_a_checkpointed_layer_of_transformers_returns_is_written_as_with_a_hook() -> None:
    plain, image = vit(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    seen: list[Tensor] = []

    def look(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handles = [
        plain.layers[0].register_forward_hook(look),
        plain.layers[1].register_forward_hook(lambda _module, _args, output: output * 3),
    ]
    (plain(pixel_values=image).last_hidden_state ** 3).sum().backward()
    for handle in handles:
        handle.remove()
    wanted = seen[0].grad
    assert wanted is not None
    plain.zero_grad()
    model = polytrace.load(plain)
    with model.trace(pixel_values=image):
        hidden = model.layers[0].output
        model.layers[1].output = model.layers[1].output * 3
        (model.output.last_hidden_state**3).sum().backward()
        gradient = hidden.grad.save()
    assert wanted.abs().max() > 1
    assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_what_is_written_inside_a_checkpointed_layer_of_transformers_has_no_gradient() -> None:
    model = polytrace.load(vit())
    with (
        pytest.raises(RunError, match=r"layers\.1\.layernorm_after runs again .*gradient_checkpointing_disable"),
        model.trace(pixel_values=torch.ones(1, 3, 8, 8)),
    ):
        hidden = model.layers[0].output
        model.layers[1].layernorm_after.output *= 3
        model.output.last_hidden_state.sum().backward()
        hidden.grad.save()
