"""nnsight's patterns with gradients give the same numbers in polytrace.

nnsight runs in an environment of its own (`bench.cones.peer`). Where nobody made it these tests are skipped; make it
with `python -c "from bench.cones.peer import environment; environment()"`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers.gradients_polytrace import PATTERNS
from peers.material import FOLDER
from safetensors.torch import load_file

import polytrace
from bench.cones import peer
from bench.plain import TOLERANCE, difference

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """What each pattern gave in nnsight."""
    python = peer.made()
    if python is None:
        pytest.skip("nnsight has no environment here")
    out = tmp_path_factory.mktemp("nnsight") / "gradients.safetensors"
    command = [str(python), "-m", "peers.gradients_nnsight", str(out)]
    variables = os.environ | {"PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(command, cwd=TESTS.parent, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    values: dict[str, list[torch.Tensor]] = {}
    flat = load_file(out)
    for key in sorted(flat, key=lambda key: (key.split("/")[0], int(key.split("/")[1]))):
        values.setdefault(key.split("/")[0], []).append(flat[key])
    return values


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with polytrace.load(str(FOLDER), threads=1) as model:
        yield model


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_gives_what_it_gives_in_nnsight(
    name: str, model: Any, expected: dict[str, list[torch.Tensor]]
) -> None:
    made = PATTERNS[name](model)
    values = made if isinstance(made, (tuple, list)) else [made]
    assert [value.shape for value in values] == [value.shape for value in expected[name]]
    for value, other in zip(values, expected[name], strict=True):
        assert difference(value.detach(), other) <= TOLERANCE


def test_both_sides_have_the_same_patterns(expected: dict[str, list[torch.Tensor]]) -> None:
    assert expected.keys() == PATTERNS.keys()


def test_changes_of_gradients_matter(expected: dict[str, list[torch.Tensor]]) -> None:
    """What a pattern changes on the way back is far beyond the tolerance at the end of it."""
    original, doubled, before = expected["doubled_gradient"]
    assert torch.equal(original * 2, doubled)
    ordinary, dropped = expected["dropped_gradient"]
    (frozen,), (plain,) = expected["frozen_attention"], expected["plain_backward"]
    assert difference(dropped, ordinary) > 100 * TOLERANCE
    assert difference(frozen, ordinary) > 100 * TOLERANCE
    assert difference(before, 2 * ordinary) <= TOLERANCE, "what was doubled goes on doubled"
    assert torch.equal(plain, original)
