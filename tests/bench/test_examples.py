"""The examples run as they stand."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def output_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an example as `python examples/NAME` does, but for another process; what it printed."""

    def run(name: str, *flags: str) -> str:
        path = str(ROOT / "examples" / name)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [path, *flags])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_logit_lens_ends_with_the_answer(output_of: Callable[..., str]) -> None:
    lines = output_of("logit_lens.py").splitlines()
    assert re.fullmatch(r"  layer \d+: ' Paris' at \d+%", lines[-2])
    assert re.fullmatch(r"\d+ bytes came back; [\d,]+ were read", lines[-1])


def test_patching_moves_the_fact_from_its_subject_to_the_last_token(output_of: Callable[..., str]) -> None:
    rows = [line.split()[2:] for line in output_of("patching.py").splitlines() if line.startswith("layer")]
    last_layer, first_layer = ([float(value) for value in row] for row in (rows[0], rows[-1]))
    assert last_layer[-1] == pytest.approx(1, abs=0.01)
    assert max(last_layer[:-1], key=abs) == pytest.approx(0, abs=0.01)
    assert first_layer[-1] < 0.5


def test_one_script_for_every_family_finds_rome(output_of: Callable[..., str]) -> None:
    lines = output_of("standard_names.py").splitlines()
    assert lines[0] == "8 layers of 8 heads, 256 wide" and lines[8].startswith("layer 7: ' Rome' 9")
    told = re.fullmatch(r"head \d of layer \d moves Rome's lead over Moscow most: (\S+) to (\S+)", lines[9])
    assert told is not None and float(told[2]) > float(told[1]) + 1
    assert lines[10].endswith("Rome is 0% likely") and re.search(r"Rome is 9\d% likely", lines[11])


def test_the_dataset_is_mapped_into_a_folder_and_a_second_run_says_the_same(
    output_of: Callable[..., str], tmp_path: Path
) -> None:
    told = output_of("dataset.py", "--to", str(tmp_path / "map"))
    assert output_of("dataset.py", "--to", str(tmp_path / "map")) == told
    lines = told.splitlines()
    assert lines[0].startswith("prompts 0 to 15: [16, ") and lines[0].endswith("part-00000.safetensors")
    assert re.fullmatch(r"\d+ directions hold 90% of the variance", lines[1])
    assert len(lines) == 5 and all(re.fullmatch(r"\d+% sure: '.*'", line) for line in lines[2:])
