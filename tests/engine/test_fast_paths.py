"""What torch takes several operations in one for: a call's values do not depend on who looks, or on what came before.

The oracle is plain torch in its default mode, where gradients are on: there it goes operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from model_kinds import seeded
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import polytrace

CALL = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
PAD = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), nn.Linear(8, 3)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.encoder(x, src_key_padding_mask=pad))
        return out


pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def encoder() -> nn.Module:
    return seeded(Padded).eval()


def bound(is_merging: bool) -> float:
    return 1e-5 if is_merging else 0.0


@pytest.mark.parametrize("is_merging", [False, True])
def test_torchs_encoder_has_one_value_whoever_looks_and_whatever_came_before(*, is_merging: bool) -> None:
    plain = encoder()
    wanted = plain(CALL, PAD).detach()
    with torch.no_grad():
        assert (plain(CALL, PAD) - wanted).abs().max() > 0.1  # the fast path has zeros where the mask pads

    def close(ours: Tensor) -> bool:
        return float((ours - wanted).abs().max()) <= bound(is_merging)

    firsts = []
    for is_padded_first in (True, False):
        model = polytrace.load(plain, merges_calls=is_merging)
        if not is_padded_first:
            with model.trace(CALL):
                model.output.save()
        with model.trace(CALL, pad=PAD):
            firsts.append(model.output.save())
    assert torch.equal(*firsts)
    assert close(firsts[0])

    with model.trace(CALL, pad=PAD):
        model.encoder.layers[1].output.sum().save()
        looked = model.output.save()
    with model.trace(CALL, pad=PAD):
        hidden, out = model.head.input, model.output
        out.mean().backward()
        gradient, taped = hidden.grad.save(), out.save()
    with model.trace() as tracer:
        several = []
        for _ in range(3):
            with tracer.invoke(CALL, pad=PAD):
                several.append(model.output.save())
    assert tracer.receipt.passes[0].calls_merged == (3 if is_merging else 0)
    assert all(map(close, [looked, taped, *several]))
    assert torch.equal(looked, firsts[0])
    assert all(torch.equal(one, firsts[0]) for one in several)
    given = plain.encoder(CALL, src_key_padding_mask=PAD).detach().requires_grad_()
    plain.head(given).mean().backward()
    assert given.grad is not None
    assert torch.equal(gradient, given.grad)
    assert torch.backends.mha.get_fastpath_enabled() is True  # it is the user's again


@pytest.mark.parametrize("path", ["encoder.layers.0.self_attn", "encoder.layers.1", "encoder.layers.0.linear1"])
def test_every_site_of_torchs_encoder_is_that_of_a_hook(path: str) -> None:
    plain, seen = encoder(), []

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    with plain.get_submodule(path).register_forward_hook(hook):
        edited = plain(CALL, PAD).detach()
    assert (edited - plain(CALL, PAD)).abs().max() > 1e-3

    model = polytrace.load(plain)
    with model.trace(CALL, pad=PAD):
        module = model.get_submodule(path)
        if path.endswith("self_attn"):
            value = module.output[0].save()
            module.output[0] = value * 2
        else:
            value = module.output.save()
            module.output = value * 2
        out = model.output.save()
    assert torch.equal(value, seen[0])
    assert torch.equal(out, edited)


def test_a_module_that_is_called_on_a_value_is_the_same_with_a_gradient() -> None:
    plain = encoder()
    model = polytrace.load(plain)
    wanted = plain.encoder(CALL).detach()
    with torch.no_grad():
        assert not torch.equal(plain.encoder(CALL), wanted)
    with model.trace(CALL):
        early = model.encoder(model.input).save()
        model.output.save()
    with model.trace(CALL):
        given = model.input * 1.0
        late = model.encoder(given)
        late.sum().backward()
        gradient, late = given.grad.save(), late.save()
    by_hand = CALL.clone().requires_grad_()
    plain.encoder(by_hand).sum().backward()
    assert torch.equal(early, wanted)
    assert torch.equal(late, wanted)
    assert by_hand.grad is not None
    torch.testing.assert_close(gradient, by_hand.grad)


class Rounding(nn.Module):
    """Turns differences of rounding into others, where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor, *, rounds: bool) -> Tensor:
        x = self.inner(x).sin()
        return (x * 1e9).sin() if rounds else x


@pytest.mark.parametrize("is_rounding_first", [False, True])
def test_whether_calls_go_in_the_manner_is_told_by_their_own_structure(*, is_rounding_first: bool) -> None:
    plain = seeded(Rounding).eval()
    model = polytrace.load(plain, merges_calls=True)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    found: dict[bool, Tensor] = {}
    for rounds in (is_rounding_first, not is_rounding_first):
        with model.trace(x, rounds=rounds):
            found[rounds] = model.output.save()
    for rounds, ours in found.items():
        assert float((ours - plain(x, rounds=rounds).detach()).abs().max()) <= 1e-5
    with model.trace() as tracer:
        for _ in range(2):
            with tracer.invoke(x, rounds=False):
                beside = model.output.save()
    assert torch.equal(beside, found[False])
    assert tracer.receipt.passes[0].calls_merged == 2


class Setting(nn.Module):
    """Waits in its forward for what somebody else does meanwhile."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.act, self.encoder = act, encoder()

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        if not isinstance(x, FakeTensor):
            self.act()
        out: Tensor = self.encoder(x, pad)
        return out


def in_another_thread(act: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def test_what_other_threads_run_during_a_call_goes_as_it_did() -> None:
    plain, seen = encoder(), []

    def theirs() -> Tensor:
        with torch.no_grad():
            out: Tensor = plain(CALL, PAD)
        return out

    wanted = theirs()
    assert (wanted - plain(CALL, PAD)).abs().max() > 0.1
    model = polytrace.load(Setting(lambda: seen.append(in_another_thread(theirs))))
    with model.trace(CALL, PAD):
        ours = model.output.save()
    assert seen
    assert all(torch.equal(one, wanted) for one in seen)
    assert torch.equal(ours, plain(CALL, PAD))


@pytest.mark.parametrize("is_on", [False, True])
@pytest.mark.parametrize("where", [in_another_thread, lambda act: act()])
def test_what_is_set_during_a_call_stays(where: Callable[[Callable[[], Any]], Any], *, is_on: bool) -> None:
    usual = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(not is_on)
    try:
        model = polytrace.load(Setting(lambda: where(lambda: torch.backends.mha.set_fastpath_enabled(is_on))))
        with model.trace(CALL, PAD):
            model.output.save()
        assert torch.backends.mha.get_fastpath_enabled() is is_on
    finally:
        torch.backends.mha.set_fastpath_enabled(usual)
