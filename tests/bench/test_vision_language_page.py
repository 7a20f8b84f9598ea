"""The page about vision-language models says what is true: its blocks run, one after another."""

from __future__ import annotations

import pytest
from pages import run_all


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = run_all("docs/vision_language.md", {}, capsys)
    assert "token=63, rows=4, shape=(3, 8, 8)" in outputs[0]
    assert "torch.Size([1, 9, 16])" in outputs[1] and "torch.Size([1, 64])" in outputs[3]
    assert "whole=True" in outputs[4]
