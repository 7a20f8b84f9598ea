"""Models that are called as they are, and what they have beside weights: settings, buffers, chance, tensors in
attributes; and what they return beside tensors and tuples.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polytrace
from engine.whole_sites import CallSites
from polytrace.errors import GraphError, RunError, TooLargeError
from polytrace.graph import Given, Inputs, Port
from polytrace.tensors import RawTensor


class Held(nn.Module):
    """Calls one function, whatever it is, as a module of its own."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Behind(nn.Module):
    """A module, and something made of what it returns."""

    def __init__(self, inner: nn.Module, end: Any) -> None:
        super().__init__()
        self.inner, self.end = inner, end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.inner(x))


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps, self.linear = 2, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = self.linear(x)
        return x


def test_settings_that_change_after_loading_are_those_of_the_next_call() -> None:
    plain, x = Steps(), torch.ones(2, 3)
    model = polytrace.load(plain)
    with model.trace(x):
        assert len(model.linear.visits) == 2
        model.output.save()
    plain.steps = 4
    plain.double()
    with model.trace(x.double()):
        assert len(model.linear.visits) == 4
        last = model.linear.visits[-1].output.save()
        result = model.output.save()
    with torch.no_grad():
        assert torch.equal(last, plain(x.double()))
    assert torch.equal(last, result)


class Choosing(nn.Module):
    """What it calls depends on values; it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.calls = nn.BatchNorm1d(3), nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = nn.functional.dropout(self.norm(x))
        return self.linear(x) if float(x.sum()) < 1e6 else x


def test_a_call_that_finds_the_sites_leaves_the_model_as_it_was() -> None:
    plain, x = Choosing(), torch.randn(4, 3)
    other = copy.deepcopy(plain)
    torch.manual_seed(1)
    with torch.no_grad():
        wanted = other(x)
    model = polytrace.load(plain)
    torch.manual_seed(1)
    with model.trace(x):
        hidden = model.norm.output.save()
        result = model.output.save()
    assert torch.equal(result, wanted)
    assert hidden.shape == (4, 3)
    assert plain.calls == other.calls == 1
    for own, theirs in zip(plain.norm.buffers(), other.norm.buffers(), strict=True):
        assert torch.equal(own, theirs)


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(5, 3)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        return self.table[: len(x)]


def test_tensors_that_a_model_keeps_are_not_changed_in_place() -> None:
    kept = Keeping()
    model = polytrace.load(Behind(kept, lambda hidden: hidden + 1))
    with (
        pytest.raises(GraphError, match="another tensor that it keeps: write `site = value`"),
        model.trace(torch.ones(2)),
    ):
        model.inner.output[0] += 5
        model.output.save()
    table = torch.zeros(5, 3)
    other = Held(lambda x: table[: len(x)])  # the same table, also in a copy of the module
    other.table = table
    behind = polytrace.load(Behind(other, lambda hidden: hidden + 1))
    with pytest.raises(RunError, match="the model keeps this tensor behind the call"), behind.trace(torch.ones(2)):
        behind.inner.output[0] += 5
        behind.output.save()
    assert not table.any()
    with model.trace(torch.ones(2)):
        model.inner.output = model.inner.output + 5
        result = model.output.save()
    assert torch.equal(result, torch.full((2, 3), 6.0))
    assert not kept.table.any()


def test_weights_that_are_made_of_others_are_no_obstacle() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 3)))
    x = torch.ones(2, 3)
    with torch.no_grad():
        wanted = plain(x)
    model = polytrace.load(plain)
    with model.trace(x):
        result = model[0].output.save()
    assert torch.equal(result, wanted)


def test_windows_that_overlap_in_memory_are_written_whole() -> None:
    """In place, what one window gets is another's too, which a copy of all of them would lose."""
    plain, x = Behind(Held(lambda x: (x * 1).unfold(0, 3, 1)), lambda windows: windows.sum(1)), torch.arange(6.0)
    model = polytrace.load(plain)
    with pytest.raises(GraphError, match="several of its elements are one in memory"), model.trace(x):
        model.inner.output[0] += 10
        model.output.save()
    with model.trace(x):
        windows = model.inner.output.clone()
        windows[0] += 10
        model.inner.output = windows
        result = model.output.save()
    assert result.tolist() == [33.0, 6.0, 9.0, 12.0]
    transposed = Behind(Held(lambda x: (x * 1).reshape(2, 3).T), lambda hidden: hidden.sum(0))
    model = polytrace.load(transposed)
    with model.trace(x):
        model.inner.output[0] += 10
        result = model.output.save()
    assert result.tolist() == [13.0, 22.0]


