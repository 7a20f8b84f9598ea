"""How nearly relations between named values have to hold, and when rounding leaves nothing to be seen."""

from __future__ import annotations

import pytest
import torch

from engine.relations import TOLERANCE, cap_of, equal, factor_of, softmax_of, sum_of, sum_of_parts, weighted_sum
from polytrace.description import Outcome

SHAPE = (16, 64)


def parts(dtype: torch.dtype, residual: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual so many times as large as what is added to it."""
    generator = torch.Generator().manual_seed(0)
    base, added = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return (base * residual).to(dtype), added.to(dtype)


@pytest.mark.parametrize(("dtype", "residual"), [(torch.float32, 1e4), (torch.bfloat16, 5.0)])
def test_a_sum_holds_beside_a_large_residual_and_a_small_error_is_seen(dtype: torch.dtype, residual: float) -> None:
    base, added = parts(dtype, residual)
    assert sum_of(base + added, base, (added, 1.0)).outcome is Outcome.HOLDS
    assert sum_of(base + added * 0.22, base, (added, 0.22)).outcome is Outcome.HOLDS
    wrong = sum_of(base + added * 1.5, base, (added, 1.0))
    assert wrong.outcome is Outcome.FAILS and "off by 0.5" in (wrong.told or "")
    assert factor_of(base + added * 1.5, base, added) == pytest.approx(1.5, abs=0.02)


def test_beside_the_residual_errors_are_measured_by_what_is_added() -> None:
    base, added = parts(torch.float32, 100.0)
    total = base + added
    total[0, 0] += 2 * TOLERANCE * added.norm()  # two in a hundred thousand of the residual
    assert sum_of(total, base, (added, 1.0)).outcome is Outcome.FAILS
    total[0, 0] -= 1.5 * TOLERANCE * added.norm()
    assert sum_of(total, base, (added, 1.0)).outcome is Outcome.HOLDS


def test_what_rounding_hides_is_not_taken_for_true() -> None:
    base, added = parts(torch.bfloat16, 1e4)
    found = sum_of(base + added, base, (added, 1.0))
    assert found.outcome is Outcome.UNCHECKED and "rounding to bfloat16" in (found.told or "")
    assert sum_of(base, base, (added * 0, 1.0)).outcome is Outcome.UNCHECKED
    assert sum_of(base * torch.nan, base, (added, 1.0)).outcome is Outcome.UNCHECKED


def test_a_pattern_is_the_softmax_of_its_scores_and_of_a_sink() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 4, 5, generator=generator).masked_fill(torch.ones(5, 5).triu(1).bool()[:, None], -torch.inf)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    whole = torch.cat([scores, sinks[None, :, None].expand(5, 4, 1)], 2).softmax(2)[..., :5]
    assert softmax_of(scores.softmax(2), scores, None).told == "rows sum to 1"
    assert "sink" in (softmax_of(whole, scores, sinks).told or "")
    assert softmax_of(whole, scores, None).outcome is Outcome.FAILS
    assert softmax_of(scores.softmax(2), scores, sinks).outcome is Outcome.FAILS


def test_values_are_weighted_by_the_pattern_of_their_own_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(3, 4, 5, generator=generator).softmax(2)
    values = torch.randn(5, 2, 8, generator=generator)  # two query heads share one
    z = torch.einsum("rhk,khc->rhc", pattern, values.repeat_interleave(2, 1))
    assert weighted_sum(z, pattern, values).outcome is Outcome.HOLDS
    assert weighted_sum(z.flip(1), pattern, values).outcome is Outcome.FAILS


def test_parts_that_were_rounded_one_by_one_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(16, 32, 64, generator=generator)
    total, rounded = heads.sum(1).bfloat16(), heads.bfloat16().float()
    assert sum_of_parts(total, rounded.sum(1), rounded.abs().sum(1)).outcome is Outcome.HOLDS
    assert sum_of_parts(total, rounded[:, 1:].sum(1), rounded.abs().sum(1)).outcome is Outcome.FAILS


def test_a_soft_cap_is_found_from_what_it_did() -> None:
    plain = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)) * 10
    capped = torch.tanh(plain / 30) * 30
    assert cap_of(capped, plain) == pytest.approx(30, rel=1e-4)
    assert cap_of(plain, plain) is None
    assert equal(capped, plain).outcome is Outcome.FAILS
    assert equal(plain, plain[:, :8]).outcome is Outcome.FAILS
