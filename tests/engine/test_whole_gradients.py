"""Gradients of models that are called as they are, against plain autograd with hooks. float32, 1e-6 of the largest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from called_by_hand import first_of, first_tensor, with_first
from model_kinds import KINDS, Looped, seeded
from torch import Tensor, nn
from whole_gradients_by_hand import TOLERANCE, plain_gradients, weights_of

import polytrace
from polytrace.errors import GraphError, PolytraceError, RunError


def assert_close(ours: Any, wanted: Any) -> None:
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_what_a_module_gets_and_returns(kind: str) -> None:
    plain, path, call, _ = KINDS[kind]()

    def change(tensor: Tensor) -> None:
        tensor[..., 0] = 2 * tensor[..., 0] + 0.3

    result, wanted = plain_gradients(plain, path, call, change, 0.5, (1, 2))
    plain.zero_grad()
    trained = [parameter.requires_grad for parameter in plain.parameters()]
    model = polytrace.load(plain)
    module = model.get_submodule(path)
    with model.trace(**call):
        got, own = module.input, first_of(module.output)
        own[..., 0] = 2 * own[..., 0] + 0.3
        end = first_of(model.output)
        saved = []
        for seed in (1, 2):
            with (end * weights_of(result, seed)).sum().backward():
                saved.append((got.grad.save(), own.grad.clone().save()))
                own.grad *= 0.5
        ended = end.save()
    assert torch.equal(ended, result)
    for ours, theirs in zip(saved, wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert other.abs().max() > 1e-3
            assert_close(one, other)
    assert not torch.equal(saved[0][0], saved[1][0])
    assert any(trained) and [parameter.requires_grad for parameter in plain.parameters()] == trained
    assert all(parameter.grad is None for parameter in plain.parameters())


@pytest.mark.parametrize("kind", ["module", "bert", "vit", "whisper"])
def test_gradients_flow_from_call_to_call(kind: str) -> None:
    plain, path, call, other = KINDS[kind]()
    seen: dict[str, Tensor] = {}
    scale = torch.tensor(0.5, requires_grad=True)

    def run(given: Any, name: str, change: Callable[[Tensor], Tensor] | None) -> Tensor:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if name in seen:
                return None
            seen[name] = first_tensor(output)
            seen[name].retain_grad()
            return None if change is None else with_first(output, change(seen[name]))

        handle = plain.get_submodule(path).register_forward_hook(hook)
        try:
            return first_tensor(plain(**given))
        finally:
            handle.remove()

    theirs = run(other, "their", None)
    result = run(call, "own", lambda tensor: 0.5 * tensor + scale * seen["their"])
    weights, more = weights_of(result, 1), weights_of(theirs, 2)
    ((result * weights).sum() + (theirs * more).sum()).backward()
    plain.zero_grad()

    model = polytrace.load(plain)
    module = model.get_submodule(path)
    factor = torch.tensor(0.5, requires_grad=True)
    with model.trace() as tracer:
        with tracer.invoke(**other):
            given = first_of(module.output)
            loss = (first_of(model.output) * more).sum()
        with tracer.invoke(**call):
            own = first_of(module.output)
            new = 0.5 * own + factor * given
            if hasattr(module.output, "dtype"):
                module.output = new
            else:
                module.output[module.output.keys()[0]] = new
            loss = loss + (first_of(model.output) * weights).sum()
        ours = torch.autograd.grad(loss, [given, own, factor])
        saved = [one.save() for one in ours]
    assert scale.grad is not None
    for one, wanted in zip(saved, [seen["their"].grad, seen["own"].grad, scale.grad], strict=True):
        assert wanted is not None and wanted.abs().max() > 1e-3
        assert_close(one, wanted)


def test_calls_that_take_values_from_each_other_are_run_back_together() -> None:
    plain = seeded(Looped)
    one, two = torch.randn(3, 4), torch.randn(3, 4)

    def step(hidden: Tensor) -> Tensor:
        return torch.tanh(plain.shared(hidden))

    first = [plain.shared(torch.relu(plain.first(x))) for x in (one, two)]
    for tensor in first:
        tensor.retain_grad()
    second = [plain.shared(torch.tanh(tensor)) for tensor in first]
    second = [second[0] + first[1], second[1] * first[0]]
    wanted = sum(plain.last(step(torch.tanh(tensor))).pow(2).sum() for tensor in second)
    wanted.backward()
    plain.zero_grad()

    model = polytrace.load(plain)
    shared = model.shared
    with model.trace() as tracer:
        with tracer.invoke(one):
            mine = shared.output
        with tracer.invoke(two):
            yours = shared.output
            shared.visits[1].output *= mine
            loss = model.output["y"].pow(2).sum()
        with tracer.invoke(one):
            again = shared.output
            shared.visits[1].output += yours
            total = loss + model.output["y"].pow(2).sum()
        total.backward()
        saved = [(mine.grad + again.grad).save(), yours.grad.save(), total.save()]
    assert_close(saved[2], wanted.detach())
    for ours, tensor in zip(saved, first, strict=False):
        assert_close(ours, tensor.grad)


def test_calls_in_step_are_run_back_in_step() -> None:
    plain = seeded(Looped)
    one, two = torch.randn(3, 4), torch.randn(3, 4)
    first = [plain.shared(torch.relu(plain.first(x))) for x in (one, two)]
    for tensor in first:
        tensor.retain_grad()
    second = [plain.shared(torch.tanh(tensor)) for tensor in first]
    second = [second[0] + first[1], second[1] * first[0]]
    sum(plain.last(torch.tanh(plain.shared(torch.tanh(tensor)))).pow(2).sum() for tensor in second).backward()
    plain.zero_grad()

    model = polytrace.load(plain)
    shared = model.shared
    with model.trace() as tracer:
        mine, yours = tracer.invoke(one), tracer.invoke(two)
        with mine:
            a = shared.output
        with yours:
            b = shared.output
            shared.visits[1].output *= a
            loss = model.output["y"].pow(2).sum()
        with mine:
            shared.visits[1].output += b
            loss = loss + model.output["y"].pow(2).sum()
        loss.backward()
        saved = [a.grad.save(), b.grad.save()]
    for ours, tensor in zip(saved, first, strict=True):
        assert_close(ours, tensor.grad)


def test_a_vector_is_learnt_within_one_request() -> None:
    plain = seeded(Looped)
    x = torch.randn(3, 4)
    vector, losses = torch.zeros(8), []
    for _ in range(4):
        vector.requires_grad_()
        handle = plain.first.register_forward_hook(lambda _m, _a, output: output + vector)  # noqa: B023
        loss = (plain(x)["y"] - 1).pow(2).sum()
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, vector)
        losses.append(loss.detach())
        vector = (vector - 0.05 * gradient).detach()

    model = polytrace.load(plain)
    with model.trace() as tracer:
        ours, told = torch.zeros(8, requires_grad=True), []
        for _ in range(4):
            with tracer.invoke(x):
                model.first.output += ours
                loss = (model.output["y"] - 1).pow(2).sum()
                (gradient,) = torch.autograd.grad(loss, ours)
                ours = (ours - 0.05 * gradient).detach()
                told.append(loss.save())
        learnt = ours.save()
    assert losses[-1] < losses[0]
    assert_close(learnt, vector)
    for one, other in zip(told, losses, strict=True):
        assert_close(one, other)


class Views(nn.Module):
    """Modules that give views of what others hold, parts of one tensor, and what they keep."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.flat, self.part, self.last = nn.Linear(4, 8), nn.Identity(), nn.Identity(), nn.Linear(8, 2)
        self.table = torch.arange(8.0)
        self.positions, self.several = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(x) + self.positions(self.table)
        column = hidden[:, :1]
        flat = self.flat(hidden.view(-1))  # a view, while `hidden` goes on
        self.part(hidden)
        both = torch.tanh(hidden) * column + flat.view(3, 8)
        left, right = self.several(both.chunk(2, -1))
        return self.last(torch.cat([left, right], -1)), both.exp()


