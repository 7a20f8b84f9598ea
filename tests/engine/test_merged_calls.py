"""Calls of several requests as one: the bits of each alone, and plain torch with hooks to 1e-5 in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from called_by_hand import first_of, plain_run
from model_kinds import DIFFUSION, KINDS, seeded
from programs import values_in_order
from torch import Tensor, nn

from engine.whole_groups import CallGroups
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
        outcomes = self.backend.run_together([self.backend.work_out(one.built_request()) for one in tracers])
        assert [outcome.error for outcome in outcomes] == [None] * len(calls)
        self.outcomes = outcomes
        return [values_in_order(one, outcome.values) for one, outcome in zip(tracers, outcomes, strict=True)]

    def _assign(self, module: Any) -> None:
        if hasattr(module.output, "dtype"):
            module.output = -0.5 * module.output
        else:
            key = module.output.keys()[0]
            module.output[key] = -0.5 * module.output[key]

    @property
    def num_merged(self) -> list[int]:
        """Of each request that has run: the calls that were one with its own."""
        return [one.receipt.passes[0].calls_merged for one in self.outcomes if one.receipt is not None]

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


@pytest.mark.parametrize("kind", ["vit", "bert", "whisper", "t5", "bart", "mamba", "unet", "dit"])
def test_three_interventions_beside_neighbours_are_those_of_hooks_with_the_bits_of_each_alone(kind: str) -> None:
    if kind in DIFFUSION:
        pytest.importorskip("diffusers")
    plain, path, call, _ = (KINDS | DIFFUSION)[kind]()
    merging = Merging(plain, path)
    calls = [(other_call(call, seed), seed % 3) for seed in range(6)]
    together = merging.run(calls)
    assert merging.num_merged == [4, 4, 2, 4, 4, 2], merging.groups.verdicts  # who assigns is with who assigns there
    for (one, number), got in zip(calls, together, strict=True):
        merging.assert_by_hand(one, number, got)
        (alone,) = merging.run([(one, number)])
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(alone, got, strict=True))


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
    assert merging.num_merged == [2, 2]
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


class Least(nn.Module):
    """Goes by all of a batch, where it is far out."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.isinf().any(), x.clamp(-1, 1), x / x.abs().max().clamp(min=100.0))


class Rarely(nn.Module):
    """Goes by all of a batch for contents that no trial has."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.max() > 1e9, 0 * x, x)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("first", [NAN, INF, 1e9, 0.0])
@pytest.mark.parametrize("middle", [Centred, Least, Rarely])
def test_who_mixes_a_batch_is_found_out_whatever_the_first_call_has(
    middle: Callable[[], nn.Module], first: float
) -> None:
    plain = seeded(lambda: Plain(middle()))
    model, backend = merging_model(plain)
    calls = [torch.full((2, 16), first), torch.randn(2, 16), 300 * torch.randn(2, 16), 1e11 * torch.randn(2, 16)]
    tracers = [traced(model, x=calls[0])]
    outputs(backend, tracers, [0])
    tracers = [traced(model, x=x) for x in calls[1:]]
    for x, ours in zip(calls[1:], outputs(backend, tracers, [0, 0, 0]), strict=True):
        with torch.no_grad():
            close(ours, plain(x))


class OfIds(nn.Module):
    """Goes by the largest integer of a batch, or by its first."""

    def __init__(self, *, is_first: bool) -> None:
        super().__init__()
        self.inner, self.last, self._is_first = nn.Embedding(64, 16), nn.Linear(16, 4), is_first

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.last(self.inner(ids) - self.inner(ids[0, 0] if self._is_first else ids.max()))
        return out


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    "calls", [[[[3]], [[50]], [[9]]], [[[3, 5]], [[9, 7]], [[20, 60]]], [[[4, 3, 9, 9]], [[8, 7, 9, 1]]]]
)
def test_integers_that_decide_for_all_are_found_out(calls: list[Any], *, is_first: bool) -> None:
    plain = seeded(lambda: OfIds(is_first=is_first))
    model, backend = merging_model(plain)
    tracers = [traced(model, ids=torch.tensor(ids)) for ids in calls]
    for ids, ours in zip(calls, outputs(backend, tracers, [0] * len(calls)), strict=True):
        with torch.no_grad():
            close(ours, plain(torch.tensor(ids)))


class OfMany(nn.Module):
    """Mixes a batch only when it is a larger one."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0) if len(x) > 4 else x


