"""Parts of a map: rows of any shapes come back as they were, through bytes too; contributions join in any cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from polytrace.errors import WireError
from polytrace.maps.combining import Combined, Way
from polytrace.maps.parts import Part, file_of, part_of, put_contribution, put_rows
from polytrace.maps.running import running, top_contribution
from polytrace.tensors import RawTensor

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


def part_with(tensors: dict[str, RawTensor], count: int) -> Part:
    names = tuple(name for name in tensors if ":" not in name)
    return Part(number=3, prompts=range(5, 5 + count), skipped={}, path=None, tensors=tensors, names=names)


@given(
    st.one_of(
        st.tuples(SHAPES, st.integers(1, 5)).map(lambda drawn: [drawn[0]] * drawn[1]),
        st.tuples(SHAPES, st.lists(st.integers(0, 4), min_size=1, max_size=5)).map(
            lambda drawn: [(length, *drawn[0]) for length in drawn[1]]
        ),
        st.integers(0, 3).flatmap(
            lambda rank: st.lists(st.tuples(*[st.integers(0, 3)] * rank), min_size=1, max_size=5)
        ),
    ),
    DTYPES,
)
def test_rows_of_any_shapes_come_back(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    rows = [(torch.randn(1, *shape) * 3).to(dtype) for shape in shapes]
    tensors: dict[str, RawTensor] = {}
    put_rows(tensors, "x", rows)
    part = part_with(tensors, len(rows))
    data = file_of(part)
    assert set(load(data)) == set(tensors)
    for own in (part, part_of(data, "somewhere")):
        found = own.rows("x")
        assert len(found) == len(rows)
        for row, was in zip(found, rows, strict=True):
            assert row.dtype == dtype and torch.equal(row, was[0])
    assert part_of(data, "") == replace(part, path="", tensors=part_of(data, "").tensors)


def test_a_part_says_what_it_has() -> None:
    tensors: dict[str, RawTensor] = {}
    put_rows(tensors, "x", [torch.ones(1, 2)])
    part = part_with(tensors, 1)
    assert list(part) == ["x"] and part.keys() == ("x",) and "y" not in part and len(part) == 1
    with pytest.raises(KeyError, match="this part has x"):
        part["y"]
    with pytest.raises(WireError):
        part_of(b"nothing", "")


def combined(way: Way, number: int = 0) -> Combined:
    return Combined(way=way, value=None, number=number, where="a.py:1")


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 1000))
def test_contributions_in_any_cut_give_numpys_covariance_and_mean(sizes: list[int], seed: int) -> None:
    rows = np.random.default_rng(seed).normal(100, 3, (sum(sizes) + 2, 4))
    sizes = [*sizes, 2]
    covariance, mean = running("c", combined(Way.COVARIANCE, 1)), running("m", combined(Way.MEAN))
    start = 0
    for place, size in enumerate(sizes):
        own = rows[start : start + size]
        start += size
        rest = own - own.mean(0)
        moments = {"count": np.array(size), "mean": own.mean(0), "products": rest.T @ rest}
        covariance.take(moments if place % 2 else {"rows": own})
        mean.take({"sum": own.sum(0), "count": np.array(size)})
    exact = np.cov(rows.T)
    assert np.abs(covariance.result() - exact).max() <= 1e-12 * max(1.0, np.abs(exact).max()) * 100**2
    assert np.abs(mean.result() - rows.mean(0)).max() <= 1e-10


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(1, 6))
def test_the_largest_in_any_cut_are_those_of_all(scores: list[list[int]], number: int) -> None:
    top = running("t", combined(Way.TOP_K, number))
    for prompt, own in enumerate(scores):
        order = np.argsort(-np.array(own), kind="stable")[:number]
        values = np.array(own, np.float32)[order]
        top.take(top_contribution([values], [order], [prompt], (len(own),), number))
    every = sorted((-score, prompt, place) for prompt, own in enumerate(scores) for place, score in enumerate(own))
    result: Any = top.result()
    found = zip(result.values, result.prompts, result.positions, strict=True)
    assert [(-int(value), int(prompt), int(place)) for value, prompt, (place,) in found] == every[:number]


def test_nan_is_the_largest_and_positions_have_all_dimensions() -> None:
    values, places = np.array([np.nan, 3.0], np.float32), np.array([7, 2])
    given_ = top_contribution([values, np.array([9.0], np.float32)], [places, np.array([11])], [4, 6], (5, 3), 2)
    assert np.isnan(given_["values"][0]) and given_["values"][1] == 9.0
    assert given_["prompts"].tolist() == [4, 6] and given_["positions"].tolist() == [[2, 1], [3, 2]]


def test_contributions_of_several_requests_of_a_part_are_kept_apart() -> None:
    tensors: dict[str, RawTensor] = {}
    for piece in range(12):
        put_contribution(tensors, "s", piece, {"sum": np.array([float(piece)])})
    found = part_of(file_of(part_with(tensors, 1)), "").contributions("s")
    assert [float(one["sum"][0]) for one in found] == list(range(12))
