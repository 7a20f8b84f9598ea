"""A product of two narrow matrices does what the whole matrix does."""

from __future__ import annotations

import pytest
import torch

from polytrace.methods.transformer_lens import FactoredMatrix, get_act_name

TOLERANCE = 1e-9  # float64


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_multiplies_as_the_whole_matrix_does() -> None:
    narrow = FactoredMatrix(_random(3, 12, 4, seed=0), _random(3, 4, 9, seed=1))
    whole = narrow.A @ narrow.B
    vector, matrix = _random(9, seed=2), _random(9, 5, seed=3)
    assert narrow.shape == whole.shape
    for ours, expected in (
        (narrow.AB, whole),
        (narrow @ vector, whole @ vector),
        (_random(12, seed=4) @ narrow, _random(12, seed=4) @ whole),
        ((narrow @ matrix).AB, whole @ matrix),
        ((_random(6, 12, seed=5) @ narrow).AB, _random(6, 12, seed=5) @ whole),
        ((narrow @ narrow.T).AB, whole @ whole.transpose(-2, -1)),
        (narrow.T.AB, whole.transpose(-2, -1)),
        ((2 * narrow)[1].AB, 2 * whole[1]),
        (narrow.norm(), whole.flatten(1).norm(dim=1)),
        (narrow.S, torch.linalg.svdvals(whole)[:, :4]),
        (narrow.U * narrow.S[:, None] @ narrow.V.transpose(-2, -1), whole),
    ):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= TOLERANCE


def test_its_eigenvalues_are_those_of_the_whole_matrix_that_are_not_zero() -> None:
    narrow = FactoredMatrix(_random(8, 3, seed=0), _random(3, 8, seed=1))
    expected = torch.linalg.eigvals(narrow.AB)
    largest = expected[expected.abs().argsort(descending=True)[:3]]
    ours = narrow.eigenvalues
    assert ours.shape == (3,)
    assert (ours.sum() - largest.sum()).abs() < 1e-4  # in float32
    assert (ours.prod() - largest.prod()).abs() < 1e-4 * largest.prod().abs()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[2, 3\] have no product"):
        FactoredMatrix(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(IndexError, match="leading dimensions"):
        _ = FactoredMatrix(torch.zeros(2, 3), torch.zeros(3, 2))[0]


def test_short_names_mean_what_they_mean_in_transformer_lens() -> None:
    """A few of those that `peers.habits` compares."""
    assert get_act_name("k", 6, "a") == get_act_name("k6") == "blocks.6.attn.hook_k"
    assert get_act_name("scale4ln1") == "blocks.4.ln1.hook_scale"
    assert get_act_name("normalized") == "ln_final.hook_normalized"
    assert get_act_name("mlp_out", 1, "b") == "blocks.1.hook_mlp_out"
    assert get_act_name("blocks.3.attn.hook_z") == "blocks.3.attn.hook_z"
