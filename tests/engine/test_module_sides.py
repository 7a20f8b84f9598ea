"""What modules of any model take and give beside tensors, and modules by name: as plain torch has them, or refused."""

from __future__ import annotations

import copy
import pickle
from collections import deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model_kinds import seeded
from torch import Tensor, nn

import polytrace
from polytrace.errors import GraphError, RunError

CALL = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
Pair = namedtuple("Pair", "left right")


@dataclass
class Out:
    first: Tensor
    more: Any
    count: int


class Inner(nn.Module):
    """Gives one of several things, of which its caller takes a tensor."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.linear(x))


class Outer(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any], take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner, self.take = Inner(make), take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.inner(x)) * 2


def loaded(make: Callable[[Tensor], Any], take: Callable[[Any], Tensor]) -> tuple[nn.Module, Any]:
    plain = seeded(lambda: Outer(make, take)).eval()
    return plain, polytrace.load(plain)


def hooked(plain: nn.Module, change: Callable[[Any], Any]) -> Tensor:
    """What a plain model gives where its inner module's output is changed."""
    with plain.get_submodule("inner").register_forward_hook(lambda _module, _args, output: change(output)):
        out: Tensor = plain(CALL).detach()
    return out


@pytest.mark.parametrize("kind", ["namedtuple", "max"])
def test_a_namedtuple_has_its_names_and_places(kind: str) -> None:
    """Also those that operations of torch give."""
    names, make, take = {
        "namedtuple": (("left", "right"), lambda h: Pair(h, h * 2), lambda pair: pair.left + pair.right),
        "max": (("values", "indices"), lambda h: h.max(-1), lambda found: found.values + found.indices),
    }[kind]
    plain, model = loaded(make, take)  # type: ignore[arg-type]
    inner: Any = plain.get_submodule("inner")
    wanted = inner(CALL)

    def change(pair: Any) -> Any:
        members = [getattr(pair, names[0]) * 3, pair[1]]
        return Pair(*members) if kind == "namedtuple" else type(pair)(members)

    with model.trace(CALL):
        output = model.inner.output
        first, second = getattr(output, names[0]).save(), output[1].save()
        whole = output.save()
        setattr(output, names[0], getattr(output, names[0]) * 3)
        assert len(output) == 2
        assert names[0] in dir(output)
        edited = model.output.save()
        with pytest.raises(GraphError, match=f"has no 'middle'; it has '{names[0]}', '{names[1]}'"):
            output.middle  # noqa: B018
    assert torch.equal(first, wanted[0])
    assert torch.equal(second, wanted[1])
    assert torch.equal(getattr(whole, names[0]), wanted[0])
    for again in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole)):  # noqa: S301  our own bytes
        assert again._fields == whole._fields and type(again).__name__ == type(whole).__name__
        assert torch.equal(again[0], wanted[0]) and torch.equal(again[1], wanted[1])
    assert torch.equal(edited, hooked(plain, change))
    assert (edited - plain(CALL)).abs().max() > 1e-3


def test_none_is_none_and_what_is_no_tensor_says_so() -> None:
    plain, model = loaded(
        lambda h: [h, None, "text", {"a": None, "b": (5, h * 2)}], lambda out: out[0] + out[3]["b"][1]
    )
    with model.trace(CALL):
        first, nothing, text, more = model.inner.output
        assert nothing is None
        assert model.inner.output[1] is None
        assert more["a"] is None
        number, second = more["b"]
        for use in (
            lambda: text + "s",
            lambda: text.upper(),
            lambda: text == "text",
            lambda: bool(text),
            lambda: [*text],
        ):
            with pytest.raises(GraphError, match=r"inner\.output\[2\] is a str, which is no tensor"):
                use()
        with pytest.raises(GraphError, match=r"inner\.output\[3\]\.b\[0\] is an int, which is no tensor"):
            first * number
        model.inner.output = [first * 3, nothing, text, more]
        saved, second, edited = model.inner.output.save(), second.save(), model.output.save()
    wanted = plain.get_submodule("inner")(CALL)
    assert torch.equal(second, wanted[3]["b"][1])
    assert torch.equal(saved[0], wanted[0] * 3)
    assert saved[1:3] == (None, None)
    assert torch.equal(edited, hooked(plain, lambda out: [out[0] * 3, *out[1:]]))


