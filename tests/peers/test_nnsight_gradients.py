"""nnsight's patterns with gradients give the same numbers in polytrace.

nnsight runs in an environment of its own (`bench.cones.peer`). Where nobody made it these tests are skipped; make it
with `python -c "from bench.cones.peer import environment; environment()"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peers.gradients import patterns
from peers.material import FOLDER
from peers.nnsight_values import values_in_nnsight

import polytrace
from bench.plain import TOLERANCE, difference

PATTERNS = patterns(polytrace.save)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """What each pattern gave in nnsight."""
    return values_in_nnsight("peers.gradients_nnsight", tmp_path_factory.mktemp("nnsight") / "gradients.safetensors")


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with polytrace.load(str(FOLDER), threads=1) as model:
        yield model


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_gives_what_it_gives_in_nnsight(
    name: str, model: Any, expected: dict[str, list[torch.Tensor]]
) -> None:
    made = PATTERNS[name](model)
    values = made if isinstance(made, (tuple, list)) else [made]
    assert [value.shape for value in values] == [value.shape for value in expected[name]]
    for value, other in zip(values, expected[name], strict=True):
        assert difference(value.detach(), other) <= TOLERANCE


def test_both_sides_have_the_same_patterns(expected: dict[str, list[torch.Tensor]]) -> None:
    assert expected.keys() == PATTERNS.keys()


def test_changes_of_gradients_matter(expected: dict[str, list[torch.Tensor]]) -> None:
    """What a pattern changes on the way back is far beyond the tolerance at the end of it."""
    original, doubled, before = expected["doubled_gradient"]
    assert torch.equal(original * 2, doubled)
    ordinary, dropped = expected["dropped_gradient"]
    (frozen,), (plain,) = expected["frozen_attention"], expected["plain_backward"]
    assert difference(dropped, ordinary) > 100 * TOLERANCE
    assert difference(frozen, ordinary) > 100 * TOLERANCE
    assert difference(before, 2 * ordinary) <= TOLERANCE, "what was doubled goes on doubled"
    assert torch.equal(plain, original)
