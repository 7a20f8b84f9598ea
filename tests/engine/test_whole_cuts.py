"""Where gradients of calls stop: in any container, in parts without gradients, and at values that were assigned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_kinds import seeded
from torch import Tensor, nn
from whole_gradients_by_hand import TOLERANCE

import polytrace
from polytrace.errors import RunError


def assert_close(ours: Any, wanted: Tensor | None) -> None:
    assert wanted is not None and wanted.abs().max() > 1e-2
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() <= TOLERANCE * max(1.0, float(wanted.abs().max()))


@dataclass(frozen=True)
class Answer:
    """What a model of one's own gives."""

    value: Tensor
    rest: Any


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.last = nn.Linear(4, 4), Middle(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Answer:
        middle = self.middle(self.embed(x))
        return Answer(self.last(middle.value).tanh(), {"all": [middle.rest[0].exp(), None]})


class Middle(nn.Module):
    def forward(self, hidden: Tensor) -> Answer:
        return Answer(hidden.sin(), [hidden * 2])


def test_gradients_of_members_of_dataclasses() -> None:
    plain: Any = seeded(Answering)
    x = torch.randn(3, 4)
    seen: dict[str, Tensor] = {}

    def hook(_module: nn.Module, _args: Any, output: Answer) -> Answer:
        seen["value"], seen["new"] = output.value, 0.5 * output.value
        seen["rest"] = output.rest[0].mul_(1.5)
        for tensor in seen.values():
            tensor.retain_grad()
        return Answer(seen["new"], output.rest)

    handle = plain.middle.register_forward_hook(hook)
    answer = plain(x)
    handle.remove()
    (answer.value.pow(2).sum() + answer.rest["all"][0].sum()).backward()
    plain.zero_grad()

    model: Any = polytrace.load(plain)
    with model.trace(x):
        value, rest = model.middle.output.value, model.middle.output.rest[0]
        rest *= 1.5
        new = 0.5 * value
        model.middle.output.value = new
        end = model.output
        (end.value.pow(2).sum() + end.rest["all"][0].sum()).backward()
        saved = {"value": value.grad.save(), "new": new.grad.save(), "rest": rest.grad.save()}
    for name, ours in saved.items():
        assert_close(ours, seen[name].grad)


class Frozen(nn.Module):
    """An encoder that runs without gradients, and what is made of it; `seen` gets a view of what the encoder gave."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.view = view
        self.encoder, self.seen, self.head = nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.encoder(x)
            part = self.seen(self.view(hidden))
        return self.head(hidden * 2) + part.sin().sum()


def test_gradients_of_what_is_made_without() -> None:
    plain: Any = seeded(lambda: Frozen(lambda hidden: hidden))
    x = torch.randn(3, 4)
    hidden = plain.encoder(x).detach().requires_grad_()
    (plain.head(hidden * 2) + hidden.sin().sum()).pow(2).sum().backward()
    plain.zero_grad()
    model: Any = polytrace.load(plain)
    with model.trace(x):
        read = model.encoder.output
        model.output.pow(2).sum().backward()
        gradient = read.grad.save()
    assert_close(gradient, hidden.grad)
    with model.trace(x):
        assigned = model.encoder.output * 1.0
        model.encoder.output = assigned
        model.output.pow(2).sum().backward()
        gradient = assigned.grad.save()
    assert_close(gradient, hidden.grad)
    vector = torch.zeros(8, requires_grad=True)
    with model.trace(x):
        model.encoder.output[:] += vector
        model.output.pow(2).sum().backward()
    assert hidden.grad is not None
    assert_close(vector.grad, hidden.grad.sum(0))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice": lambda hidden: hidden[:, :3],
    "another shape": lambda hidden: hidden.view(-1),
    "a part": lambda hidden: hidden.chunk(2, -1)[1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_what_is_made_without_gradients_share_theirs(view: str) -> None:
    plain: Any = seeded(lambda: Frozen(VIEWS[view]))
    x = torch.randn(3, 4)
    hidden = plain.encoder(x).detach().requires_grad_()
    (plain.head(hidden * 2) + VIEWS[view](hidden).sin().sum()).pow(2).sum().backward()
    plain.zero_grad()
    model: Any = polytrace.load(plain)
    with model.trace(x):
        part = model.seen.output
        model.output.pow(2).sum().backward()
        gradient = part.grad.save()
    assert hidden.grad is not None
    assert_close(gradient, VIEWS[view](hidden.grad))


class HalfFrozen(nn.Module):
    """A view without gradients of what has them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.seen, self.head = nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        with torch.no_grad():
            part = self.seen(hidden[:, :3])
        return self.head(hidden * 2) + part.sin().sum()


def test_a_view_without_gradients_cuts_off_nothing_that_has_them() -> None:
    model: Any = polytrace.load(seeded(HalfFrozen))
    with pytest.raises(RunError, match=r"a part of another that has gradients, taken under torch.no_grad\(\)"):  # noqa: SIM117
        with model.trace(torch.randn(3, 4)):
            hidden, part = model.encoder.output, model.seen.output
            model.output.pow(2).sum().backward()
            hidden.grad.save()
            part.grad.save()


class Parted(nn.Module):
    """Parts of one tensor, as adaptive norms give them, and one tensor's elements several times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.last = nn.Linear(4, 4), Norm(), nn.Linear(4, 4)
        self.spread, self.windows = Spread(), Windows()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        shift, gate, both = self.norm(hidden)
        hidden = torch.tanh(hidden + shift) * gate + both[:, 4:].exp()
        windows = self.windows(hidden) * torch.arange(1.0, 4.0)
        out: Tensor = self.last(hidden + self.spread(hidden)) + windows.sum((1, 2))[:, None]
        return out


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = self.linear(hidden)
        shift, gate = both.chunk(2, -1)
        return shift, gate, both


class Spread(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(0, keepdim=True).expand(len(hidden), -1)


class Windows(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.unfold(1, 3, 1)


def parted_by_hand(x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    plain: Any = seeded(Parted)
    seen: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> Tensor:
        tensor.retain_grad()
        seen[name] = tensor
        return tensor

    hooks = [
        plain.embed.register_forward_hook(lambda _m, _a, output: keep("embed", output)),
        plain.norm.register_forward_hook(
            lambda _m, _a, output: (keep("shift", 0.5 * output[0]), keep("gate", 2 * output[1]), output[2])
        ),
        plain.spread.register_forward_hook(lambda _m, _a, output: keep("spread", output * 1.0)),
        plain.windows.register_forward_hook(lambda _m, _a, output: keep("windows", output * 1.0)),
    ]
    plain(x).pow(2).sum().backward()
    for hook in hooks:
        hook.remove()
    plain.zero_grad()
    return plain, seen


def test_what_is_assigned_for_parts_and_repeated_elements_has_its_gradient() -> None:
    x = torch.randn(3, 4)
    plain, seen = parted_by_hand(x)
    model: Any = polytrace.load(plain)
    vector = torch.zeros(4, requires_grad=True)
    with model.trace(x):
        shift, gate = 0.5 * model.norm.output[0], 2 * model.norm.output[1] + vector
        model.norm.output[0], model.norm.output[1] = shift, gate
        spread, windows = model.spread.output * 1.0, model.windows.output * 1.0
        model.spread.output, model.windows.output = spread, windows
        model.output.pow(2).sum().backward()
        saved = {"shift": shift.grad.save(), "gate": gate.grad.save()}
        saved |= {"spread": spread.grad.save(), "windows": windows.grad.save()}
    for name, ours in saved.items():
        assert_close(ours, seen[name].grad)
    assert seen["gate"].grad is not None
    assert_close(vector.grad, seen["gate"].grad.sum(0))
    with model.trace(x):
        model.norm.output[0], model.norm.output[1] = [seen[name].detach() for name in ("shift", "gate")]
        again = model.norm.output[1]
        model.output.pow(2).sum().backward()
        gradient = again.grad.save()
    assert_close(gradient, seen["gate"].grad)


def test_assigning_to_parts_leaves_gradients_before_them_whole() -> None:
    x = torch.randn(3, 4)
    plain, seen = parted_by_hand(x)
    model: Any = polytrace.load(plain)
    with model.trace(x):
        embed = model.embed.output
        model.norm.output[0] = 0.5 * model.norm.output[0]
        model.norm.output[1] = gate = 2 * model.norm.output[1]
        model.spread.output = 1.0 * model.spread.output
        model.windows.output = 1.0 * model.windows.output
        model.output.pow(2).sum().backward()
        saved, ours = gate.grad.save(), embed.grad.save()
    assert_close(saved, seen["gate"].grad)
    assert_close(ours, seen["embed"].grad)


def test_a_loss_of_parts_goes_on_to_what_they_are_parts_of() -> None:
    plain: Any = seeded(Parted)
    x = torch.randn(3, 4)
    embed = plain.embed(x).detach().requires_grad_()
    shift, gate, both = plain.norm(embed)
    hidden = torch.tanh(embed + shift) * gate + both[:, 4:].exp()
    (shift.sin().sum() + gate.pow(2).sum() + plain.windows(hidden).pow(2).sum()).backward()
    plain.zero_grad()
    model: Any = polytrace.load(plain)
    with model.trace(x):
        read = model.embed.output
        loss = model.norm.output[0].sin().sum() + model.norm.output[1].pow(2).sum()
        (loss + model.windows.output.pow(2).sum()).backward()
        gradient = read.grad.save()
    assert_close(gradient, embed.grad)


@pytest.mark.parametrize("path", ["norm", "spread", "windows"])
def test_what_cannot_be_cut_for_all_says_to_assign(path: str) -> None:
    model: Any = polytrace.load(seeded(Parted))
    told = "one of several parts of another" if path == "norm" else "several elements that are one in memory"
    with pytest.raises(RunError, match=rf"{told}.*value = site \* 1\.0; site = value"), model.trace(torch.randn(3, 4)):
        module = model.get_submodule(path)
        part = module.output[1] if path == "norm" else module.output
        model.output.sum().backward()
        part.grad.save()


class Positions(nn.Module):
    """A parameter, once for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(len(x), -1)


def test_a_parameters_repeated_elements_have_gradients() -> None:
    positions, last = Positions(), nn.Linear(4, 2)
    plain = nn.Sequential(positions, last)
    x = torch.randn(3, 4)
    tensor = positions(x)
    tensor.retain_grad()
    last(tensor).pow(2).sum().backward()
    plain.zero_grad()
    model: Any = polytrace.load(plain)
    with model.trace(x):
        read = model[0].output
        model.output.pow(2).sum().backward()
        gradient = read.grad.save()
    assert_close(gradient, tensor.grad)
    assert positions.weight.grad is None


class Keeping(nn.Module):
    """Keeps a view that it goes on with."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.part, self.kept = nn.Linear(4, 16), Viewed(view), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        self.kept = self.part(hidden)
        made: Tensor = (self.kept**2).mean(-1)
        return made


class Viewed(nn.Module):
    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        return self.view(x)


@pytest.mark.parametrize(
    "view", [lambda x: x[:, :8], lambda x: x.view(-1, 8), lambda x: x.t(), lambda x: x.detach()[:, :8]]
)
def test_a_view_that_a_model_keeps_has_no_gradients_behind_the_call(view: Callable[[Tensor], Tensor]) -> None:
    plain, x = seeded(lambda: Keeping(view)), torch.randn(3, 4)
    model = polytrace.load(plain)
    with model.trace(x):
        part = model.part.output
        model.output.sum().backward()
        gradient = part.grad.save()
    kept = plain.kept
    assert not kept.requires_grad
    assert kept.grad_fn is None
    own = plain.part(plain.before(x)).detach().requires_grad_()
    assert torch.equal(torch.from_numpy(kept.numpy()), own)
    (own**2).mean(-1).sum().backward()
    assert own.grad is not None
    assert own.grad.abs().max() > 1e-2
    torch.testing.assert_close(gradient, own.grad)
