"""The page about any PyTorch model says what is true: its blocks run, one after another."""

from __future__ import annotations

from typing import Any

import pytest
from pages import run_all


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    run_all("docs/any_model.md", names, capsys)
    assert "denoiser" in names, "every block has run"