def test_who_mixes_more_calls_is_trusted_with_those_that_are_proven() -> None:
    plain = seeded(lambda: Plain(OfMany()))
    model, backend = merging_model(plain)
    calls = [torch.randn(2, 16) for _ in range(3)]
    for number, num_merged in ((2, [2, 2]), (3, [2, 2, 0]), (2, [2, 2])):
        tracers = [traced(model, x=x) for x in calls[:number]]
        for x, ours in zip(calls, outputs(backend, tracers, num_merged), strict=False):
            with torch.no_grad():
                close(ours, plain(x))


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    Tensor.sigmoid,
    Tensor.tanh,
    nn.functional.elu,
    nn.functional.selu,
    nn.functional.softplus,
    nn.functional.mish,
    lambda x: (x.abs() + 0.1) ** 2.3,
    lambda x: (x.abs() + 0.1).pow(2.3),
]


class Activated(nn.Module):
    def __init__(self, width: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self._act = nn.Linear(8, width), act

    def forward(self, x: Tensor) -> Tensor:
        return self._act(self.first(x))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_functions_of_single_elements_have_the_bits_of_alone_whatever_their_number(
    act: Callable[[Tensor], Tensor],
) -> None:
    for width in (5, 24):
        plain = seeded(lambda width=width: Activated(width, act))  # type: ignore[misc]
        model, backend = merging_model(plain)
        for _ in range(3):
            calls = [3 * torch.randn(1, 8) for _ in range(8)]
            beside = outputs(backend, [traced(model, x=x) for x in calls], [8] * 8)
            for x, ours in zip(calls, beside, strict=True):
                (alone,) = outputs(backend, [traced(model, x=x)], [0])
                assert torch.equal(torch.as_tensor(alone), torch.as_tensor(ours))
                with torch.no_grad():
                    close(ours, plain(x))


class ActsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(8, 10), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).reshape(-1, 2, 5).transpose(1, 2)  # members are not contiguous
        return self.act(x) + x.sin()


def test_what_is_changed_in_place_member_by_member_is_still_one_tensor() -> None:
    plain = seeded(ActsInPlace)
    model, backend = merging_model(plain)
    calls, tracers = [torch.randn(3, 8) for _ in range(2)], []
    for x in calls:
        with model.trace(x, run=False) as tracer:
            model.act.output[:, 0] += 3
            model.output.save()
        tracers.append(tracer)
    for x, ours in zip(calls, outputs(backend, tracers, [2, 2]), strict=True):
        with torch.no_grad():
            acted = plain.act(plain.first(x).reshape(-1, 2, 5).transpose(1, 2))
            acted[:, 0] += 3
            close(ours, acted + acted.sin())


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
    if isinstance(plain.middle, (Centred, nn.BatchNorm1d)):  # what is before it is each call's own
        tracers = [traced_at(merging.model, "first", **call) for call, _ in calls]
        outputs(merging.backend, tracers, [3, 3, 3])
        together = merging.run(calls)
    assert merging.num_merged == [0, 0, 0]
    if not isinstance(plain.middle, nn.Dropout):
        for (call, number), got in zip(calls, together, strict=True):
            merging.assert_by_hand(call, number, got)