@dataclasses.dataclass(frozen=True)
class Found:
    hidden: Tensor
    parts: tuple[Tensor, ...]
    count: int = 1


def test_dataclasses_and_what_torch_returns_are_read_and_written() -> None:
    inner = Held(lambda x: Found(hidden=2 * x, parts=(x + 1, x - 1)))
    plain = Behind(inner, lambda found: found.hidden + found.parts[1] * found.count)
    model = polytrace.load(plain)
    with model.trace(torch.ones(2)):
        hidden = model.inner.output.hidden.save()
        model.inner.output.hidden = 10 * model.inner.output.hidden
        model.inner.output.parts[1] += 5
        result = model.output.save()
    assert hidden.tolist() == [2.0, 2.0]
    assert result.tolist() == [25.0, 25.0]

    model = polytrace.load(Behind(Held(lambda x: x.max(dim=0)), lambda found: found.values + found.indices))
    with model.trace(torch.tensor([1.0, 4.0])):
        model.inner.output[0] = 3 * model.inner.output[0]
        result = model.output.save()
    assert float(result) == 13.0


def test_what_cannot_be_is_said() -> None:
    here = r"\(test_module_state.py:\d+\)"
    with pytest.raises(GraphError, match=r"0\.weight has no shape yet: call the module once"):
        polytrace.load(nn.Sequential(nn.LazyLinear(3)))

    shared = Behind(nn.Linear(3, 3), None)
    shared.end = shared.inner
    model = polytrace.load(shared)
    with (
        pytest.raises(GraphError, match=rf"has no end: it is a module that has another path, too.*{here}"),
        model.trace(torch.ones(3)),
    ):
        model.end.output.save()
    model = polytrace.load(
        Behind(Held(lambda x: x.to_sparse() if type(x) is Tensor else x), lambda found: found.to_dense())
    )
    with (
        pytest.raises(RunError, match=rf"the tensor here is a nested or sparse one.*{here}"),
        model.trace(torch.ones(2, 2)),
    ):
        model.inner.output.save()


class Looking(nn.Module):
    """Looks at integers, and makes much of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, numbers: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for _ in range(int(numbers[0])):
            x = self.linear(x)
        return x, numbers[:, None] == numbers[None, :], torch.repeat_interleave(counts, counts)


def test_what_is_too_large_is_refused_before_memory_is_taken_for_it() -> None:
    with torch.device("meta"):
        sites = CallSites(Looking(), 1 << 28)

    def found(numbers: Tensor, counts: Tensor) -> int:
        tensors = {"x": torch.ones(1, 2), "numbers": numbers, "counts": counts}
        constants = {name: raw_of(tensor) for name, tensor in tensors.items()}
        inputs = Inputs(args=(), kwargs={name: Given(name) for name in tensors})
        return sum(site.module == "linear" and site.port is Port.OUTPUT for site in sites.of(inputs, constants))

    assert found(torch.tensor([3, 1]), torch.tensor([2, 1])) == 3
    with pytest.raises(TooLargeError, match=r"makes a tensor of 10000000000000 integers"):
        found(torch.tensor([3, 1]), torch.tensor([10_000_000_000_000]))
    with pytest.raises(TooLargeError, match=r"makes a tensor of 1000000000000 bytes \(\[1000000, 1000000\]\)"):
        found(torch.ones(1_000_000, dtype=torch.int64), torch.tensor([2, 1]))


def raw_of(tensor: Tensor) -> RawTensor:
    data = memoryview(tensor.numpy().tobytes())
    return RawTensor(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), data=data)