def test_a_tensor_and_its_views_share_their_gradients() -> None:
    plain = seeded(Views)
    x = torch.randn(3, 4)
    seen: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            output.mul_(1.5) if name == "flat" else None
            seen[name] = output
            output.register_hook(lambda gradient: grads.__setitem__(name, gradient))

        return keep

    handles = [plain.get_submodule(name).register_forward_hook(hook(name)) for name in ("embed", "flat", "part")]
    result = plain(x)[0]
    result.pow(2).sum().backward()
    for handle in handles:
        handle.remove()
    plain.zero_grad()

    model = polytrace.load(plain)
    with model.trace(x):
        embed, flat = model.embed.output, model.flat.output
        flat *= 1.5
        part = model.part.output
        end = model.output[0]
        end.pow(2).sum().backward()
        ours = {"embed": embed.grad.save(), "flat": flat.grad.save(), "part": part.grad.save()}
        ended = end.save()
    assert torch.equal(ended, result)
    for name, wanted in grads.items():
        if name != "flat":  # torch's hook hears what comes through that view alone
            assert_close(ours[name], wanted)
    assert_close(ours["flat"], grads["part"].view(-1))


def test_what_a_module_keeps_stays_as_it_is() -> None:
    plain = seeded(Views)
    x = torch.randn(3, 4)
    table = plain.table.clone().requires_grad_()
    plain.table = table
    plain(x)[0].pow(2).sum().backward()
    plain.zero_grad()
    plain.table = table.detach()
    model = polytrace.load(plain)
    with model.trace(x):
        positions = model.positions.output
        model.output[0].pow(2).sum().backward()
        ours = positions.grad.save()
    assert_close(ours, table.grad)
    assert not plain.table.requires_grad and plain.table.grad_fn is None


