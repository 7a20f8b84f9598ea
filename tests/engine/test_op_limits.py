"""Ops whose result, or whose work, would be far larger than their operands are refused before memory is taken."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch

from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import Ref
from tests.engine.test_shapes import D, Program, TinyModel

BIG = 1 << 20


@pytest.fixture(scope="module")
def meta() -> TinyModel:
    with torch.device("meta"):
        return TinyModel().eval()


def wide(program: Program) -> Ref:
    """`[2^20, 1]` of one recorded number, which take no memory."""
    one = program.op("getitem", program.read(), (slice(0, 1), 0, slice(0, 1)))
    return program.op("expand", one, BIG, 1)


LARGE: dict[str, Any] = {
    "kron": lambda p, w: p.op("kron", w, w),
    "outer": lambda p, w: p.op("outer", p.op("flatten", w), p.op("flatten", w)),
    "cdist": lambda p, w: p.op("cdist", w, w),
    "pdist": lambda p, w: p.op("pdist", w),
    "tile": lambda p, w: p.op("tile", w, (1, BIG)),
    "pad": lambda p, w: p.op("pad", w, (0, BIG)),
    "diag": lambda p, w: p.op("diagflat", w),
    "diag_embed": lambda p, w: p.op("diag_embed", p.op("flatten", w)),
    "block_diag": lambda p, w: p.op("block_diag", w, w, w, p.op("t", w)),
    "meshgrid": lambda p, w: p.op("meshgrid", p.op("flatten", w), p.op("flatten", w), indexing="ij"),
    "cartesian_prod": lambda p, w: p.op("cartesian_prod", p.op("flatten", w), p.op("flatten", w)),
    "vander": lambda p, w: p.op("vander", p.op("flatten", w), BIG),
    "tensordot": lambda p, w: p.op("tensordot", w, w, dims=((1,), (1,))),
    "matmul": lambda p, w: p.op("matmul", w, p.op("t", w)),
    "cov": lambda p, w: p.op("cov", w),
    "zeros": lambda p, w: p.op("zeros", (BIG, BIG)),
    "arange": lambda p, w: p.op("arange", 1 << 40),
    "linspace": lambda p, w: p.op("linspace", 0, 1, 1 << 40),
    "eye": lambda p, w: p.op("eye", BIG),
    "randn": lambda p, w: p.op("randn", (BIG, BIG)),
    "randperm": lambda p, w: p.op("randperm", 1 << 40),
    "new_full": lambda p, w: p.op("new_full", w, (BIG, BIG), 1.0),
    "multinomial": lambda p, w: p.op("multinomial", p.op("flatten", w), 1 << 40, True),
    "interpolate": lambda p, w: p.op("interpolate", p.op("unsqueeze", w, 0), 1 << 20),
    "one_hot": lambda p, w: p.op("one_hot", p.op("long", w), BIG),
    "svd": lambda p, w: p.op("item", p.op("svd", w), 0),
    "rfft": lambda p, w: p.op("rfft", w, 1 << 24),
    "combined": lambda p, w: p.op("broadcast_to", w, (BIG, BIG)),
}
WORK: dict[str, Any] = {
    "mse_loss": lambda p, w: p.op("mse_loss", w, p.op("t", w)),
    "kl_div": lambda p, w: p.op("kl_div", w, p.op("t", w)),
    "dist": lambda p, w: p.op("dist", w, p.op("t", w)),
    "cosine_similarity": lambda p, w: p.op("cosine_similarity", w, p.op("t", w), 1),
    "einsum": lambda p, w: p.op("einsum", "ax,bx,ay,by->", w, w, w, w),
    "attention": lambda p, w: p.op("scaled_dot_product_attention", w, w, w),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_result_beyond_the_limit_is_refused_and_takes_no_memory(meta: TinyModel, name: str) -> None:
    program = Program()
    LARGE[name](program, wide(program))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((GraphError, TooLargeError), match=r"limit is|overflow|too large") as caught:
        program.facts(meta)
    assert caught.value.where is not None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("name", WORK)
def test_an_op_that_would_work_on_more_than_the_limit_is_refused(meta: TinyModel, name: str) -> None:
    program = Program()
    WORK[name](program, wide(program))
    assert f"would need {4 * BIG * BIG} bytes while it runs; the limit is" in program.refusal(meta)


def test_small_work_is_not_refused(meta: TinyModel) -> None:
    for name, args in (("mse_loss", ()), ("dist", ()), ("cosine_similarity", (-1,))):
        program = Program()
        program.op(name, program.read(), program.read(), *args)
        program.facts(meta)
    program = Program()
    h = program.read()
    program.op("einsum", "bqd,bkd,bkd->bq", h, h, h)
    assert program.shape(meta) == (1, 5)


# --- shapes that depend on values


@pytest.mark.parametrize("name", ["nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"])
def test_a_shape_by_unknown_values_is_refused_and_by_known_values_is_known(meta: TinyModel, name: str) -> None:
    program = Program()
    hidden = program.read()
    value = program.op("long", hidden) if name == "bincount" else hidden
    mask = (program.op("gt", hidden, 0),) if name == "masked_select" else ()
    program.op(name, program.op("flatten", value) if name == "bincount" else value, *mask)
    assert "depends on values; use torch.where or topk" in program.refusal(meta)
    known = torch.tensor([3, 0, 3, 3])
    program = Program()
    mask = (program.constant(known > 0),) if name == "masked_select" else ()
    program.op(name, program.constant(known), *mask)
    shapes = {"nonzero": (3, 1), "argwhere": (3, 1), "masked_select": (3,), "unique": (2,), "bincount": (4,)}
    assert program.shape(meta) == shapes.get(name, (3,))


def test_the_work_to_learn_shapes_of_one_request_is_bounded(meta: TinyModel) -> None:
    program = Program()
    large = program.constant(torch.arange(1 << 18))
    for _ in range(100):
        program.op("unique", large)
    with pytest.raises(GraphError, match="depends on values") as caught:
        program.facts(meta)
    assert caught.value.where is not None and 60 <= int(caught.value.where.split(":")[1]) <= 70
    program = Program()
    several = program.op("topk", program.constant(torch.tensor([1.0, 4.0, 2.0])), 2)
    program.op("unique", program.op("item", several, 1))
    assert program.shape(meta) == (2,)


def test_a_count_of_huge_numbers_is_refused(meta: TinyModel) -> None:
    for numbers, named in ((torch.tensor([1 << 40]), {}), (torch.tensor([1]), {"minlength": 1 << 40})):
        program = Program()
        program.op("bincount", program.constant(numbers), **named)
        assert f"would count {1 << 40} numbers" in program.refusal(meta)


def test_complex_values_are_neither_saved_nor_written(meta: TinyModel) -> None:
    program = Program()
    spectrum = program.op("fft", program.read())
    assert program.facts(meta)[1].dtype == "complex64"  # type: ignore[union-attr]
    program.op("abs", spectrum)
    assert program.shape(meta) == (1, 5, D)
