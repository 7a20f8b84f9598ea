"""The guide says what is true: scripts run and assert what they found, pages show their code and their output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot
from width import keeping

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guide"
METHODS = sorted(path.stem for path in GUIDE.glob("*.py"))
LONGEST = ("learning", "causal_tracing", "sae_splice")
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*%?")


def run(method: str, folder: Path) -> dict[str, Any]:
    """Runs a script as it stands, as if it lay in `folder`: its picture goes there."""
    path = GUIDE / f"{method}.py"
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(folder / path.name)}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A place without a screen and without a service."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("POLYTRACE_URL", raising=False)
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("method", keeping(METHODS, lambda method: method not in LONGEST))
def test_a_script_finds_what_its_page_says(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(method, tmp_path)
    names["model"].close()
    said = capsys.readouterr().out
    page = (GUIDE / f"{method}.md").read_text()
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert NUMBER.sub("#", said) == NUMBER.sub("#", shown)
    assert numbers(said) == pytest.approx(numbers(shown), abs=0.05, rel=0.05)
    assert (tmp_path / f"{method}.png").exists() == (f"]({method}.png)" in page)


@pytest.mark.parametrize("method", METHODS)
def test_a_page_shows_its_script(method: str) -> None:
    script, page = (GUIDE / f"{method}.py").read_text(), (GUIDE / f"{method}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks and all(block in script for block in blocks)
    assert f"]({method}.py)" in page
    assert all((GUIDE / target).exists() for target in re.findall(r"\]\(([\w.]+)\)", page))


def test_the_index_has_every_page() -> None:
    index = (GUIDE / "README.md").read_text()
    linked = set(re.findall(r"\]\((\w+)\.md\)", index))
    assert linked == set(METHODS) == {path.stem for path in GUIDE.glob("*.md")} - {"README"}


def numbers(text: str) -> list[float]:
    found = [number.replace(",", "") for number in NUMBER.findall(text)]
    return [float(number.rstrip("%")) / (100 if number.endswith("%") else 1) for number in found]