class Residual(nn.Module):
    """What comes into `inner` goes on beside it, so assigning it and changing it in place are not the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.inner(x)


def test_those_that_assign_at_one_visit_have_each_its_own_of_what_was_there_and_of_what_goes_on() -> None:
    plain = seeded(Residual)
    model, backend = merging_model(plain)
    calls = [torch.randn(2, 16) for _ in range(4)]
    tracers = []
    for number, x in enumerate(calls):
        with model.trace(x, run=False) as tracer:
            if number == 1:
                model.inner.input[:, 0] += 5  # of what goes on beside it too
            if number != 3:
                model.inner.input = 3 * model.inner.input
            if number != 1:
                model.inner.input[:, 0] += 1
            model.output.save()
        tracers.append(tracer)
    got = outputs(backend, tracers, [3, 3, 3, 0])
    for number, (x, ours) in enumerate(zip(calls, got, strict=True)):
        with torch.no_grad():
            kept = plain.first(x)
            if number == 1:
                kept[:, 0] += 5
            given = kept if number == 3 else 3 * kept
            given[:, 0] += number != 1
            close(ours, kept + plain.inner(given))


class Masked(nn.Module):
    """Goes by whether its mask has a hole, behind a module that hands it on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hands_on, self.last = nn.Linear(16, 16), nn.Identity(), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = self.first(x), self.hands_on(mask)
        out: Tensor = self.last(x if mask.all() else x * 2 * mask[:, None])
        return out


def test_who_writes_what_the_proof_goes_by_is_nobodys_neighbour() -> None:
    plain = seeded(Masked)
    model, backend = merging_model(plain)
    calls = [torch.randn(2, 16) for _ in range(3)]
    mask = torch.ones(2, dtype=torch.long)
    tracers = []
    for number, x in enumerate(calls):
        with model.trace(x=x, mask=mask, run=False) as tracer:
            if number == 1:
                model.hands_on.output[1] = 0
            model.output.save()
        tracers.append(tracer)
    got = outputs(backend, tracers, [2, 0, 2])
    for number, (x, ours) in enumerate(zip(calls, got, strict=True)):
        with torch.no_grad():
            close(ours, plain(x, torch.tensor([1, 1 - (number == 1)])))


class OfPart(Masked):
    """Hands a part of its mask on: a view."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.first(x)
        self.hands_on(mask[:, :1])
        out: Tensor = self.last(x if mask.all() else -x)
        return out


def test_who_writes_to_a_view_of_what_the_proof_goes_by_is_nobodys_neighbour() -> None:
    plain = seeded(OfPart)
    model, backend = merging_model(plain)
    calls = [torch.randn(2, 16) for _ in range(3)]
    tracers = []
    for number, x in enumerate(calls):
        with model.trace(x=x, mask=torch.ones(2, 3, dtype=torch.long), run=False) as tracer:
            if number == 1:
                model.hands_on.output[:] = 0
            model.output.save()
        tracers.append(tracer)
    for number, (x, ours) in enumerate(zip(calls, outputs(backend, tracers, [2, 0, 2]), strict=True)):
        with torch.no_grad():
            close(ours, plain.last(plain.first(x) * (-1 if number == 1 else 1)))


class OfData(nn.Module):
    """Changes what it keeps without torch's counting it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(16, 16), nn.Buffer(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.data += 1
        out: Tensor = self.inner(x) * self.calls
        return out


def test_a_model_that_changes_its_data_goes_one_by_one() -> None:
    plain = seeded(OfData)
    model, backend = merging_model(plain)
    calls = [torch.randn(2, 16) for _ in range(2)]
    got = outputs(backend, [traced(model, x=x) for x in calls], [0, 0])
    for number, (x, ours) in enumerate(zip(calls, got, strict=True)):
        with torch.no_grad():
            close(ours, (number + 1) * plain.inner(x))


