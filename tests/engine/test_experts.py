"""The experts function against transformers' own, and beside other rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import model_of
from torch import Tensor

from engine.experts import NAME, deal_experts, is_experts, use_padded_experts

T, D, K = 40, 32, 2


def mixture(family: str, dtype: torch.dtype) -> Any:
    """The experts of one layer."""
    model = model_of(family, dtype)
    use_padded_experts(model)
    return next(module for module in model.modules() if is_experts(module))


def rows(experts: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator).to(dtype)
    chosen = torch.rand(T, experts.num_experts, generator=generator).topk(K).indices
    return hidden, chosen, torch.rand(T, K, generator=generator).to(dtype)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_give_transformers_numbers(family: str) -> None:
    experts = mixture(family, torch.float32)
    inputs = rows(experts, torch.float32)
    with torch.no_grad():
        ours = experts(*inputs)
        assert experts.config._experts_implementation == NAME
        experts.config._experts_implementation_internal = "eager"
        eager = experts(*inputs)
    assert (ours - eager).abs().max() <= 1e-5 * max(1.0, eager.abs().max().item())
    assert eager.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_row_has_the_same_bits_whatever_rows_share_its_experts(family: str, dtype: torch.dtype) -> None:
    experts = mixture(family, dtype)
    hidden, chosen, weights = rows(experts, dtype)
    crowded = chosen.clone()
    crowded[1:] = chosen[0]  # all to the experts of row 0
    with torch.no_grad():
        whole = experts(hidden, chosen, weights)
        assert torch.equal(whole[0], experts(hidden, crowded, weights)[0])
        for start in range(0, T, 7):
            part = slice(start, start + 3)
            assert torch.equal(whole[part], experts(hidden[part], chosen[part], weights[part]))
        backwards = experts(hidden.flip(0), chosen.flip(0), weights.flip(0))
    assert torch.equal(whole, backwards.flip(0))


def differentiated(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, given: Tensor) -> tuple[Tensor, ...]:
    """What experts give, and what they give back for a gradient: to hidden states and to routing weights."""
    experts.requires_grad_(False)
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    answer = experts(hidden, chosen, weights)
    return answer.detach(), *torch.autograd.grad(answer, (hidden, weights), given, materialize_grads=True)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_give_back_transformers_gradients(family: str) -> None:
    experts = mixture(family, torch.float32)
    inputs = rows(experts, torch.float32)
    given = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    ours = differentiated(experts, *inputs, given)
    with torch.no_grad():
        assert torch.equal(ours[0], experts(*inputs))
    experts.config._experts_implementation_internal = "eager"
    for own, eager in zip(ours, differentiated(experts, *inputs, given), strict=True):
        assert (own - eager).abs().max() <= 1e-5 * eager.abs().max()
        assert eager.abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_rows_gradient_has_the_same_bits_whatever_rows_share_its_experts(family: str, dtype: torch.dtype) -> None:
    experts = mixture(family, dtype)
    hidden, chosen, weights = rows(experts, dtype)
    given = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = differentiated(experts, hidden, chosen, weights, given)
    crowded, broken = chosen.clone(), given.clone()
    crowded[1:], broken[1:] = chosen[0], float("nan")  # all to the experts of row 0, and back with no number
    for beside in (given, broken):
        for own, other in zip(whole, differentiated(experts, hidden, crowded, weights, beside), strict=True):
            assert torch.equal(own[0], other[0])
    for start in range(0, T, 7):
        part = slice(start, start + 3)
        alone = differentiated(experts, hidden[part], chosen[part], weights[part], given[part])
        for own, other in zip(whole, alone, strict=True):
            assert torch.equal(own[part], other)
    backwards = differentiated(experts, hidden.flip(0), chosen.flip(0), weights.flip(0), given.flip(0))
    for own, other in zip(whole, backwards, strict=True):
        assert torch.equal(own, other.flip(0))


def test_rows_that_are_not_finite_stay_alone() -> None:
    experts = mixture("mixtral", torch.float32)
    hidden, chosen, weights = rows(experts, torch.float32)
    with torch.no_grad():
        whole = experts(hidden, chosen, weights)
        hidden[0] = float("nan")
        odd = experts(hidden, chosen, weights)
    assert odd[0].isnan().all()
    assert torch.equal(odd[1:], whole[1:])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_rows_that_are_not_finite_have_gradients_of_their_own(family: str) -> None:
    experts = mixture(family, torch.float32)
    hidden, chosen, weights = rows(experts, torch.float32)
    given = torch.ones(T, D)
    whole = differentiated(experts, hidden, chosen, weights, given)
    hidden[0] = float("inf")  # padding repeats it
    odd = differentiated(experts, hidden, chosen, weights, given)
    for own, other in zip(odd, whole, strict=True):
        assert torch.equal(own[1:], other[1:])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_dealt_out_give_parts_of_a_sum_whose_rows_are_their_own(family: str) -> None:
    whole = mixture(family, torch.float32)
    hidden, chosen, weights = rows(whole, torch.float32)
    total = torch.zeros(T, D)
    for rank in range(2):
        experts = copy.deepcopy(whole)
        for name, parameter in whole.named_parameters(recurse=False):
            setattr(experts, name, torch.nn.Parameter(parameter.detach().chunk(2)[rank]))
        deal_experts(experts, rank, 2)
        crowded = chosen.clone()
        crowded[1:] = chosen[0]
        with torch.no_grad():
            part = experts(hidden, chosen, weights)
            assert torch.equal(part[0], experts(hidden, crowded, weights)[0])
            nowhere = torch.full_like(chosen, experts.num_experts * (1 - rank))  # all at the other rank
            assert not experts(hidden, nowhere, weights).any()
        given = torch.ones(T, D)
        back = differentiated(experts, hidden, chosen, weights, given)[1]
        assert torch.equal(back[0], differentiated(experts, hidden, crowded, weights, given)[1][0])
        assert not any(each.any() for each in differentiated(experts, hidden, nowhere, weights, given))
        total += part
    with torch.no_grad():
        expected = whole(hidden, chosen, weights)
    assert (total - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())
