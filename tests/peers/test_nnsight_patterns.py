"""What nnsight's documentation shows, without gradients, gives the same numbers in polytrace.

nnsight runs in an environment of its own (`bench.cones.peer`). Where nobody made it these tests are skipped; make it
with `python -c "from bench.cones.peer import environment; environment()"`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peers.material import FOLDER
from peers.nnsight_values import values_in_nnsight
from peers.patterns_polytrace import PATTERNS

import polytrace
from bench.plain import TOLERANCE, difference

# patterns that change nothing on purpose
READS = {
    *("read_and_save", "token_ids_as_a_prompt", "read_an_input", "model_output", "modules_called"),
    *("helper_functions_and_loops", "loop_over_prompts", "two_invokes", "batch_without_invokes", "sweep_over_prompts"),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """What each pattern gave in nnsight."""
    return values_in_nnsight("peers.patterns_nnsight", tmp_path_factory.mktemp("nnsight") / "values.safetensors")


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
        assert difference(value, other) <= TOLERANCE


def test_both_sides_have_the_same_patterns(expected: dict[str, list[torch.Tensor]]) -> None:
    assert expected.keys() == PATTERNS.keys()


def test_edits_matter(expected: dict[str, list[torch.Tensor]]) -> None:
    """Where the last value is the last token's logits after an edit, the edit moved them far beyond the tolerance."""
    plain = expected["read_and_save"][1][:, -1]
    edited = 0
    for name, values in expected.items():
        last = values[-1][:, -1] if values[-1].ndim == 3 else values[-1]
        if name not in READS and last.shape == plain.shape:
            assert difference(last, plain) > 100 * TOLERANCE, name
            edited += 1
    assert edited > 20