class Settling(nn.Module):
    """Sets something at its first call, as models do that begin to capture what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.is_set = nn.Linear(16, 16), False

    def forward(self, x: Tensor) -> Tensor:
        self.is_set = True
        out: Tensor = self.inner(x)
        return out


def test_a_model_that_sets_something_once_is_merged_when_it_has() -> None:
    plain = seeded(Settling)
    backend = WholeBackend(plain, name="settling", merges=True)
    model: Any = WholeModel(backend)
    for num_merged in ([0, 0], [2, 2]):
        calls = [torch.randn(2, 16) for _ in range(2)]
        for x, ours in zip(calls, outputs(backend, [traced(model, x=x) for x in calls], num_merged), strict=True):
            with torch.no_grad():
                close(ours, plain(x))


class Growing(nn.Module):
    """Keeps the largest size so far, which is no matter to its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.cached = nn.Linear(37, 53), nn.Linear(53, 29), 0

    def forward(self, x: Tensor) -> Tensor:
        self.cached = max(self.cached, x.shape[1])
        out: Tensor = self.last(torch.tanh(self.first(x)))
        return out


class Naming(Growing):
    """Sets something else at each content."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.cached = float(x.sum())
        return out


class Counting(Growing):
    """Sets something else at each call."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.cached += 1
        return out


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("kind", [Growing, Naming, Counting])
def test_a_call_that_changes_settings_has_the_same_bits_each_time(kind: type[Growing], *, is_fixed: bool) -> None:
    plain, x = seeded(kind), torch.randn(1, 3, 37)
    model, backend = merging_model(plain)
    backend.shard.merging = CallGroups(plain, is_fixed=is_fixed)
    found: list[Any] = []
    for number in range(6):
        found += outputs(backend, [traced(model, x=x)], [0])
        outputs(backend, [traced(model, x=torch.randn(1, 3, 37))], [0])
        if not number:
            settings = plain.cached
    assert settings  # what trials have set is taken back, what calls set is not
    assert all(torch.equal(one, found[0]) for one in found)
    with torch.no_grad():
        close(found[0], plain(x))


class InPlace(nn.Module):
    """Its inner module changes what comes in, which goes on beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(16, 16), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + 2 * self.inner(x)


def test_a_neighbours_assignment_leaves_alone_what_others_have_of_the_same_tensor_elsewhere() -> None:
    plain, _, call, _ = KINDS["bert"]()
    model, backend = merging_model(plain)
    attention = model.encoder.layer[0].attention.self
    tracers = []
    for number in range(3):
        with model.trace(**other_call(call, number), run=False) as tracer:
            if number == 0:
                attention.input = 1.0 * attention.input
            else:
                attention.query.input[:, :, 0] += 3
            model.output.last_hidden_state.save()
        tracers.append(tracer)
    for number, ours in enumerate(outputs(backend, tracers, [0, 2, 2])):
        where = "encoder.layer.0.attention.self.query"
        hook = plain.get_submodule(where).register_forward_pre_hook(
            lambda _, args, number=number: scale(args[0]) if number else None  # type: ignore[misc]
        )
        with hook, torch.no_grad():
            close(ours, plain(**other_call(call, number)).last_hidden_state)
    plain = seeded(InPlace)
    model, backend = merging_model(plain)
    calls = [torch.randn(2, 16) for _ in range(3)]
    tracers = []
    for number, x in enumerate(calls):
        with model.trace(x, run=False) as tracer:
            if number == 0:
                model.inner.input = 2 * model.inner.input
            model.output.save()
        tracers.append(tracer)
    for x, ours in list(zip(calls, outputs(backend, tracers, [0, 2, 2]), strict=True))[1:]:
        with torch.no_grad():
            close(ours, plain(x))


class Spread(nn.Module):
    """What its inner module gives is one memory for all members of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.inner, self.last = nn.Parameter(torch.ones(1, 16)), nn.Identity(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(x + self.inner((2 * self.query).expand(len(x), -1)))
        return out


def test_members_that_are_one_in_memory_are_not_changed_beside_others() -> None:
    plain = seeded(Spread)
    model, backend = merging_model(plain)
    calls = [torch.randn(1, 16) for _ in range(3)]
    tracers = []
    for number, x in enumerate(calls):
        with model.trace(x, run=False) as tracer:
            if number == 0:
                model.inner.output[:, 0] += 3
            model.output.save()
        tracers.append(tracer)
    for number, (x, ours) in enumerate(zip(calls, outputs(backend, tracers, [0, 2, 2]), strict=True)):
        with torch.no_grad():
            given = 2 * plain.query
            given[:, 0] += 3 * (number == 0)
            close(ours, plain.last(x + given))


class Touchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Embedding(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.inner(x))
        return out


def test_who_breaks_a_call_of_several_fails_alone() -> None:
    plain = seeded(Touchy)
    model, backend = merging_model(plain)
    good, bad = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 99]])
    with model.trace(bad, run=False) as tracer:  # the first of its structure says nothing of others
        model.output.save()
    (broken,) = backend.run_together([backend.work_out(tracer.built_request())])
    assert broken.error is not None
    tracers = []
    for x in (good, bad, good + 1):
        with model.trace(x, run=False) as tracer:
            model.inner.output.save()
            model.output.save()
        tracers.append(tracer)
    first, second, third = backend.run_together([backend.work_out(one.built_request()) for one in tracers])
    assert second.error is not None
    assert "index out of range" in str(second.error)
    assert [one.refusal for one in backend.shard.merging.verdicts.values()] == [None]  # type: ignore[union-attr]
    for tracer, outcome, x in ((tracers[0], first, good), (tracers[2], third, good + 1)):
        assert outcome.error is None
        assert outcome.receipt is not None
        assert len(outcome.receipt.fired) == 2
        with torch.no_grad():
            close(values_in_order(tracer, outcome.values)[1], plain(x))


