"""Calls of several requests as one: the bits of each alone, and plain torch with hooks to 1e-5 in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from called_by_hand import first_of, first_tensor, plain_run
from model_kinds import DIFFUSION, KINDS, seeded
from programs import values_in_order
from torch import Tensor, nn

from engine.whole_local import WholeBackend
from polytrace.whole_model import WholeModel

Call = dict[str, Any]


def scale(tensor: Tensor) -> None:
    tensor[..., 0] += 3.0


def turn(tensor: Tensor) -> Tensor:
    return -0.5 * tensor


EDITS = (None, scale, turn)  # a read, an edit in place, an assignment


class Merging:
    """A module whose calls are merged where that is exact."""

    def __init__(self, plain: nn.Module, path: str) -> None:
        self.plain, self.path = plain, path
        self.backend = WholeBackend(plain, name="merging", merges=True)
        self.model: Any = WholeModel(self.backend)
        assert self.backend.shard.merging is not None
        self.groups = self.backend.shard.merging

    def run(self, calls: Sequence[tuple[Call, int]]) -> list[list[Tensor]]:
        """What each sees at the path and at the end, with the edit of its number; all at once."""
        tracers = []
        for call, number in calls:
            with self.model.trace(**call, run=False) as tracer:
                module = self.model.get_submodule(self.path)
                first_of(module.output).save()
                if number == 1:
                    first_of(module.output)[..., 0] += 3.0
                if number == 2:
                    self._assign(module)
                first_of(self.model.output).save()
            tracers.append(tracer)
        outcomes = self.backend.run_together([self.backend.compile(one.built_request()) for one in tracers])
        assert [outcome.error for outcome in outcomes] == [None] * len(calls)
        return [values_in_order(one, outcome.values) for one, outcome in zip(tracers, outcomes, strict=True)]

    def _assign(self, module: Any) -> None:
        if hasattr(module.output, "dtype"):
            module.output = -0.5 * module.output
        else:
            key = module.output.keys()[0]
            module.output[key] = -0.5 * module.output[key]

    def refusal(self) -> str | None:
        (verdict,) = self.groups.verdicts.values()
        return verdict.refusal

    def assert_by_hand(self, call: Call, number: int, got: Sequence[Any]) -> None:
        wanted = plain_run(self.plain, self.path, call, EDITS[number])
        for own, by_hand in zip(got, wanted, strict=True):
            bound = 1e-5 * max(1.0, by_hand.abs().max().item())
            assert (torch.as_tensor(own) - by_hand).abs().max() <= bound
        if number:
            assert (wanted[1] - plain_run(self.plain, self.path, call)[1]).abs().max() > 1e-3


def other_call(call: Call, seed: int) -> Call:
    """Of the same structure; integers are some of the call's own."""
    chance = torch.Generator().manual_seed(seed)

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=chance)
        return value.flatten()[torch.randperm(value.numel(), generator=chance)].reshape(value.shape)

    return {name: value if "mask" in name else other(value) for name, value in call.items()}


@pytest.mark.parametrize("kind", ["vit", "bert", "whisper", "t5", "dit"])
def test_three_interventions_beside_neighbours_are_those_of_hooks_with_the_bits_of_each_alone(kind: str) -> None:
    if kind in DIFFUSION:
        pytest.importorskip("diffusers")
    plain, path, call, _ = (KINDS | DIFFUSION)[kind]()
    merging = Merging(plain, path)
    calls = [(other_call(call, seed), seed % 3) for seed in range(5)]
    together = merging.run(calls)
    print(kind, merging.refusal(), [one.sizes for one in merging.groups.verdicts.values()], merging.groups.num_merged)
    for (one, number), got in zip(calls, together, strict=True):
        merging.assert_by_hand(one, number, got)
        (alone,) = merging.run([(one, number)])
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(alone, got, strict=True))
    assert merging.groups.num_merged == 5


class Plain(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 32), middle, nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.middle(self.first(x))))
        return out


def test_a_neighbour_without_a_number_changes_nothing() -> None:
    merging = Merging(seeded(lambda: Plain(nn.Linear(32, 32))), "middle")
    call, lost = {"x": torch.randn(3, 16)}, {"x": torch.full((3, 16), float("nan"))}
    beside, wrong = merging.run([(call, 1), (lost, 0)])
    assert merging.groups.num_merged == 2
    assert torch.as_tensor(wrong[1]).isnan().all()
    (alone,) = merging.run([(call, 1)])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(alone, beside, strict=True))
    merging.assert_by_hand(call, 1, beside)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.max() > 100 else 2 * x


def of_batches() -> nn.Module:
    norm = nn.BatchNorm1d(32, track_running_stats=False)
    return norm.train()


@pytest.mark.parametrize("middle", [Centred, of_batches, Choosing, lambda: nn.Dropout(0.5).train()])
def test_what_has_other_numbers_in_company_is_found_out_and_goes_as_it_is(middle: Callable[[], nn.Module]) -> None:
    plain = seeded(lambda: Plain(nn.Identity()))
    plain.middle = middle()
    merging = Merging(plain, "last")
    calls = [({"x": torch.randn(4, 16)}, number) for number in range(3)]
    together = merging.run(calls)
    assert merging.refusal() is not None
    assert merging.groups.num_merged == 0
    if not isinstance(plain.middle, nn.Dropout):
        for (call, number), got in zip(calls, together, strict=True):
            merging.assert_by_hand(call, number, got)


class Touchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Embedding(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_who_breaks_a_call_of_several_fails_alone() -> None:
    merging = Merging(seeded(Touchy), "inner")
    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 99]])
    tracers = []
    for x in (good, bad, good + 1):
        with merging.model.trace(x, run=False) as tracer:
            merging.model.output.save()
        tracers.append(tracer)
    backend = merging.backend
    first, second, third = backend.run_together([backend.compile(one.built_request()) for one in tracers])
    assert second.error is not None
    assert "index out of range" in str(second.error)
    for tracer, outcome, x in ((tracers[0], first, good), (tracers[2], third, good + 1)):
        assert outcome.error is None
        (got,) = values_in_order(tracer, outcome.values)
        with torch.no_grad():
            assert torch.equal(torch.as_tensor(got), first_tensor(merging.plain(x)))
