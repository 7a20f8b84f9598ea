"""A figure is kept with what it was taken on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import record


def test_a_line_names_commit_hardware_versions_and_configuration(tmp_path: Path) -> None:
    path = record.append("speed", config={"rounds": 3}, figures={"ratio": 1.5}, folder=tmp_path)
    record.append("speed", config={"rounds": 4}, figures={"ratio": 1.6}, folder=tmp_path)
    first, second = map(json.loads, path.read_text().splitlines())
    assert path.name == "speed.jsonl"
    assert first["config"] == {"rounds": 3}
    assert second["figures"] == {"ratio": 1.6}
    assert first["versions"].keys() >= {"python", "torch", "transformers"}
    assert first["hardware"]["cores"] >= 1
    assert first["commit"]


def test_a_line_does_not_tell_where_the_repository_lies(tmp_path: Path) -> None:
    path = record.append("speed", config={"model": str(record.ROOT / "model")}, figures={}, folder=tmp_path)
    assert json.loads(path.read_text())["config"] == {"model": "model"}


def test_a_figure_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.append("speed", config={}, figures={"ratio": float("nan")}, folder=tmp_path)
