"""Models that take gradients inside their own forward: as with plain hooks, or refused, and never cut unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_kinds import seeded
from torch import Tensor, nn

import polytrace
from polytrace.errors import GraphError, RunError


class Energy(nn.Module):
    """An energy and its forces: what comes through `inner`, and what passes it by."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.read_out, self.after = (nn.Linear(4, 4) for _ in range(4))
        self.fixed = nn.Identity()

    def forward(self, x: Tensor, has_hessian: bool = False) -> dict[str, Tensor]:
        x = self.before(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            hidden = x + self.inner(x).tanh() + self.fixed(torch.ones(4))
            energy = self.read_out(hidden).pow(2).sum()
            (forces,) = torch.autograd.grad(energy, x, create_graph=has_hessian)
            if has_hessian:
                (forces,) = torch.autograd.grad(forces.pow(2).sum(), x)
        return {"forces": self.after(forces), "energy": energy.detach()}


def by_hand(plain: Energy, x: Tensor, hooks: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    handles = [
        plain.get_submodule(path).register_forward_hook(lambda _m, _a, output, make=make: make(output))
        for path, make in hooks.items()
    ]
    try:
        with torch.no_grad():
            found: dict[str, Tensor] = plain(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def assert_same(ours: dict[str, Any], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor)


@pytest.mark.parametrize("merges", [False, True])
def test_a_write_that_would_cut_the_models_own_gradient_is_refused(merges: bool) -> None:
    plain = seeded(Energy)
    model: Any = polytrace.load(plain, merges_calls=merges)
    x, told = torch.randn(3, 4), "takes gradients inside its own forward, which this write would cut"

    def assigned() -> None:
        model.inner.output = model.inner.output * 2

    def in_place() -> None:
        hidden = model.inner.output
        hidden *= 2

    def a_part() -> None:
        model.inner.output[:, 0] = 0.0

    def elsewhere() -> None:  # where nothing has gradients
        model.fixed.output = model.inner.output[0]

    for write in (assigned, in_place, a_part, elsewhere):
        with pytest.raises(RunError, match=told) as caught, model.trace(x):
            write()
            model.output["forces"].save()
        assert caught.value.where is not None and "test_own_gradients.py" in caught.value.where
    with model.trace(x):
        saved = {name: model.output[name].save() for name in ("forces", "energy")}
    assert_same(saved, by_hand(plain, x, {}))


@pytest.mark.parametrize("merges", [False, True])
def test_what_a_call_has_not_made_is_written_as_hooks_do(merges: bool) -> None:
    plain = seeded(Energy)
    model: Any = polytrace.load(plain, merges_calls=merges)
    x, other = torch.randn(3, 4), torch.randn(3, 4)
    with torch.enable_grad():
        clean = plain.inner(plain.before(other)).detach()
    unedited = by_hand(plain, x, {})

    with model.trace() as tracer:
        with tracer.invoke(other):
            given = model.inner.output
        with tracer.invoke(x):
            model.inner.output = given  # of another call
            saved = {name: model.output[name].save() for name in ("forces", "energy")}
    patched = by_hand(plain, x, {"inner": lambda _output: clean})
    assert_same(saved, patched)
    assert (patched["forces"] - unedited["forces"]).abs().max() > 0.01

    with model.trace(x):
        fixed = model.fixed.output
        fixed *= 3.0  # nothing is known of its past, and nothing with a past is in it
        before = model.before.output
        before += 1.0
        after = model.after.output
        after *= 2.0
        saved = {name: model.output[name].save() for name in ("forces", "energy")}
    edits = {
        "fixed": lambda output: 3 * output,
        "before": lambda output: output + 1,
        "after": lambda output: 2 * output,
    }
    edited = by_hand(plain, x, edits)
    assert_same(saved, edited)
    assert (edited["forces"] - unedited["forces"]).abs().max() > 0.01


def test_a_gradient_through_the_models_own_is_refused() -> None:
    plain = seeded(Energy)
    model: Any = polytrace.load(plain)
    x, told = torch.randn(3, 4), "takes gradients inside its own forward, which no gradient can be told through"
    with pytest.raises(RunError, match=told) as caught, model.trace(x):
        inner = model.inner.output  # `x` comes to the energy beside it, so torch would not complain
        model.read_out.output.sum().backward()
        model.output["forces"].save()
        inner.grad.save()
    assert caught.value.where is not None and "test_own_gradients.py" in caught.value.where
    with pytest.raises(RunError, match=told), model.trace(x):
        model.inner.output = torch.zeros(3, 4)
        after = model.after.output
        model.output["forces"].sum().backward()
        after.grad.save()
    with pytest.raises(RunError, match=told), model.trace(x, has_hessian=True):
        after = model.after.output
        model.output["forces"].sum().backward()
        after.grad.save()


def test_gradients_behind_the_models_own_are_those_of_plain_torch() -> None:
    plain = seeded(Energy)
    x = torch.randn(3, 4)
    seen: list[Tensor] = []
    handle = plain.after.register_forward_pre_hook(lambda _m, args: seen.append(args[0].requires_grad_()))
    plain(x)["forces"].pow(2).sum().backward()
    handle.remove()
    plain.zero_grad()
    model: Any = polytrace.load(plain)
    with model.trace(x):
        forces = model.after.input
        end = model.output["forces"]
        end.pow(2).sum().backward()
        gradient, ended = forces.grad.save(), end.save()
    wanted = seen[0].grad
    assert wanted is not None and wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted)
    torch.testing.assert_close(ended, by_hand(plain, x, {})["forces"])


class Usual(nn.Module):
    """Counts on torch's usual mode, in which gradients are on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_()
        (forces,) = torch.autograd.grad(self.inner(x).pow(2).sum(), x)
        return forces


class Graded(nn.Module):
    """Turns gradients on for another."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        with torch.enable_grad():
            return self.model(x)


def test_a_model_that_needs_gradients_on_is_told_how() -> None:
    plain, x = seeded(Usual), torch.randn(3, 4)
    model: Any = polytrace.load(plain)
    told = r"Usual takes gradients inside its own forward, and a call has them off.*torch\.enable_grad"
    with pytest.raises(GraphError, match=told), model.trace(x):
        model.output.save()
    graded: Any = polytrace.load(Graded(plain))
    with graded.trace(x):
        forces = graded.output.save()
    torch.testing.assert_close(forces, plain(x.clone()))
