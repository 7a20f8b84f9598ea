"""docs/families.md says what is true: some of its rows, tried anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import width

from bench.families.configurations import classes
from bench.families.page import NNTERP, page, row, rows_of
from bench.families.runs import try_all

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
# a mixture with a loop of its own, numbering behind padding, odd
TRIED: tuple[str, ...] = ("DbrxForCausalLM", "RobertaForCausalLM", "DiffLlamaForCausalLM")
if width.is_wide:  # rotary and grouped, fused, not packable
    TRIED += ("LlamaForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM")


@pytest.mark.timeout(280)
def test_rows_of_the_page_are_what_a_trial_says() -> None:
    rows = rows_of(PAGE.read_text())
    tried = {trial.name: row(trial) for trial in try_all(TRIED, jobs=2, timeout_s=200)}
    assert tried == {name: rows[name] for name in TRIED}


def test_the_page_is_made_of_rows_and_of_classes_that_there_are() -> None:
    text = PAGE.read_text()
    assert set(rows_of(text)) <= set(classes())
    assert page(rows_of(text)) == text


def test_classes_that_nnterp_names_are_among_them() -> None:
    assert set(NNTERP) <= set(classes())