def test_calls_of_one_trace_are_one_call_also_where_values_go_from_one_to_the_next() -> None:
    plain, path, _, _ = KINDS["vit"]()
    model, _ = merging_model(plain)
    images = [torch.randn(1, 3, 8, 8) for _ in range(6)]
    with model.trace() as tracer:
        saved, given = [], None
        for number, image in enumerate(images):
            with tracer.invoke(pixel_values=image):
                layer = model.get_submodule(path)
                if number in (1, 4):
                    layer.output[:, 1] = given[:, 1]
                given = layer.output
                saved.append((given.mean().save(), model.output.logits.save()))
    assert tracer.receipt.passes[0].calls_merged == 6
    theirs = None
    for number, image in enumerate(images):

        def edit(tensor: Tensor, number: int = number, theirs: Any = theirs) -> None:
            if number in (1, 4):
                tensor[:, 1] = theirs[:, 1]

        seen, wanted = plain_run(plain, path, {"pixel_values": image}, edit)
        if number in (1, 4):
            seen = seen.clone()
            seen[:, 1] = theirs[:, 1]
            assert (wanted - plain_run(plain, path, {"pixel_values": image})[1]).abs().max() > 1e-3
        theirs = seen
        close(saved[number][0], seen.mean())
        close(saved[number][1], wanted)


def test_later_waves_of_several_requests_are_one_call_too() -> None:
    plain, _, _, _ = KINDS["vit"]()
    model, backend = merging_model(plain)
    pairs = [(torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)) for _ in range(3)]
    tracers = []
    for clean, corrupt in pairs:
        with model.trace(run=False) as tracer:
            with tracer.invoke(pixel_values=clean):
                late = model.vit.layers[1].output[:, 0]
            with tracer.invoke(pixel_values=corrupt):
                model.vit.layers[0].output[:, 0] = late
                model.output.logits.save()
        tracers.append(tracer)
    outcomes = backend.run_together([backend.work_out(one.built_request()) for one in tracers])
    for (clean, corrupt), tracer, outcome in zip(pairs, tracers, outcomes, strict=True):
        assert outcome.receipt is not None
        assert [entry.calls_merged for entry in outcome.receipt.passes] == [6, 3]  # what is changed is read before
        late, _ = plain_run(plain, "vit.layers.1", {"pixel_values": clean})

        def put(tensor: Tensor, late: Tensor = late) -> None:
            tensor[:, 0] = late[:, 0]

        _, wanted = plain_run(plain, "vit.layers.0", {"pixel_values": corrupt}, put)
        close(values_in_order(tracer, outcome.values)[0], wanted)


