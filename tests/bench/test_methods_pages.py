"""The pages of the methods say what is true: their blocks run, one after another."""

from __future__ import annotations

from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot
from pages import ROOT, run_all

PAGES = sorted(path.stem for path in (ROOT / "docs" / "methods").glob("*.md") if path.stem != "README")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    run_all(f"docs/methods/{page}.md", names, capsys)
    pyplot.close("all")
    assert "model" in names, "the page loads a model"


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "methods" / "README.md").read_text()
    assert all(f"]({page}.md)" in index for page in PAGES)