def test_a_dataclass_is_told_by_its_class() -> None:
    _, model = loaded(lambda h: Out(h, [h * 2, None], 3), lambda out: out.first + out.more[0])
    with model.trace(CALL):
        with pytest.raises(GraphError, match=r"inner\.output is an Out: write one of inner\.output\.first, inner"):
            model.inner.output = model.inner.output
        with pytest.raises(GraphError, match=r"inner\.output is an Out, no value"):
            model.inner.output + 1
        with pytest.raises(GraphError, match=r"inner\.output\.count is an int, and has no tensor to be written"):
            model.inner.output.count = CALL
        with pytest.raises(GraphError, match=r"inner\.output\.more is a list or tuple: write one of inner"):
            model.inner.output.more = CALL
        assert repr(model.inner.output) == "<inner.output: Out with 'first', 'more', 'count'>"
        assert model.inner.output.more[1] is None
        model.output.save()


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    ("make", "take", "told"),
    [
        (lambda h: deque([h]), lambda out: out[0], "a deque, which is not looked into"),
        (Held, lambda out: out.tensor, "a Held, which is not looked into"),
        (lambda h: (one for one in (h, h)), sum, "a generator, which is not looked into"),
        (lambda _h: None, lambda _out: torch.ones(2), "None"),
        (lambda _h: 3.0, lambda out: torch.ones(2) * out, "a float, which is no tensor"),
        (lambda _h: [1, 2], lambda out: torch.ones(2) * out[0], "a list without tensors"),
    ],
)
def test_what_is_not_looked_into_is_told_with_the_reason(
    make: Callable[[Tensor], Any], take: Callable[[Any], Tensor], told: str
) -> None:
    plain, model = loaded(make, take)
    with (
        pytest.raises(GraphError, match=f"inner has no output: in this model's forward it gives {told}"),
        model.trace(CALL),
    ):
        model.inner.output.save()
    with model.trace(CALL):
        inside, out = model.inner.linear.output.save(), model.output.save()
    assert torch.equal(inside, plain.get_submodule("inner.linear")(CALL))
    assert torch.equal(out, plain(CALL))


class Twice(nn.Module):
    """Its inner module gives no tensor at first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner(lambda h: None if h is None else h)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.make = lambda _h: None
        self.inner(x)
        self.inner.make = lambda h: h
        out: Tensor = self.inner(x * 2)
        return out


def test_a_visit_without_a_tensor_counts() -> None:
    plain = seeded(Twice).eval()
    model = polytrace.load(plain)
    with model.trace(CALL):
        assert len(model.inner.visits) == 2
        second = model.inner.visits[1].output.save()
        with pytest.raises(GraphError, match=r"inner has no output: in this model's forward it gives None"):
            model.inner.output  # noqa: B018
    assert torch.equal(second, plain(CALL))


class Functional(nn.Module):
    """Takes a gradient in its forward by `torch.func`, and maps over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.energy, self.rows = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.goes_down = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.goes_down:
            x = x - 0.1 * torch.func.grad(lambda own: self.energy(own).pow(2).sum())(x)
        mapped: Tensor = torch.vmap(self.rows)(x)
        return mapped


