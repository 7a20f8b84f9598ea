"""Experts' products in one kernel: `make gpu-test`, or through Triton's interpreter (see `test_flash`)."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from families import model_of
from torch import Tensor

from engine.experts import is_experts, use_padded_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, interpreting
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
DTYPES = [torch.float32] if IS_INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest value

on_a_gpu = pytest.mark.skipif(IS_INTERPRETED, reason="whole layers run on a GPU only")

TOKENS, WIDTH, CHOICES = 300, 32, 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(40, 50), (64, 128), (96, 33)])
def test_each_tile_is_multiplied_by_its_own_matrix(
    num_in: int, num_out: int, has_bias: bool, is_transposed: bool, dtype: torch.dtype
) -> None:
    from engine.grouped import TILE_ROWS, grouped_product

    generator = torch.Generator().manual_seed(num_in)
    matrices = torch.tensor([2, 0, 0, 3])  # the last belongs to none
    x = torch.randn(len(matrices) * TILE_ROWS, num_in, generator=generator).to(dtype)
    weights = torch.randn(3, num_in, num_out, generator=generator).to(dtype)
    if is_transposed:
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    biases = torch.randn(3, num_out, generator=generator).to(dtype) if has_bias else None
    given = (x, weights, biases, matrices)
    got = grouped_product(*(None if one is None else one.to(DEVICE) for one in given)).cpu()  # type: ignore[arg-type]
    assert got.dtype == dtype
    for tile, matrix in enumerate(matrices.tolist()):
        rows = slice(tile * TILE_ROWS, (tile + 1) * TILE_ROWS)
        if matrix == 3:
            assert not got[rows].any()
            continue
        expected = x[rows].double() @ weights[matrix].double() + (0 if biases is None else biases[matrix].double())
        assert (got[rows].double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


def test_a_row_has_the_same_bits_wherever_it_lies() -> None:
    from engine.grouped import TILE_ROWS, grouped_product

    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = torch.randn(TILE_ROWS, 96, generator=generator).to(dtype)
        weights = torch.randn(3, 96, 40, generator=generator).to(DEVICE, dtype)
        order = torch.randperm(TILE_ROWS, generator=generator)
        one = grouped_product(x.to(DEVICE), weights, None, torch.tensor([1], device=DEVICE)).cpu()
        many = torch.cat([x.flip(0), x * float("nan"), x[order]])
        other = grouped_product(many.to(DEVICE), weights, None, torch.tensor([0, 2, 1], device=DEVICE)).cpu()
        assert torch.equal(other[2 * TILE_ROWS :], one[order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_have_the_gradients_of_their_own_matrices_products(is_transposed: bool, dtype: torch.dtype) -> None:
    from engine.grouped import TILE_ROWS, grouped_product

    generator = torch.Generator().manual_seed(0)
    matrices = torch.tensor([2, 0, 0, 3])  # the last belongs to none
    x = torch.randn(len(matrices) * TILE_ROWS, 40, generator=generator).to(DEVICE, dtype).requires_grad_()
    weights = torch.randn(3, 40, 50, generator=generator).to(DEVICE, dtype)
    if is_transposed:
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    biases = torch.randn(3, 50, generator=generator).to(DEVICE, dtype)
    given = torch.randn(len(matrices) * TILE_ROWS, 50, generator=generator).to(DEVICE, dtype)
    given[3 * TILE_ROWS :] = float("nan")
    product = grouped_product(x, weights, biases, matrices.to(DEVICE))
    with torch.no_grad():
        assert torch.equal(product, grouped_product(x, weights, biases, matrices.to(DEVICE)))
    (found,) = torch.autograd.grad(product, x, given)
    for tile, matrix in enumerate(matrices.tolist()):
        rows = slice(tile * TILE_ROWS, (tile + 1) * TILE_ROWS)
        if matrix == 3:
            assert not found[rows].any()
            continue
        expected = given[rows].double() @ weights[matrix].double().T
        assert (found[rows].double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


def mixture(family: str, dtype: torch.dtype) -> Any:
    """The experts of one layer."""
    model = model_of(family, dtype).to(DEVICE)
    use_padded_experts(model)
    return next(module for module in model.modules() if is_experts(module))


def rows(experts: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(DEVICE, dtype)
    chosen = torch.rand(TOKENS, experts.num_experts, generator=generator).topk(CHOICES).indices.to(DEVICE)
    return hidden, chosen, torch.rand(TOKENS, CHOICES, generator=generator).to(DEVICE, dtype)


@on_a_gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_on_a_gpu_give_transformers_numbers_and_nobody_waits(family: str) -> None:
    experts = mixture(family, torch.float32)
    inputs = rows(experts, torch.float32)
    with torch.no_grad():
        first = experts(*inputs)  # compiles
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = experts(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode(before)
        experts.config._experts_implementation_internal = "eager"
        eager = experts(*inputs)
    assert torch.equal(first, ours)
    assert (ours - eager).abs().max() <= 1e-5 * max(1.0, eager.abs().max().item())  # float32
    assert eager.abs().max() > 0.05


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_row_has_the_same_bits_whatever_rows_share_its_experts_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    experts = mixture(family, dtype)
    hidden, chosen, weights = rows(experts, dtype)
    crowded = chosen.clone()
    crowded[1:] = chosen[0]  # all to the experts of row 0
    with torch.no_grad():
        whole = experts(hidden, chosen, weights)
        assert torch.equal(whole[0], experts(hidden, crowded, weights)[0])
        for start in range(0, TOKENS, 37):
            part = slice(start, start + 19)
            assert torch.equal(whole[part], experts(hidden[part], chosen[part], weights[part]))
        assert torch.equal(whole, experts(hidden.flip(0), chosen.flip(0), weights.flip(0)).flip(0))


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_of_experts_on_a_gpu_are_transformers_and_a_rows_own(family: str, dtype: torch.dtype) -> None:
    experts = mixture(family, dtype).requires_grad_(False)
    hidden, chosen, weights = rows(experts, dtype)
    given = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def differentiated(chosen: Tensor) -> tuple[Tensor, ...]:
        leaves = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
        return torch.autograd.grad(experts(leaves[0], chosen, leaves[1]), leaves, given)

    ours = differentiated(chosen)
    crowded = chosen.clone()
    crowded[1:] = chosen[0]
    for own, other in zip(ours, differentiated(crowded), strict=True):
        assert torch.equal(own[0], other[0])
    experts.config._experts_implementation_internal = "eager"
    for own, eager in zip(ours, differentiated(chosen), strict=True):
        assert (own - eager).abs().max() <= TOLERANCES[dtype] * eager.abs().max()
