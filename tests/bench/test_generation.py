"""The benchmark of generation works, does the same work on all sides, and notices wrong tokens."""

from __future__ import annotations

import copy

import pytest

from bench import tinyworld
from bench.cones.models import folder_of
from bench.cones.workloads import shape_of
from bench.generation import benchmark, by_hand
from bench.generation.users import ablating_users, plain_users, steered_users
from bench.plain import Plain


def test_the_batch_by_hand_gives_what_each_user_gets_alone() -> None:
    folder = folder_of("4x64")
    plain, shape = Plain(folder), shape_of(folder)
    told = []
    for make in (plain_users, steered_users, ablating_users):
        users = make(shape, 5, tokens=9, new_tokens=8)
        told.append(by_hand.as_one_batch(plain, users))
        assert told[-1] == by_hand.one_by_one(plain, users) and {len(tokens) for tokens in told[-1]} == {8}
    assert told[0] != told[1] != told[2] != told[0]


@pytest.mark.wide
def test_the_benchmark_of_generation_holds_all_tokens_against_each_other() -> None:
    figures = benchmark.run(benchmark.config_for(tinyworld.FOLDER, quick=True))
    assert benchmark.is_right(figures), benchmark.tell(figures)
    assert "tokens a second" in benchmark.tell(figures)
    (model,) = figures["models"]
    assert [row["users"] for row in model["steered"]] == [1, 4]
    assert model["arrival"]["longest_ms_meanwhile"] >= model["arrival"]["ms_between_tokens_meanwhile"] > 0
    wrong = copy.deepcopy(figures)
    wrong["models"][0]["steered"][1]["tokens_of_hugging_face"] = False
    assert not benchmark.is_right(wrong)
    left = copy.deepcopy(figures)
    left["models"][0]["left"]["cache_bytes"] = 1
    assert not benchmark.is_right(left) and "WRONG" in benchmark.tell(left)