@pytest.mark.parametrize("is_merging", [False, True])
def test_a_model_with_transforms_of_torch_func_inside_is_traced_around_them(*, is_merging: bool) -> None:
    plain = seeded(Functional).eval()
    model = polytrace.load(plain, merges_calls=is_merging)
    with model.trace(CALL):
        hidden = model.first.output
        hidden += 1.0
        kept, edited = hidden.save(), model.output.save()
    with plain.get_submodule("first").register_forward_hook(lambda _module, _args, output: output + 1.0):
        wanted = plain(CALL).detach()
    torch.testing.assert_close(edited, wanted, rtol=0, atol=1e-5 if is_merging else 0)
    torch.testing.assert_close(kept, plain.get_submodule("first")(CALL) + 1.0, rtol=0, atol=1e-5 if is_merging else 0)
    assert (wanted - plain(CALL)).abs().max() > 0.1
    for path in ("energy", "rows"):
        told = rf"{path} has no output: .* a \w+, which is a tensor inside of torch\.func or torch\.vmap"
        with pytest.raises(GraphError, match=told), model.trace(CALL):
            model.get_submodule(path).output.save()
    with pytest.raises(RunError, match=r"torch\.func\..* saved tensor hooks"), model.trace(CALL):
        model.output.sum().backward()
        model.first.output.grad.save()


def test_a_gradient_goes_through_a_module_that_is_mapped_over_rows() -> None:
    plain: Any = seeded(Functional).eval()
    plain.goes_down = False
    model = polytrace.load(plain)
    with model.trace(CALL):
        hidden = model.first.output
        model.output.pow(2).sum().backward()
        gradient = hidden.grad.save()
    by_hand: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        by_hand.append(output)

    with plain.first.register_forward_hook(keep):
        plain(CALL).pow(2).sum().backward()
    assert by_hand[0].grad is not None
    torch.testing.assert_close(gradient, by_hand[0].grad)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"1": nn.Linear(4, 4), "10": nn.Linear(4, 4), "x y": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.parts["x y"](self.parts["10"](self.parts["1"](x)))
        return out


def test_a_module_dict_has_its_names_also_where_these_are_numbers() -> None:
    plain = seeded(Named).eval()
    model = polytrace.load(plain)
    parts: Any = plain.get_submodule("parts")
    assert model.parts.keys() == list(parts.keys()) == list(model.parts)
    assert [name for name, _ in model.parts.items()] == list(parts)
    assert list(model.parts.values()) == [model.parts[name] for name in parts]
    assert len(model.parts) == 3
    assert "10" in model.parts
    assert "0" not in model.parts
    assert "keys" in dir(model.parts)
    with model.trace(CALL):
        value = model.parts["10"].output
        value *= 2.0
        value, out = value.save(), model.output.save()
    wanted = parts["10"](parts["1"](CALL)) * 2
    assert torch.equal(value, wanted)
    assert torch.equal(out, parts["x y"](wanted))
    for key in (0, 1, 10, -1, "2"):
        with pytest.raises(KeyError):
            parts[key]
        with pytest.raises(KeyError, match=r"parts \(ModuleDict\) has no \["):
            model.parts[key]
    with pytest.raises(GraphError, match="it is a dict of modules"), model.trace(CALL):
        model.parts(model.output)
    listed = polytrace.load(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert listed[1].get_submodule("") == listed[1]


class Taking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, where: Any, steps: Any, device: Any) -> Tensor:
        assert isinstance(device, torch.device)
        for step in steps:
            x = x + step
        x = x + torch.ones(4, device=device)
        out: Tensor = self.inner(x[where])
        return out


def test_slices_ranges_and_devices_are_arguments() -> None:
    plain = seeded(Taking).eval()
    model = polytrace.load(plain)
    outs = []
    for call in [(slice(0, 2), range(3), torch.device("cpu")), (slice(None, None, 2), range(1), torch.device("cpu"))]:
        with model.trace(CALL, *call):
            outs.append(model.output.save())
        assert torch.equal(outs[-1], plain(CALL, *call))
    assert not torch.equal(*outs)
    told = r"argument 1 is a slice: a call takes tensors, arrays, numbers, [\w, ]+ of integers \("
    with pytest.raises(GraphError, match=told):  # and no word of a processor, which it has not
        model.trace(CALL, slice("a", "b"), range(1), torch.device("cpu"))
