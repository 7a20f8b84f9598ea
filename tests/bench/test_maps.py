"""The benchmark of maps works and its numbers are right."""

from __future__ import annotations

from dataclasses import replace

from bench import maps, tinyworld


def test_the_benchmark_of_maps_holds_every_row_against_a_plain_loop() -> None:
    config = replace(maps.config_for(tinyworld.FOLDER, quick=True), num_prompts=60, num_plain=10)
    figures = maps.run(config)
    assert maps.is_right(figures)
    assert len(figures["in process"]["client_mib"]) == 10 and min(figures["in process"]["client_mib"]) > 0
    assert "prompts a second" in maps.tell(figures)
    figures["in process"]["largest_difference_to_plain"] = 1.0
    assert not maps.is_right(figures)
