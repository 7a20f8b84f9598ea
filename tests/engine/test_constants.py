"""Contents stay on the shard that used them, under a budget, and are read once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.constants import Constants
from polytrace.errors import ServiceError
from polytrace.wire import content_header

CPU = torch.device("cpu")


def file(folder: Path, number: int, elements: int = 8) -> str:
    path = folder / f"content{number}"
    tensor = torch.full((elements,), float(number))
    path.write_bytes(content_header("float32", (elements,)) + tensor.numpy().tobytes())
    return str(path)


def test_a_content_is_read_once(tmp_path: Path) -> None:
    constants = Constants(CPU, 1000)
    path = file(tmp_path, 3)
    first = constants.get(path)
    Path(path).unlink()
    assert constants.get(path) is first and torch.equal(first, torch.full((8,), 3.0))
    assert (constants.read_bytes, constants.held_bytes) == (32, 32)


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    constants = Constants(CPU, 64)
    one, two, three = (file(tmp_path, number) for number in range(3))
    held = constants.get(one)
    for path in (two, one, three, one):
        constants.get(path)
    assert (constants.read_bytes, constants.held_bytes) == (96, 64)
    constants.get(two)
    assert constants.read_bytes == 128
    assert torch.equal(held, torch.zeros(8))  # a request that holds it has it


def test_a_content_beyond_the_budget_is_read_by_each_request_and_drives_nothing_out(tmp_path: Path) -> None:
    constants = Constants(CPU, 64)
    small, large = file(tmp_path, 1), file(tmp_path, 2, elements=100)
    for path in (small, large, large, small):
        constants.get(path)
    assert (constants.read_bytes, constants.held_bytes) == (32 + 2 * 400, 32)


def test_a_broken_content_is_an_error_of_the_service(tmp_path: Path) -> None:
    constants = Constants(CPU, 64)
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(content_header("float32", (8,)))
    for name in ("empty", "short", "absent"):
        with pytest.raises(ServiceError):
            constants.get(str(tmp_path / name))
    assert constants.read_bytes == 0