def test_parts_of_one_tensor_are_refused_with_the_way_out() -> None:
    model = polytrace.load(seeded(Views))
    with pytest.raises(RunError, match="one of several parts of another"), model.trace(torch.randn(3, 4)):
        left = model.several.output[0]
        model.output[0].sum().backward()
        left.grad.save()


class Tied(nn.Module):
    """A module that hands on its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def test_weights_that_are_handed_on_stay_weights() -> None:
    inner = Tied()
    plain = nn.Sequential(inner, nn.Tanh())
    model = polytrace.load(plain)
    with model.trace(torch.randn(4)):
        own = model[0].output
        model.output.sum().backward()
        ours = own.grad.save()
    assert_close(ours, 1 - torch.tanh(inner.weight.detach()) ** 2)
    assert inner.weight.is_leaf and inner.weight.requires_grad and inner.weight.grad is None


def test_what_has_no_gradient_is_refused() -> None:
    plain, _, call, _ = KINDS["bert"]()
    model = polytrace.load(plain)
    with pytest.raises(GraphError, match="float"), model.trace(**call):
        ids = model.embeddings.word_embeddings.input
        model.output[0].sum().backward()
        ids.grad.save()
    with pytest.raises(PolytraceError, match="weight"), model.trace(**call):
        weight = model.pooler.dense.weight
        model.output[0].sum().backward()
        weight.grad.save()


class Ungraded(nn.Module):
    """A model of which a part runs without gradients, one overwrites what its gradient needs, and one does neither."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, how: str) -> Tensor:
        hidden = torch.exp(self.first(x))
        if how == "overwrites":
            hidden.add_(1.0)
        elif how == "stops":
            with torch.no_grad():
                return self.last(hidden)
        return self.last(hidden)


@pytest.mark.parametrize(
    ("how", "told"), [("stops", "nothing of the loss comes back"), ("overwrites", "changes a tensor in place")]
)
def test_a_model_that_has_no_gradients_is_told_so(how: str, told: str) -> None:
    plain = seeded(Ungraded)
    model = polytrace.load(plain)
    x, vector = torch.randn(3, 4), torch.zeros(8, requires_grad=True)
    with pytest.raises(RunError, match=told) as caught, model.trace(x, how):
        first = model.first.output
        model.output.sum().backward()
        first.grad.save()
    assert caught.value.where is not None and "test_whole_gradients.py" in caught.value.where
    with pytest.raises(RunError, match=told), model.trace(x, how):
        model.first.output += vector
        model.output.sum().backward()  # its end fills `vector.grad`
    assert vector.grad is None
    with model.trace(x, "neither"):
        first = model.first.output
        model.output.sum().backward()
        ours = first.grad.save()
    assert_close(ours, (torch.exp(plain.first(x)) * plain.last.weight.sum(0)).detach())


def test_a_failed_call_leaves_the_next_one_right() -> None:
    plain, path, call, _ = KINDS["bert"]()
    model = polytrace.load(plain)
    module = model.get_submodule(path)

    def gradient(spoil: bool) -> Tensor:
        with model.trace(**call):
            own = first_of(module.output)
            if spoil:
                torch.linalg.cholesky(-torch.eye(2)[None] * own[0, 0, 0].abs()).sum().save()
            (first_of(model.output) ** 2).sum().backward()
            saved: Any = own.grad.save()
        return saved

    before = gradient(False)
    with pytest.raises(RunError, match="cholesky"):
        gradient(True)
    assert torch.equal(gradient(False), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


def test_a_weight_of_the_users_module_gets_no_part_of_a_gradient() -> None:
    module = nn.Linear(2, 2)
    model: Any = polytrace.load(module)
    for weight in (module.weight, module.weight.T, 2 * module.weight):
        with pytest.raises(GraphError, match=r"comes from, weight of the model.*\(test_whole_gradients.py:\d+\)"):  # noqa: SIM117
            with model.trace(torch.ones(1, 2)):
                (model.output @ weight).sum().backward()
    assert module.weight.grad is None
    own = module.weight.detach().clone().requires_grad_()
    with model.trace(torch.ones(1, 2)):
        (model.output @ own).sum().backward()
    wanted = module(torch.ones(1, 2)).detach().T.expand(2, 2)
    torch.testing.assert_close(own.grad, wanted)
