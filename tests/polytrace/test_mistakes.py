"""Newcomers' mistakes (`mistakes`): each error names the user's own line and says what to write instead."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mistakes import GROUPS, MISTAKES, PROMPT, Mistake

import polytrace
from bench import tinyworld
from polytrace.errors import PolytraceError


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with polytrace.load(str(tinyworld.FOLDER), threads=1) as model:
        yield model


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_with_its_line_and_what_to_write_instead(mistake: Mistake, model: Any) -> None:
    with pytest.raises(PolytraceError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has its own words for `torch.tensor(value)`, which come first
        mistake.make({"model": model, "torch": torch, "np": np, "io": io, "polytrace": polytrace})
    assert caught.value.where == f"notebook.py:{mistake.line}", caught.value
    for words in mistake.words:
        assert words in caught.value.message


def test_no_two_mistakes_have_one_name() -> None:
    assert len(MISTAKES) == sum(map(len, GROUPS.values())) > 100


def test_a_mistake_leaves_the_model_usable(model: Any) -> None:
    for mistake in list(MISTAKES.values())[::10]:
        with pytest.raises(PolytraceError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mistake.make({"model": model, "torch": torch, "np": np, "io": io, "polytrace": polytrace})
    with model.trace(PROMPT):
        token = model.lm_head.output[:, -1].argmax(-1).save()
    assert model.tokenizer.decode(token.tolist()) == " Paris"


def test_a_number_into_an_array_of_ones_own_is_told_as_the_cause(model: Any) -> None:
    results = np.zeros(8)
    with pytest.raises(ValueError, match="setting an array element") as caught, model.trace(PROMPT):  # numpy's words
        results[3] = model.model.layers[3].output.mean()
    assert "results.append(value.save())" in str(caught.value.__cause__)


def test_a_folder_that_is_not_there_comes_with_the_nearest() -> None:
    with pytest.raises(
        PolytraceError, match=r"there is no folder .*modell, and a hub's id is owner/name; did you mean .*model\?$"
    ):
        polytrace.load(str(tinyworld.FOLDER) + "l")


def test_what_is_no_mistake(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Printing, formatting, loops over a value, `torch.no_grad()` and torch's own views of a value are fine."""
    with torch.no_grad(), model.trace(PROMPT):
        hidden = model.model.layers[3].output
        print(hidden, f"{hidden.mean():.3f}")
        assert isinstance(hidden, torch.Tensor) and torch.as_tensor(hidden) is hidden
        assert hidden is not None and hasattr(hidden, "mean") and not hasattr(hidden, "meen")
        norms = [row.norm().save() for row in hidden[:, -2:].transpose(0, 1)]
        unsaved = hidden.mean()
    assert capsys.readouterr().out.count("<recorded value: ") == 2
    assert "was not saved" in repr(unsaved) and len(norms) == 2
