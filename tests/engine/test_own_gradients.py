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
        self.fixed, self.aside = nn.Identity(), nn.Linear(4, 4)

    def forward(self, x: Tensor, has_hessian: bool = False) -> dict[str, Tensor]:
        x = self.before(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            hidden = x + self.inner(x).tanh() + self.fixed(torch.ones(4))
            with torch.no_grad():
                self.aside(hidden)
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


def twice(output: Tensor) -> Tensor:
    return 2 * output


def doubled(model: Any) -> None:
    model.inner.output = model.inner.output * 2


def doubled_in_place(model: Any) -> None:
    hidden = model.inner.output
    hidden *= 2


def a_part(model: Any) -> None:
    model.inner.output[:, 0] = 3.0


def detached(model: Any) -> None:
    model.inner.output = model.inner.output.detach() * 2


def with_data(model: Any) -> None:
    model.inner.output = model.inner.output + model.inner.output.data * 2


def both_sides(model: Any) -> None:
    before = model.before.output
    before += 1.0
    after = model.after.output
    after *= 2.0


def from_elsewhere(model: Any) -> None:
    """What is written has a past, where it is written nothing has."""
    model.fixed.output = model.inner.output[0]
    fixed = model.fixed.output
    fixed *= fixed


EDITS: dict[str, tuple[Callable[[Any], None], dict[str, Callable[[Tensor], Tensor]]]] = {
    "doubled": (doubled, {"inner": twice}),
    "doubled in place": (doubled_in_place, {"inner": twice}),
    "a part": (
        a_part,
        {"inner": lambda output: output * torch.tensor([0.0, 1.0, 1.0, 1.0]) + torch.tensor([3.0, 0.0, 0.0, 0.0])},
    ),
    "detached": (detached, {"inner": lambda output: 2 * output.detach()}),
    "with data": (with_data, {"inner": lambda output: output + output.data * 2}),
    "both sides": (both_sides, {"before": lambda output: output + 1, "after": twice}),
    "a constant": (lambda model: setattr(model.inner, "output", torch.ones(3, 4)), {"inner": torch.ones_like}),
}


@pytest.mark.parametrize("merges", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_the_models_own_gradient_goes_through_what_is_written(edit: str, merges: bool) -> None:
    plain: Any = seeded(Energy)
    model: Any = polytrace.load(plain, merges_calls=merges)
    x = torch.randn(3, 4)
    write, hooks = EDITS[edit]
    with model.trace(x):
        write(model)
        inner = model.inner.output.save() if edit != "both sides" else None
        saved = {name: model.output[name].save() for name in ("forces", "energy")}
    edited, unedited = by_hand(plain, x, hooks), by_hand(plain, x, {})
    assert_same(saved, edited)
    assert (edited["forces"] - unedited["forces"]).abs().max() > 0.01
    assert inner is None or not inner.requires_grad
    assert all(parameter.grad is None for parameter in plain.parameters())


@pytest.mark.parametrize("merges", [False, True])
def test_what_has_a_past_elsewhere_has_it_where_it_is_written(merges: bool) -> None:
    plain: Any = seeded(Energy)
    model: Any = polytrace.load(plain, merges_calls=merges)
    x = torch.randn(3, 4)
    seen: list[Tensor] = []
    hooks = {"inner": lambda output: (seen.append(output), output)[1], "fixed": lambda _output: seen[-1][0] ** 2}
    with model.trace(x):
        from_elsewhere(model)
        saved = {name: model.output[name].save() for name in ("forces", "energy")}
    edited = by_hand(plain, x, hooks)
    assert_same(saved, edited)
    assert (edited["forces"] - by_hand(plain, x, {})["forces"]).abs().max() > 0.01


def test_calls_give_each_other_values_without_mixing_their_own_gradients() -> None:
    plain: Any = seeded(Energy)
    model: Any = polytrace.load(plain)
    one, two = torch.randn(3, 4), torch.randn(3, 4)
    inner = [plain.inner(plain.before(x)).detach() for x in (one, two)]
    with model.trace() as tracer:
        mine, yours = tracer.invoke(one), tracer.invoke(two)
        with mine:
            a = model.inner.output
        with yours:
            b = model.inner.output
            model.read_out.output *= a
            second = model.output["forces"].save()
        with mine:
            model.read_out.output *= b
            first = model.output["forces"].save()
    for ours, x, other in ((first, one, inner[1]), (second, two, inner[0])):
        wanted = by_hand(plain, x, {"read_out": lambda output, other=other: output * other})
        torch.testing.assert_close(ours, wanted["forces"])


@pytest.mark.parametrize("merges", [False, True])
def test_a_write_that_would_cut_the_models_own_gradient_is_refused(merges: bool) -> None:
    plain: Any = seeded(Energy)
    model: Any = polytrace.load(plain, merges_calls=merges)
    x = torch.randn(3, 4)

    def by_way_of_a_place_without() -> None:
        model.read_out.output += model.inner.output + model.aside.output

    def by_a_call() -> None:
        model.inner.output = model.read_out(model.inner.output)

    for write in (by_way_of_a_place_without, by_a_call):
        told = "takes gradients inside its own forward, which this write would cut"
        with pytest.raises(RunError, match=told) as caught, model.trace(x):
            write()
            model.output["forces"].save()
        assert caught.value.where is not None and "test_own_gradients.py" in caught.value.where
    with model.trace(x):
        saved = {name: model.output[name].save() for name in ("forces", "energy")}
    assert_same(saved, by_hand(plain, x, {}))


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
