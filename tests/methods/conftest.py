"""Models that the methods' tests share: tinyworld, and tiny ones of three families, plain and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from families import model_of

import polytrace
from bench.tinyworld import FOLDER


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, Any]]:
    """A family's name, its plain model, and the same weights loaded by polytrace."""
    plain = model_of(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    plain.save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as model:
        yield request.param, plain, model


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    with polytrace.load(str(FOLDER), threads=1) as model:
        yield model
