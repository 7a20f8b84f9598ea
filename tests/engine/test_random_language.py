"""Random programs in the whole language: all site kinds and most of the op table, several invokes, edits and skips.

Merged, sharing rows or not, and alone they give the same bits, on one process and on stages and ranks; and the numbers
of plain Hugging Face (`language_by_hand`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from language_author import crowds
from language_by_hand import plain_model, run_by_hand
from language_desk import all_spots, shapes
from language_ops import OPERATIONS
from language_programs import Apply, Call, Edit, Program, Read, Skip, Weigh
from language_written import record
from processes import ProcessBackend, ProcessShards
from programs import difference, values_in_order
from torch import Tensor

from engine.local import LocalBackend
from polytrace.model import Model
from scheduling.policy import PassPolicy

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
FAMILIES = ["llama", "gpt2", "gemma2", "mixtral"]
GRIDS = [("llama", 2, 1), ("gpt2", 1, 2)]  # stages, ranks
CROWD = 8
few = settings(
    max_examples=3,  # the first is the smallest one
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


class Served:
    """A family on one backend."""

    def __init__(self, family: str, backend: Any) -> None:
        self.family, self.backend, self.model = family, backend, Model(backend)

    def run(self, users: list[Program], **options: Any) -> list[list[Tensor]]:
        """What all save, merged."""
        tracers = [record(self.model, program, run=False, **options) for program in users]
        outcomes = self.backend.run_together([self.backend.work_out(tracer.built_request()) for tracer in tracers])
        for outcome, program in zip(outcomes, users, strict=True):
            assert outcome.error is None, (outcome.error, program)
        pairs = zip(tracers, outcomes, strict=True)
        return [values_in_order(tracer, outcome.values) for tracer, outcome in pairs]

    def check(self, users: list[Program]) -> list[list[Tensor]]:
        """Merged, unshared and alone alike, and as by hand. Returns what is saved."""
        shared, merged = self.run(users), self.run(users, sharing="off")
        for program, ours, theirs in zip(users, shared, merged, strict=True):
            (alone,) = self.run([program])
            assert same_bits(ours, alone), program
            assert same_bits(theirs, alone), program
            by_hand = run_by_hand(program)
            assert far(ours, by_hand) <= FLOAT32_TOLERANCE, program
        return shared


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True))


def odd(values: list[Tensor]) -> list[Tensor]:
    """What is not finite in values (scores of unseen keys, what a program makes of them), and 0 elsewhere."""
    return [value.masked_fill(value.isfinite(), 0).nan_to_num(7.0) for value in values]


def far(ours: list[Tensor], by_hand: list[Tensor]) -> float:
    """The largest difference; what is not finite is the same."""
    assert all(map(torch.equal, odd(ours), odd(by_hand)))
    return difference(*([value.masked_fill(~value.isfinite(), 0) for value in values] for values in (ours, by_hand)))


def differs(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether some value is clearly another, or is finite in one alone."""
    return not all(map(torch.equal, odd(one), odd(other))) or far(one, other) > 1e-3


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp(request.param)
    plain_model(request.param).save_pretrained(folder)
    return Served(request.param, LocalBackend(str(folder), threads=1, policy=EVERYONE))


@few
@given(data=st.data())
def test_random_programs_give_their_own_bits_and_hugging_faces_numbers(served: Served, data: st.DataObject) -> None:
    served.check(data.draw(crowds(served.family, CROWD)))


@pytest.mark.parametrize(("family", "stages", "ranks"), GRIDS)
def test_random_programs_on_stages_and_ranks(family: str, stages: int, ranks: int, tmp_path: Path) -> None:
    plain_model(family).save_pretrained(tmp_path)
    shards = ProcessShards(str(tmp_path), stages=stages, ranks=ranks)
    deployed = Served(family, ProcessBackend(str(tmp_path), shards, tmp_path, EVERYONE))
    one = Served(family, LocalBackend(str(tmp_path), threads=1, policy=EVERYONE))

    @few
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        users = data.draw(crowds(family, CROWD, on_ranks=ranks > 1))
        ours = deployed.check(users)
        if ranks == 1:  # stages change no bit
            assert all(map(same_bits, ours, one.run(users)))

    try:
        run()
    finally:
        shards.close()


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_edits_matter_and_all_of_the_language_is_drawn(family: str) -> None:
    """The oracle would notice a dropped edit; programs come to every kind of site, statement and operation."""
    edited = moved = 0
    names: set[str] = set()
    kinds: set[type] = set()

    @settings(few, max_examples=12)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        nonlocal edited, moved
        for number, program in enumerate(data.draw(crowds(family, CROWD))):
            for block in program.blocks:
                kinds.update(map(type, block.statements))
                names.update(each.op for each in block.statements if isinstance(each, Apply))
                names.update(str(each.spot.keys[0]) for each in block.statements if isinstance(each, (Read, Edit)))
            if program.edits and number < 2:
                edited += 1
                moved += differs(run_by_hand(program), run_by_hand(program, without_edits=True))

    run()
    assert kinds >= {Read, Edit, Apply, Call, Weigh, Skip}
    assert len(names & OPERATIONS.keys()) >= 0.6 * len(OPERATIONS)
    sites = {str(spot.keys[0]) for spot in all_spots(family)}
    assert len(names & sites) >= 0.8 * len(sites)
    assert edited >= 10 and moved >= 0.9 * edited


def test_every_site_is_there_once_in_a_forward_of_the_plain_model() -> None:
    for family in FAMILIES:
        assert set(shapes(family)) == set(all_spots(family))