def test_calls_of_other_shapes_go_with_their_like_and_gradients_alone() -> None:
    plain = seeded(lambda: Plain(nn.Linear(32, 32)))
    model, backend = merging_model(plain)
    calls = [torch.randn(rows, 16) for rows in (1, 2, 1, 2, 1)]
    tracers = []
    for x in calls:
        with model.trace(x, run=False) as tracer:
            model.middle.output[:, 0] += 1
            model.output.save()
        tracers.append(tracer)
    with model.trace(calls[0], run=False) as tracer:
        hidden = model.middle.output
        model.output.sum().backward()
        hidden.grad.save()
    outcomes = backend.run_together([backend.work_out(one.built_request()) for one in [*tracers, tracer]])
    assert [one.error for one in outcomes] == [None] * 6
    assert [one.receipt.passes[0].calls_merged for one in outcomes] == [3, 2, 3, 2, 3, 0]
    with torch.no_grad():
        for x, one, outcome in zip(calls, tracers, outcomes, strict=False):
            middle = plain.middle(plain.first(x))
            middle[:, 0] += 1
            close(values_in_order(one, outcome.values)[0], plain.last(torch.tanh(middle)))


def test_a_mask_of_ones_is_not_put_beside_one_with_holes() -> None:
    plain, _, call, _ = KINDS["bert"]()
    model, backend = merging_model(plain)
    masks = [torch.ones(2, 5, dtype=torch.long), call["attention_mask"], torch.ones(2, 5, dtype=torch.long)]
    tracers = []
    for mask in masks:
        with model.trace(input_ids=call["input_ids"], attention_mask=mask, run=False) as tracer:
            model.output.last_hidden_state.save()
        tracers.append(tracer)
    outcomes = backend.run_together([backend.work_out(one.built_request()) for one in tracers])
    assert [one.receipt.passes[0].calls_merged for one in outcomes] == [2, 0, 2]
    for mask, tracer, outcome in zip(masks, tracers, outcomes, strict=True):
        with torch.no_grad():
            wanted = plain(input_ids=call["input_ids"], attention_mask=mask).last_hidden_state
        close(values_in_order(tracer, outcome.values)[0], wanted)


def test_what_is_of_all_calls_together_is_read_alone() -> None:
    plain, _, call, _ = KINDS["clip"]()
    model, backend = merging_model(plain)
    for name, num_merged in (("image_embeds", 2), ("logits_per_image", 0)):
        tracers = []
        for seed in range(2):
            with model.trace(**other_call(call, seed), run=False) as tracer:
                model.output[name].save()
            tracers.append(tracer)
        outcomes = backend.run_together([backend.work_out(one.built_request()) for one in tracers])
        assert [one.receipt.passes[0].calls_merged for one in outcomes] == [num_merged] * 2
        for seed, (tracer, outcome) in enumerate(zip(tracers, outcomes, strict=True)):
            with torch.no_grad():
                wanted = plain(**other_call(call, seed))[name]
            close(values_in_order(tracer, outcome.values)[0], wanted)


def merging_model(plain: nn.Module) -> tuple[Any, WholeBackend]:
    backend = WholeBackend(plain, name="merging", merges=True)
    return WholeModel(backend), backend


