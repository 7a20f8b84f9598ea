"""The benchmark of the language measures what it says, on values that are right."""

from __future__ import annotations

from pathlib import Path

from bench import language
from bench.cones.models import folder_of


def test_costs_are_of_values_that_equal_the_plain_models(tmp_path: Path) -> None:
    folder = folder_of("4x64", cache=tmp_path)
    config = language.LanguageConfig(model=str(folder), nodes=40, rounds=3, with_peer=False)
    figures = language.run(config)
    assert language.is_right(figures) and figures["record_us"]["median"] > 0 < figures["read_us"]["high"]
    assert not language.is_right(figures | {"largest_difference_to_plain": 1e-3})
    assert "recording a node" in language.tell(figures)
