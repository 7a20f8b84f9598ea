"""Tensors with `requires_grad=True` as arguments of models that are called as they are, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from called_by_hand import first_of, first_tensor
from model_kinds import KINDS, seeded
from torch import Tensor, nn
from whole_gradients_by_hand import weights_of

import polytrace
from polytrace.errors import GraphError

TOLERANCE = 1e-5  # of max(1, max|of plain autograd|), float32


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any], more: Tensor | None = None) -> Tensor:
        mixed: Tensor = self.one(batch["parts"][0]) * batch["gate"]
        return torch.tanh(mixed if more is None else mixed + self.other(more))


@pytest.fixture(scope="module")
def mixer() -> Any:
    return seeded(Mixer)


def _own(seed: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def _assert_close(ours: Tensor | None, wanted: Tensor | None) -> None:
    assert ours is not None and wanted is not None and wanted.abs().max() > 1e-3
    assert (ours - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["vit", "llava"])
def test_pixels_of_a_call_have_the_gradient_of_plain_autograd(kind: str) -> None:
    plain, _, call, _ = KINDS[kind]()
    theirs, ours = (call["pixel_values"].clone().requires_grad_(True) for _ in range(2))
    result = first_tensor(plain(**{**call, "pixel_values": theirs}))
    (result * weights_of(result, 1)).sum().backward()
    plain.zero_grad()
    model = polytrace.load(plain)
    with model.trace(**{**call, "pixel_values": ours}):
        end = first_of(model.output).save()
        (end * weights_of(result, 1)).sum().backward()
    assert torch.equal(end, result.detach())
    _assert_close(ours.grad, theirs.grad)


def _within(model: Any, given: Tensor) -> tuple[Any, Any]:
    """A call whose argument is used beside it too, in lists and dicts and computed from."""
    with model.trace({"parts": [given * 2], "gate": given.exp()}, more=given):
        loss = (model.output.pow(2) * given).sum().save()
        loss.backward()
    return loss, given.grad


def test_an_argument_that_the_trace_uses_too_has_its_whole_gradient(mixer: Any) -> None:
    theirs, ours = _own(1), _own(1)
    wanted = (mixer({"parts": [theirs * 2], "gate": theirs.exp()}, more=theirs).pow(2) * theirs).sum()
    wanted.backward()
    loss, gradient = _within(polytrace.load(mixer), ours)
    assert (loss - wanted).abs() <= TOLERANCE
    _assert_close(gradient, theirs.grad)


def test_arguments_of_several_calls_have_gradients_of_all_of_them(mixer: Any) -> None:
    (one, other), (own, second) = ((_own(1), _own(2)) for _ in range(2))
    first = mixer({"parts": [one], "gate": other}).pow(2).sum()
    wanted = torch.autograd.grad(first + mixer({"parts": [other], "gate": one}).pow(3).sum(), [one, other])
    model = polytrace.load(mixer, merges_calls=True)
    with model.trace() as tracer:
        with tracer.invoke({"parts": [own], "gate": second}):
            loss = model.output.pow(2).sum()
        with tracer.invoke({"parts": [second], "gate": own}):
            ours: Any = torch.autograd.grad(loss + model.output.pow(3).sum(), [own, second])
            found = [one.save() for one in ours]
    for mine, theirs in zip(found, wanted, strict=True):
        _assert_close(mine, theirs)


def test_an_argument_that_is_changed_at_its_site_has_its_gradient_through_that(mixer: Any) -> None:
    theirs, ours, gate = _own(1), _own(1), _own(2).detach()
    changed = theirs.clone()
    changed[:, 0] *= 3
    mixer({"parts": [changed], "gate": gate}).pow(2).sum().backward()
    model = polytrace.load(mixer)
    with model.trace({"parts": [ours], "gate": gate}):
        model.inputs[0][0]["parts"][0][:, 0] *= 3
        model.output.pow(2).sum().backward()
    _assert_close(ours.grad, theirs.grad)


def test_an_optimiser_moves_an_argument_as_it_does_in_torch(mixer: Any) -> None:
    model = polytrace.load(mixer)

    def moved(back: Callable[[Tensor], None]) -> Tensor:
        given = _own(3)
        optimiser = torch.optim.Adam([given], lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            back(given)
            optimiser.step()
        return given.detach()

    def ours(given: Tensor) -> None:
        with model.trace({"parts": [given], "gate": given}):
            model.output.pow(2).sum().backward()

    found = moved(ours)
    assert (found - _own(3)).abs().max() > 0.1
    _assert_close(found, moved(lambda given: mixer({"parts": [given], "gate": given}).pow(2).sum().backward()))


def test_an_argument_that_cannot_have_its_gradient_is_refused() -> None:
    class Deep(Mixer):
        def forward(self, batch: Any, more: Tensor | None = None) -> Tensor:
            return super().forward(batch[0][0][0], more)

    class Deepest(Mixer):
        def forward(self, batch: Any, more: Tensor | None = None) -> Tensor:
            found: Tensor = self.one(batch[0][0][0][0][0])
            return found

    model: Any = polytrace.load(seeded(Deep))
    batch = {"parts": [_own(1)], "gate": _own(2).detach()}
    with pytest.raises(GraphError, match=r"requires_grad=True cannot.*so deep.*detach") as refused:
        model.trace([[[batch]]])
    assert refused.value.where is not None and refused.value.where.startswith("test_argument_gradients.py:")
    with pytest.raises(GraphError, match="so deep"):  # no argument that can be written lies there
        polytrace.load(seeded(Deepest)).trace([[[[[_own(1)]]]]])
    with model.trace([[[{**batch, "parts": [_own(1).detach()]}]]]):
        assert model.output.save() is not None
