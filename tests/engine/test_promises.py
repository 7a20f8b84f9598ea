"""Promises 1 and 2 in one process: random programs, merged and sharing rows, give the bits that they give alone.

And the numbers of plain Hugging Face. Crowds of programs share prompts, prefixes and edits; others share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import run_by_hand
from families import FAMILIES, Place, model_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import (
    Action,
    At,
    Program,
    Served,
    crowds,
    difference,
    few_rows,
    get,
    programs,
    record,
    record_in,
    rows_run,
    serve,
)
from transformers import PreTrainedModel

from engine.local import LocalBackend
from polytrace.errors import RunError
from polytrace.graph import Save
from polytrace.model import Model
from scheduling.plan import Plan, Segment
from scheduling.policy import PassPolicy

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
NUM_USERS = 32
DEEP = ["llama", "gpt2", "gemma2"]
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)


class Family:
    """A family in one process beside the plain model."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype, threads: int = 1) -> None:
        self.names, self.dtype = FAMILIES[family], dtype
        self.family = family
        self.plain: PreTrainedModel = model_of(family, dtype)
        self.plain.save_pretrained(folder)
        self.backend = LocalBackend(str(folder), threads=threads, policy=EVERYONE)
        self.model = Model(self.backend)

    def serve(self, users: list[Program], sharing: str = "tenant") -> list[Served]:
        return serve(self.model, self.backend, users, self.dtype, sharing=sharing)

    def check(self, users: list[Program]) -> list[Served]:
        """Merged and shared as merged and as alone."""
        shared = self.serve(users)
        merged = self.serve(users, sharing="off")
        assert rows_run(shared) <= rows_run(merged)
        for program, one, other in zip(users, shared, merged, strict=True):
            (alone,) = self.serve([program])
            assert one.has_bits_of(alone), program
            assert other.has_bits_of(alone), program
        return shared


@pytest.fixture(scope="module", params=DEEP)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param), torch.float32)


@pytest.fixture(scope="module", params=DEEP)
def served_bf16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param), torch.bfloat16)


@pytest.fixture
def served_by_two_threads(tmp_path: Path) -> Iterator[Family]:
    before = torch.get_num_threads()
    yield Family("llama", tmp_path, torch.float32, threads=2)
    torch.set_num_threads(before)


class Watched:
    """Shards that remember the plans they ran."""

    def __init__(self, shards: Any) -> None:
        self._shards = shards
        self.plans: list[Plan] = []
        self.have_room, self.finished = shards.have_room, shards.finished

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._shards.submit(plan)


def depth(segments: tuple[Segment, ...], segment: Segment) -> int:
    return 0 if segment.parent is None else 1 + depth(segments, segments[segment.parent])


many = settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target],
)


@many
@given(data=st.data())
def test_32_programs_that_share_rows_get_their_own_bits_and_hugging_faces_numbers(
    served: Family, data: st.DataObject
) -> None:
    users = data.draw(crowds(served.names, NUM_USERS))
    shared = served.check(users)
    assert rows_run(shared) < sum(each.receipt.token_layers_alone for each in shared)
    for program, ours in zip(users, shared, strict=True):
        assert difference(ours.values, run_by_hand(served.plain, program)) <= FLOAT32_TOLERANCE, program


@settings(many, max_examples=2)
@given(data=st.data())
def test_32_programs_of_their_own_get_their_own_bits_and_hugging_faces_numbers(
    served: Family, data: st.DataObject
) -> None:
    users = [data.draw(programs(served.names)) for _ in range(NUM_USERS)]
    for program, ours in zip(users, served.check(users), strict=True):
        assert difference(ours.values, run_by_hand(served.plain, program)) <= FLOAT32_TOLERANCE, program


@settings(many, max_examples=2)
@given(data=st.data())
def test_32_programs_that_share_rows_get_their_own_bits_in_bf16(served_bf16: Family, data: st.DataObject) -> None:
    served_bf16.check(data.draw(crowds(served_bf16.names, NUM_USERS)))


@settings(many, max_examples=2)
@given(data=st.data())
def test_32_programs_that_share_rows_get_their_own_bits_with_two_threads(
    served_by_two_threads: Family, data: st.DataObject
) -> None:
    served_by_two_threads.check(data.draw(crowds(served_by_two_threads.names, NUM_USERS)))


