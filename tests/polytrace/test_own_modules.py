"""Users' own modules and functions called on recorded values record themselves and give what they give on tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from small import small_llama
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import polytrace
from polytrace.errors import GraphError
from polytrace.graph import Constant

IDS = [3, 17, 42, 5, 9, 30, 11]
D = 32


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    return small_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(plain: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("llama")
    plain.save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as loaded:
        yield loaded


def read(plain: LlamaForCausalLM) -> Tensor:
    """The first layer's output, by a hook."""
    seen: list[Tensor] = []
    handle = plain.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        plain(torch.tensor([IDS]))
    handle.remove()
    return seen[0]


def logits_with(plain: LlamaForCausalLM, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """The logits when the first layer's output is edited, by a hook."""
    handle = plain.model.layers[0].register_forward_hook(lambda module, args, output: edit(output))
    with torch.no_grad():
        logits: Tensor = plain(torch.tensor([IDS])).logits
    handle.remove()
    return logits


def agree(got: Tensor, expected: Tensor) -> None:
    """float32, max|a-b| <= 1e-5 max(1, max|b|)."""
    assert got.dtype is expected.dtype and got.shape == expected.shape
    assert float((got - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


class SparseAutoencoder(nn.Module):
    """As in SAE libraries: a pre-bias, top-k activations, unit decoder rows."""

    def __init__(self, width: int, features: int, k: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(width, features) / width**0.5)
        self.W_dec = nn.Parameter(functional.normalize(torch.randn(features, width), dim=-1))
        self.b_enc = nn.Parameter(torch.randn(features) * 0.1)
        self.b_dec = nn.Parameter(torch.randn(width) * 0.1)
        self.k = k

    def encode(self, x: Tensor) -> Tensor:
        latents = functional.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        values, indices = latents.topk(self.k, dim=-1)
        return torch.zeros_like(latents).scatter_(-1, indices, values)

    def decode(self, latents: Tensor) -> Tensor:
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class JumpReLU(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > self.threshold).to(x.dtype)


class Adapter(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(D, rank, bias=False), nn.Linear(rank, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.B(self.A(x)) * 2.0


class Rotated(nn.Module):
    """An intervention in a subspace, as in distributed alignment search: an orthogonal parametrisation."""

    def __init__(self) -> None:
        super().__init__()
        self.rotate = nn.utils.parametrizations.orthogonal(nn.Linear(D, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.rotate(x) @ self.rotate.weight


class OneHead(nn.Module):
    """Attention by hand, with einsum, a mask and an in-place softmax bias."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = torch.einsum("bqd,bkd->bqk", q, k) / D**0.5
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores.masked_fill_(causal, float("-inf"))
        return scores.softmax(dim=-1) @ v


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(D, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.AvgPool1d(2), nn.Flatten(1)
        )

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x.transpose(1, 2))
        return made


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    found: dict[str, nn.Module] = {
        "probe": nn.Linear(D, 3),
        "mlp": nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, D)),
        "in place": nn.Sequential(nn.Linear(D, 16), nn.ReLU(inplace=True), nn.Linear(16, 4), nn.SiLU(inplace=True)),
        "sae": SparseAutoencoder(D, 64, 5),
        "jump relu": nn.Sequential(nn.Linear(D, 16), JumpReLU(16)),
        "adapter": Adapter(4),
        "rotated": Rotated(),
        "head": OneHead(),
        "convolved": Convolved(),
        "norms": nn.Sequential(nn.RMSNorm(D), nn.GroupNorm(1, len(IDS)), nn.Softmax(dim=-1), nn.Softplus()),
        "bilinear": nn.Sequential(nn.Linear(D, 8), nn.Unflatten(-1, (2, 4)), nn.Flatten(-2), nn.PReLU(), nn.GLU()),
        "activations": nn.Sequential(nn.ELU(), nn.LeakyReLU(), nn.Hardtanh(), nn.Mish(), nn.Tanhshrink(), nn.Sigmoid()),
        "gru by hand": nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 8), nn.LogSoftmax(dim=-1)),
    }
    return {name: module.eval() for name, module in found.items()}


@pytest.mark.parametrize("name", modules())
def test_a_module_on_a_recorded_value_is_the_module(model: Any, plain: LlamaForCausalLM, name: str) -> None:
    module = modules()[name]
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        out = module(hidden)
        assert isinstance(out, Tensor)
        shape = out.shape
        out = out.save()
    with torch.no_grad():
        expected = module(read(plain).clone())
    agree(out, expected)
    assert shape == expected.shape


def test_an_autoencoder_in_the_stream_changes_the_logits_as_a_hook_does(model: Any, plain: LlamaForCausalLM) -> None:
    sae = modules()["sae"]
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[0].output[0]
        latents = sae.encode(hidden)
        latents[..., 7] = 3.0
        model.model.layers[0].output[0][:] = sae.decode(latents)
        logits = model.lm_head.output.save()

    def edit(output: Tensor) -> Tensor:
        latents = sae.encode(output)
        latents[..., 7] = 3.0
        decoded: Tensor = sae.decode(latents)
        return decoded

    expected = logits_with(plain, edit)
    agree(logits, expected)
    assert float((expected - logits_with(plain, lambda output: output)).abs().max()) > 0.1
    weights = [node for node in tracer.request.graph.nodes if isinstance(node, Constant)]
    assert len(weights) == 4  # each once, b_dec is used twice


def test_multihead_attention_records_itself(model: Any, plain: LlamaForCausalLM) -> None:
    torch.manual_seed(2)
    attention = nn.MultiheadAttention(D, 4, batch_first=True).eval()
    mask = torch.ones(len(IDS), len(IDS), dtype=torch.bool).triu(1)
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        out, weights = attention(hidden, hidden, hidden)
        masked, none = attention(
            hidden, hidden[:, :3], hidden[:, :3], attn_mask=mask[:, :3] & False, need_weights=False
        )
        causal, heads = attention(hidden, hidden, hidden, attn_mask=mask, average_attn_weights=False)
        out, weights, masked, causal, heads = (value.save() for value in (out, weights, masked, causal, heads))
    assert none is None
    with torch.no_grad():
        hidden = read(plain)
        expected = attention(hidden, hidden, hidden)
        agree(out, expected[0])
        agree(weights, expected[1])
        agree(masked, attention(hidden, hidden[:, :3], hidden[:, :3])[0])
        own = attention(hidden, hidden, hidden, attn_mask=mask, average_attn_weights=False)
        agree(causal, own[0])
        agree(heads, own[1])


def test_dropout_in_training_mode_draws_from_the_seed(model: Any) -> None:
    layer = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.25, inplace=True))

    def run(seed: int) -> Tensor:
        with model.trace(IDS, seed=seed):
            out = layer(torch.ones_like(model.model.layers[0].output[0])).save()
        result: Tensor = out
        return result

    first = run(0)
    assert torch.equal(first, run(0)) and not torch.equal(first, run(1))
    assert {round(value, 4) for value in first.unique().tolist()} == {0.0, round(2 / 0.75, 4)}


def test_a_batch_norm_in_training_mode_is_refused_with_what_to_do(model: Any) -> None:
    with (
        pytest.raises(GraphError, match=r"training mode changes its running statistics: call module\.eval\(\) first"),
        model.trace(IDS),
    ):
        nn.BatchNorm1d(len(IDS))(model.model.layers[0].output[0]).save()


# --- constants


def test_tensors_arrays_and_numbers_of_any_kind_are_constants(model: Any, plain: LlamaForCausalLM) -> None:
    weight = nn.Parameter(torch.randn(D, D))
    array = np.random.default_rng(0).normal(size=(D,)).astype(np.float32)
    strided = torch.randn(D, 2 * D)[:, ::2]
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        out = [
            (hidden @ weight).save(),
            (weight.T @ hidden.mT).save(),
            (hidden * array).save(),
            (array + hidden).save(),
            (hidden * np.float32(1.5)).save(),
            (hidden + np.float64(0.25)).save(),
            (hidden * np.int64(2)).save(),
            (hidden @ strided).save(),
            (hidden @ weight.expand(2, D, D)[1]).save(),
            hidden[..., np.array([1, 4])].save(),
            hidden[:, [0, -1]].save(),
            hidden[torch.tensor([0]), torch.tensor([2])].save(),
            torch.where(hidden > 0, hidden, torch.zeros(1)).save(),
            (hidden + torch.ones(1, dtype=torch.float64)).save(),
            (hidden.half() * torch.ones(D, dtype=torch.bfloat16)).save(),
        ]
    with torch.no_grad():
        hidden = read(plain)
        vector = torch.from_numpy(array)
        expected = [
            hidden @ weight,
            weight.T @ hidden.mT,
            hidden * vector,
            vector + hidden,
            hidden * 1.5,
            hidden + 0.25,
            hidden * 2,
            hidden @ strided,
            hidden @ weight,
            hidden[..., [1, 4]],
            hidden[:, [0, -1]],
            hidden[torch.tensor([0]), torch.tensor([2])],
            torch.where(hidden > 0, hidden, torch.zeros(1)),
            hidden + torch.ones(1, dtype=torch.float64),
            hidden.half() * torch.ones(D, dtype=torch.bfloat16),
        ]
    for place, (got, wanted) in enumerate(zip(out, expected, strict=True)):
        try:
            agree(got, wanted)
        except AssertionError as error:
            raise AssertionError(f"number {place}: {got.dtype}, {wanted.dtype}") from error


def test_a_weight_that_changes_between_two_uses_is_used_as_it_was_each_time(
    model: Any, plain: LlamaForCausalLM
) -> None:
    weight = nn.Parameter(torch.ones(D))
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        first = (hidden * weight).save()
        with torch.no_grad():
            weight.mul_(2)
        second = (hidden * weight).save()
    for factor, value in ((1, first), (2, second)):
        agree(value, read(plain) * factor)


def test_a_change_that_torch_does_not_count_is_refused_and_not_missed(model: Any) -> None:
    weight = nn.Parameter(torch.ones(D))
    with pytest.raises(GraphError, match=r"changed through \.data") as caught, model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        (hidden * weight).save()
        weight.data.mul_(2)
        (hidden * weight).save()
    assert caught.value.where is not None and caught.value.where.startswith("test_own_modules.py")


def test_masks_and_top_k_indices_select_as_written_in_practice(model: Any, plain: LlamaForCausalLM) -> None:
    def program(h: Tensor) -> list[Tensor]:
        top = h.topk(5, dim=-1)
        best = h[0, -1].topk(3).indices
        kept = torch.zeros_like(h).scatter(-1, top.indices, top.values)
        return [
            h.gather(-1, top.indices),
            torch.take_along_dim(h, top.indices[..., :2], dim=-1),
            h[..., best],
            h[:, :, best[0]],
            torch.index_select(h, -1, best),
            kept,
            torch.where(h > h.mean(-1, keepdim=True), h, 0.0),
            h * (h > 0),
            h.masked_fill(h < 0, float("-inf")).logsumexp(-1),
            h.clone().index_fill_(-1, best, 0.0),
            h.sort(descending=True).values[..., :4],
            (h.abs() > 1).sum(dim=-1),
            h[0, h[0].norm(dim=-1).argmax()],
            h.flatten(0, 1)[torch.tensor([True] * 3 + [False] * 4)],
        ]

    with model.trace(IDS):
        saved = [value.save() for value in program(model.model.layers[0].output[0] * 1)]
    with torch.no_grad():
        for got, expected in zip(saved, program(read(plain)), strict=True):
            if got.is_floating_point():
                agree(got, expected)
            else:
                assert torch.equal(got, expected)


def test_complex_values_live_between_ops_and_are_refused_at_the_end(model: Any, plain: LlamaForCausalLM) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        spectrum = torch.fft.rfft(hidden, dim=-1)
        assert spectrum.is_complex() and spectrum.dtype is torch.complex64
        parts = spectrum.real.save(), spectrum.imag.save(), spectrum.abs().save()
        low = spectrum * (torch.arange(spectrum.shape[-1]) < 4)
        smooth = torch.fft.irfft(low, n=D, dim=-1).save()
    with torch.no_grad():
        expected = torch.fft.rfft(read(plain), dim=-1)
        for got, wanted in zip(parts, (expected.real, expected.imag, expected.abs()), strict=True):
            agree(got, wanted)
        agree(smooth, torch.fft.irfft(expected * (torch.arange(expected.shape[-1]) < 4), n=D, dim=-1))
    with pytest.raises(GraphError, match=r"complex values do not travel: save \.real and \.imag"), model.trace(IDS):
        torch.fft.rfft(model.model.layers[0].output[0]).save()
    with pytest.raises(GraphError, match=r"complex64 cannot be part of a trace"), model.trace(IDS):
        (model.model.layers[0].output[0] * torch.ones(D, dtype=torch.complex64)).real.save()


def test_dropout_of_features_is_nothing_in_evaluation_and_refused_in_training(
    model: Any, plain: LlamaForCausalLM
) -> None:
    layer = nn.Dropout1d(0.5)
    with model.trace(IDS):
        out = layer.eval()(model.model.layers[0].output[0]).save()
    agree(out, read(plain))
    with pytest.raises(GraphError, match=r"call module\.eval\(\) first"), model.trace(IDS):
        layer.train()(model.model.layers[0].output[0])


def test_in_place_functions_change_the_value(model: Any, plain: LlamaForCausalLM) -> None:
    with model.trace(IDS):
        hidden = model.model.layers[0].output[0] * 1
        functional.elu_(torch.relu_(hidden[..., :4]))
        out = hidden.save()
    expected = read(plain).clone()
    expected[..., :4] = functional.elu(expected[..., :4].relu())
    agree(out, expected)


def test_shapes_that_values_decide_are_refused(model: Any) -> None:
    with pytest.raises(GraphError, match=r"depends on values; use torch\.where or topk"), model.trace(IDS):
        hidden = model.model.layers[0].output[0]
        hidden[hidden > 0].save()
    with pytest.raises(GraphError, match="unique: its shape depends on values"), model.trace(IDS):
        model.lm_head.output.argmax(-1).unique().save()