class Remembering(nn.Module):
    """Goes by the calls that were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.counts = nn.Linear(16, 16), [], {"calls": 0}
        self.last: Tensor | None = None
        self.sum = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        self.counts["calls"] += 1
        self.sum += 1
        out: Tensor = self.inner(x) * len(self.calls) + self.sum
        self.last, out = out.clone(), out if self.last is None else out + self.last
        return out


def test_a_trial_leaves_no_trace_in_a_module_that_remembers() -> None:
    plain, served = seeded(Remembering), seeded(Remembering)
    model, backend = merging_model(served)
    for _ in range(3):
        x = torch.randn(2, 16)
        (ours,) = outputs(backend, [traced(model, x=x)], [0])
        with torch.no_grad():
            close(ours, plain(x))
    assert (served.calls, served.counts, served.sum) == ([2, 2, 2], {"calls": 3}, 3)


class Set(nn.Module):
    """Mixes a batch where that was set."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.settings = nn.Linear(16, 16), {"is_mixing": False}

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x - x.mean(0) if self.settings["is_mixing"] else x


def set_hook(plain: Any) -> None:
    plain.inner.register_forward_hook(lambda _module, _args, output: output - output.mean(0))


def set_forward(plain: Any) -> None:
    plain.inner.forward = lambda x: x - x.mean(0)


def set_member(plain: Any) -> None:
    plain.settings["is_mixing"] = True


@pytest.mark.parametrize("change", [set_hook, set_forward, set_member])
def test_what_is_set_on_a_model_later_is_tried_again(change: Callable[[Any], None]) -> None:
    plain = seeded(Set)
    model, backend = merging_model(plain)
    calls = [torch.randn(2, 16) for _ in range(2)]
    for num_merged in ([2, 2], [0, 0]):
        tracers = [traced(model, x=x) for x in calls]
        for x, ours in zip(calls, outputs(backend, tracers, num_merged), strict=True):
            with torch.no_grad():
                close(ours, plain(x))
        if num_merged[0]:
            change(plain)


def traced(model: Any, **call: Any) -> Any:
    with model.trace(**call, run=False) as tracer:
        model.output.save()
    return tracer


def traced_at(model: Any, path: str, **call: Any) -> Any:
    with model.trace(**call, run=False) as tracer:
        model.get_submodule(path).output.save()
    return tracer


def outputs(backend: WholeBackend, tracers: Sequence[Any], num_merged: Sequence[int]) -> list[Any]:
    outcomes = backend.run_together([backend.work_out(one.built_request()) for one in tracers])
    assert [one.error for one in outcomes] == [None] * len(tracers)
    assert [one.receipt.passes[0].calls_merged for one in outcomes if one.receipt] == num_merged
    return [values_in_order(one, outcome.values)[0] for one, outcome in zip(tracers, outcomes, strict=True)]


def close(ours: Any, plain: Tensor) -> None:
    assert float((torch.as_tensor(ours) - plain).abs().max()) <= 1e-5 * max(1.0, float(plain.abs().max()))


def test_a_call_that_nobody_waits_beside_costs_no_proof_and_has_the_bits_of_later() -> None:
    plain, _, call, _ = KINDS["vit"]()
    model, backend = merging_model(plain)
    ran: list[Tensor] = []
    with plain.register_forward_hook(lambda _module, _args, output: ran.append(output.logits)):
        (first,) = outputs(backend, [traced(model, **call)], [0])
        with_data = [one for one in ran if type(one) is Tensor]  # the others say what a call visits
        assert len(with_data) == 3  # in that manner, as it is, and the call itself
        outputs(backend, [traced(model, pixel_values=call["pixel_values"] + 1)], [0])
        assert len([one for one in ran if type(one) is Tensor]) == 4
    others = [traced(model, **other_call(call, seed)) for seed in range(2)]
    beside = outputs(backend, [traced(model, **call), *others], [3, 3, 3])
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(beside[0]))