@many
@given(data=st.data(), rows=st.sampled_from([8, 24, 60]))
def test_programs_of_several_passes_fork_from_what_was_kept_and_have_their_own_bits(
    served: Family, data: st.DataObject, rows: int
) -> None:
    for program in data.draw(crowds(served.names, 12)):
        (alone,) = served.serve([program], sharing="off")
        with few_rows(served.backend, rows):
            (kept,) = served.serve([program])
        with few_rows(served.backend, rows, trunk_bytes=0):
            (anew,) = served.serve([program])
        assert kept.has_bits_of(alone), program
        assert anew.has_bits_of(alone), program
        assert rows_run([kept]) == kept.receipt.token_layers <= anew.receipt.token_layers == rows_run([anew])
    assert served.backend.shard.store.held_bytes == 0


def test_edits_matter(served: Family) -> None:
    """The oracle itself would notice a dropped edit: most edited programs give other numbers than without."""
    edited_programs = moved = 0

    @settings(many, max_examples=3, database=None, derandomize=True)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        nonlocal edited_programs, moved
        for program in data.draw(crowds(served.names, 16)):
            if program.has_edits:
                edited, plain = (run_by_hand(served.plain, program, without_edits=flag) for flag in (False, True))
                edited_programs += 1
                moved += difference(edited, plain) > 100 * FLOAT32_TOLERANCE

    run()
    assert edited_programs and moved >= 0.6 * edited_programs


def test_programs_of_a_crowd_fork_twice_have_twins_and_end_early(served: Family) -> None:
    """What the drawn programs are for."""
    seen = Watched(served.backend.shards)
    served.backend.shards = seen

    @settings(many, max_examples=5, database=None, derandomize=True)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        served.serve(data.draw(crowds(served.names, NUM_USERS)))

    run()
    served.backend.shards = seen._shards
    segments = [segment for plan in seen.plans for segment in plan.segments]
    sequences = sum(len(view.segments) for plan in seen.plans for view in plan.views)
    assert max(depth(plan.segments, segment) for plan in seen.plans for segment in plan.segments) >= 3
    assert len(segments) < 0.9 * sequences  # twins
    assert {start for segment in segments for start in segment.starts[1:] if segment.starts[1] != start}
    assert any(segment.stops[-1] < segment.stops[0] for segment in segments)


POISONS = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


@settings(many, max_examples=3)
@given(data=st.data(), poison=st.sampled_from(sorted(POISONS)))
def test_what_fails_or_is_not_finite_leaves_those_unchanged_that_share_its_rows(
    served: Family, data: st.DataObject, poison: str
) -> None:
    """Beside every program runs one that does the same and then harms itself; some harm themselves alike."""
    users = data.draw(crowds(served.names, 10))
    model, family = served.model, served.names
    undisturbed = served.serve(users)
    requests = []
    for number, program in enumerate(users):
        place = family.residual(number % family.num_layers)
        harm = Action("fill", place, At(start=-2), value=POISONS[poison])
        harmed = replace(program, actions=(*program.actions[:-1], (*program.actions[-1], harm)))

        def fail(place: Place = place) -> None:
            hidden = get(model, place)
            beyond = (hidden[:1, -1] > -1e9).sum() + 1000  # known only when it runs
            hidden[:, -1] = torch.zeros(family.width)[beyond]

        requests += [record(model, each, run=False)[0].built_request() for each in (program, harmed)]
        with model.trace(run=False) as failing:
            record_in(failing, model, program, then=fail)
        requests.append(failing.built_request())
    outcomes = served.backend.run_together([served.backend.work_out(request) for request in requests])
    num_odd = 0
    for request, outcome, poisoned, failed, expected in zip(
        requests[::3], outcomes[::3], outcomes[1::3], outcomes[2::3], undisturbed, strict=True
    ):
        assert outcome.error is poisoned.error is None
        values = [outcome.values[node.name] for node in request.graph.nodes if isinstance(node, Save)]
        assert all(map(torch.equal, values, expected.values))
        num_odd += not all(value.isfinite().all() for value in poisoned.values.values())
        assert isinstance(failed.error, RunError)
        assert failed.error.where is not None
        assert failed.error.where.startswith("test_promises.py:")
    assert num_odd >= 5
