"""Models that the methods' tests share, each loaded once: tinyworld, and tiny ones of families beside plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
from families import model_of
from hooked import Both, both
from patched_by_hand import (
    KINDS,
    PlainModel,
)
from small import loaded

import polytrace
from bench.tinyworld import FOLDER


@pytest.fixture(scope="session", params=["llama", "gpt2", "gemma2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, Any]]:
    """A family's name, its plain model, and the same weights loaded by polytrace."""
    plain = model_of(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    plain.save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as model:
        yield request.param, plain, model


@pytest.fixture(scope="session")
def world() -> Iterator[Any]:
    with polytrace.load(str(FOLDER), threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Both]]:
    """By a family's name: its tiny model, served and plain."""
    with ExitStack() as opened:
        yield cache(lambda family: opened.enter_context(both(family, tmp_path_factory.mktemp(family))))


@pytest.fixture(scope="session")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Any, PlainModel]]]:
    """By a family's name: its tiny model, loaded, and plain with values that hooks put in."""
    with ExitStack() as opened:

        def make(kind: str) -> tuple[Any, PlainModel]:
            plain = PlainModel(kind)
            return opened.enter_context(loaded(plain.model, tmp_path_factory.mktemp(kind))), plain

        yield cache(make)


@pytest.fixture(scope="module", params=KINDS, name="both")
def each_kind(
    request: pytest.FixtureRequest, patched: Callable[[str], tuple[Any, PlainModel]]
) -> tuple[Any, PlainModel]:
    """Each family in turn."""
    return patched(request.param)


@pytest.fixture(scope="module")
def llama(patched: Callable[[str], tuple[Any, PlainModel]]) -> tuple[Any, PlainModel]:
    """One family, where one is enough."""
    return patched("llama")
