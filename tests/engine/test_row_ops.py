"""An op on a table has, for each member, the bits that the op has on the member's own values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import TORCH_DTYPES, run_op
from engine.row_ops import Layout, Own, Slot, compiled
from engine.row_products import by_equation
from polytrace.graph import DType

MEMBERS = (1, 2, 3, 16, 33)
EVERY = slice(None)
H, V, M = Slot(0), Slot(1), Slot(2)  # a read, a vector, a few columns
# names, arguments, keywords
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("add", (H, V), {}),
    ("add", (H, 0.3), {}),
    ("sub", (H, V), {}),
    ("mul", (V, H), {}),
    ("div", (H, V), {}),
    ("rdiv", (V, 3.0), {}),
    ("neg", (H,), {}),
    ("sqrt", (H,), {}),
    ("clamp", (H,), {"min": -0.5, "max": 0.5}),
    ("clamp", (H,), {"max": V}),
    ("maximum", (H, V), {}),
    ("gt", (H, V), {}),
    ("where", (Slot(3), H, V), {}),
    ("masked_fill", (H, Slot(3), 7.0), {}),
    ("to", (H, DType("float32")), {}),
    ("getitem", (H, (EVERY, -1)), {}),
    ("getitem", (H, (Ellipsis, None)), {}),
    ("getitem", (H, (EVERY, [0, 1])), {}),
    ("getitem", (H, (0, slice(1, None), slice(2, 9))), {}),
    ("unsqueeze", (H, 1), {}),
    ("flatten", (H, 0, 1), {}),
    ("expand", (V, 2, 3, -1), {}),
    ("setitem", (H, EVERY, V), {}),
    ("setitem", (H, (EVERY, 1), V), {}),
    ("setitem", (H, (EVERY, [0, 2]), V), {}),
    ("setitem", (H, (slice(0, 1), 0), 2.5), {}),
    ("set_view", (H, (("getitem", ((EVERY, 0),), ()), ("getitem", (slice(0, 1),), ())), V), {}),
    ("sum", (H, -1), {"keepdim": True}),
    ("mean", (H, 2), {}),
    ("amax", (H, -1), {}),
    ("norm", (H,), {"dim": -1, "keepdim": True}),
    ("softmax", (H, -1), {}),
    ("matmul", (H, V), {}),
    ("matmul", (H, M), {}),
    ("matmul", (H, Slot(4)), {}),
    ("einsum", ("nsd,d->ns", H, V), {}),
    ("einsum", ("...d,dk->...k", H, M), {}),
    ("einsum", ("nsd,kd->nsk", H, Slot(5)), {}),
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


def filled(operand: Any, values: list[Tensor]) -> Any:
    if isinstance(operand, Slot):
        return values[operand.number]
    if isinstance(operand, tuple):
        return tuple(filled(part, values) for part in operand)
    return TORCH_DTYPES[operand.name] if isinstance(operand, DType) else operand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [33, 600])
def test_every_member_of_a_table_has_its_own_bits(threads: int, dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    shapes = [(2, 3, width), (width,), (width, 3), (2, 3, width), (width, 1), (3, width)]
    for name, args, kwargs in CALLS:
        values = [torch.randn(33, *shape, generator=generator).to(dtype) for shape in shapes]
        if name in ("where", "masked_fill"):
            values[3] = values[3] > 0
        owns = [Own(tuple(value.shape[1:]), value.dtype) for value in values]
        own_args = [
            (filled(args, row), {key: filled(part, row) for key, part in kwargs.items()})
            for row in ([value[member] for value in values] for member in range(33))
        ]
        alone = [run_op(name, one, named) for one, named in own_args]
        result = Own(tuple(alone[0].shape), alone[0].dtype)
        made = compiled(name, args, kwargs, owns, result, is_cpu=True)
        assert made is not None, name
        for number in MEMBERS:
            together = made[0]([value[:number].clone() for value in values])
            assert together.shape == (number, *result.shape), (name, args)
            assert together.dtype is result.dtype
            assert all(map(torch.equal, nan_free(together), nan_free(alone[:number]))), (name, args, number)


def nan_free(values: Any) -> list[Tensor]:
    return [value.nan_to_num(7.0) if value.is_floating_point() else value for value in values]


NO_FORM: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("exp", (H,), {}),  # other last bits at the end of a thread's share
    ("add", (H, V), {"alpha": 2}),
    ("sum", (H, 1), {}),
    ("sum", (H,), {}),
    ("sum", (V, -1), {"dtype": DType("float64")}),
    ("matmul", (H, Slot(6)), {}),
    ("getitem", (H, (EVERY, V)), {}),
    ("getitem", (H, (0, EVERY, [0, 1])), {}),
    ("transpose", (H, 0, 1), {}),
    ("cumsum", (H, -1), {}),
    ("long", (H,), {}),
    ("masked_fill", (H, Slot(3), Slot(7)), {}),
    ("add", (H, Slot(7)), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), NO_FORM)
def test_what_may_have_other_bits_among_others_has_no_form(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    owns = [Own(shape, torch.float32) for shape in [(2, 3, 512), (512,), (512, 3), (2, 3, 512), (512, 1), (3, 512)]]
    owns += [Own((512, 512), torch.float32), Own((), torch.float64)]
    result = Own((2, 3, 512), torch.int64 if name == "long" else torch.float32)
    assert compiled(name, args, kwargs, owns, result, is_cpu=True) is None


def test_an_index_out_of_range_is_no_form() -> None:
    owns, result = [Own((2, 3, 8), torch.float32)], Own((2, 1, 8), torch.float32)
    with pytest.raises(IndexError):
        compiled("getitem", (H, (EVERY, [3])), {}, owns, result, is_cpu=False)


def test_a_sum_of_what_does_not_lie_row_by_row_has_no_form() -> None:
    owns = [Own((2, 3, 512), torch.float32, Layout.VIEW)]
    assert compiled("sum", (H, -1), {}, owns, Own((2, 3), torch.float32), is_cpu=True) is None
    dense = [Own((2, 3, 512), torch.float32)]
    assert compiled("sum", (H, -1), {}, dense, Own((2, 3), torch.float32), is_cpu=True) is not None
    assert compiled("sum", (H, -1), {}, dense, Own((2, 3), torch.float32), is_cpu=False) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_row_by_row_is_the_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for left, right in [
        ((2, 5, 512), (512,)),
        ((7, 512), (512, 3)),
        ((2, 5, 3), (3, 512)),
        ((2, 64, 1024), (1024, 16)),
    ]:
        a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in (left, right))
        exact = a.double() @ b.double()
        ours = run_op("matmul", (a, b), {})
        assert ours.dtype is dtype
        assert (ours.double() - exact).abs().max() <= tolerance * max(1.0, float(exact.abs().max()))
        rows = torch.stack([run_op("matmul", (row[None], b), {})[0] for row in a.flatten(0, -2)])
        assert torch.equal(rows, ours.flatten(0, a.ndim - 2)), "a row's bits do not depend on the others"


def test_an_einsum_whose_letters_are_not_its_dimensions_is_left_to_torch() -> None:
    hidden, matrix = torch.randn(2, 3, 4), torch.randn(5, 4)
    found = by_equation("abc,dc->abd", hidden, matrix)
    assert found is not None and torch.allclose(found, hidden @ matrix.T, atol=1e-5)
    assert by_equation("abc,dc->abd", hidden, hidden) is None
    assert by_equation("abc,c->ab", hidden, matrix) is None
