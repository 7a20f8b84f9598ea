"""The benchmark of overlap: what stages did is counted and drawn right. That it runs, `python -m bench.run` shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from bench import pictures
from bench.overlap import OverlapConfig, Served, _idle, config_for, contenders, is_right, stretches
from scheduling.plan import PassId, Phase, ShardResult
from scheduling.policy import passes_in_flight


def answer(stage: int, began: float, *phases: tuple[Phase, float]) -> ShardResult:
    waited = sum(seconds for phase, seconds in phases if phase is Phase.WAITING)
    total = sum(seconds for _, seconds in phases)
    return ShardResult(
        pass_id=PassId(1),
        stage=stage,
        rank=0,
        failures=(),
        fired={},
        saved_bytes={},
        carried_bytes=0,
        gathered_bytes=0,
        seconds=total,
        busy_seconds=total - waited,
        began=began,
        phases=phases,
    )


@pytest.fixture
def served() -> Served:
    """Two stages, one pass: a second each, of four."""
    results = (
        answer(0, 100.0, (Phase.COMPUTING, 1.0), (Phase.SENDING, 0.0)),
        answer(1, 100.5, (Phase.WAITING, 0.5), (Phase.COMPUTING, 0.75), (Phase.SAVING, 0.25)),
    )
    return Served(seconds=4.0, results=[(SimpleNamespace(), results)])  # type: ignore[list-item]


def test_a_stage_that_waits_for_another_is_idle_and_one_that_saves_is_not(served: Served) -> None:
    assert served.busy_by_stage(2) == [1.0, 1.0]
    assert _idle(OverlapConfig(stages=2), [served]) == [0.75, 0.75]


def test_stretches_begin_with_the_first_pass_and_are_cut_at_the_pictures_edge(served: Served) -> None:
    found = [(one.stage, one.phase, one.at) for one in stretches(served, start_s=0.0, stop_s=1.5)]
    assert found == [
        (0, "computing", (0.0, 1.0)),
        (1, "waiting", (0.5, 1.0)),
        (1, "computing", (1.0, 1.5)),
    ]


def test_a_time_line_is_a_picture_with_the_colour_of_each_phase(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "new" / "timeline.png"
    panel = stretches(served, start_s=0.0, stop_s=2.0)
    phases = [phase.value for phase in Phase]
    pictures.draw_timeline(path, panels=[("one", panel), ("other", panel)], phases=phases, title="stages")
    with Image.open(path) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24) or []}
    assert {tuple(bytes.fromhex(pictures._PHASES[phase][1:])) for phase in phases} <= colors


def test_contenders_differ_in_what_they_are_to_show() -> None:
    config = config_for(Path("model"), quick=True)
    by_name = contenders(config)
    assert by_name["uniform"].depth == by_name["greedy"].depth == passes_in_flight(config.stages)
    assert by_name["parts"].policy == by_name["uniform"].policy != by_name["greedy"].policy


def test_other_bits_are_no_result() -> None:
    right = {load: {"same_bits_as_one_process_alone": True} for load in ("clients", "sweep")}
    assert is_right(right)
    assert not is_right({**right, "sweep": {"same_bits_as_one_process_alone": False}})
