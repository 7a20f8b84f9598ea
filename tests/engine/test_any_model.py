"""Models that are called as they are, of every kind: the bits of plain torch with hooks."""

from __future__ import annotations

import pytest
from called_by_hand import assert_three_interventions
from model_kinds import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_three_interventions_have_the_bits_of_hooks(kind: str) -> None:
    model, path, call, other = KINDS[kind]()
    assert_three_interventions(model, path, call, other)
