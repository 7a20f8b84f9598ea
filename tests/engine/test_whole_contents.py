"""Contents of calls for trials: of the call's likeness, and no larger than it."""

from __future__ import annotations

import pytest
import torch

from engine.whole_contents import Called, likeness, other


def of(*integers: int) -> Called:
    return (torch.tensor(integers),), {}


@pytest.mark.parametrize(
    "integers", [(1, 1, 0, 0), (3, 5, 9), (0, 0, 7), (-3, 4, 0, 9), (-2, -1), (1, 2 * 10**15), (1, 0)]
)
def test_other_integers_are_of_the_calls_likeness_and_range(integers: tuple[int, ...]) -> None:
    call = of(*integers)
    for seed in range(8):
        (found,), _ = other(call, seed)
        assert likeness(((found,), {})) == likeness(call)
        assert found.shape == call[0][0].shape
        assert found.max() <= max(integers)
        assert found.min() >= min(*integers, 1)
    assert any(not torch.equal(other(call, seed)[0][0], call[0][0]) for seed in range(8))


def test_what_is_the_same_all_over_stays() -> None:
    for integers in ((1, 1, 1), (7,), (0, 0)):
        assert torch.equal(other(of(*integers), 1)[0][0], torch.tensor(integers))
