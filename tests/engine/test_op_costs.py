"""The cost of an op is what torch itself counts for products, and in proportion to the elements for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_examples import EXAMPLES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.ops import DTYPE_NAMES, run_op
from polytrace.graph import NodeId, Op, Operand, Ref
from polytrace.ops import OPS, Cost
from scheduling.op_costs import op_flops
from scheduling.plan import ValueFacts

# torch counts what its kernels for these add and multiply; of the other products it sees no kernel that it counts
COUNTED = [
    *("matmul", "rmatmul", "bmm", "mm", "inner", "einsum", "tensordot", "linear", "addmm", "addbmm", "baddbmm"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"),
]


def facts(tensor: Tensor) -> ValueFacts:
    size = tensor.numel() * tensor.element_size()
    return ValueFacts(shape=tuple(tensor.shape), dtype=DTYPE_NAMES[tensor.dtype], num_bytes=size)


def cost(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The cost of a call by its shapes alone."""
    known: list[ValueFacts | None] = []

    def operand(part: Any) -> Operand:
        if isinstance(part, Tensor):
            known.append(facts(part))
            return Ref(NodeId(len(known) - 1))
        if isinstance(part, (tuple, list)):
            return tuple([operand(member) for member in part])
        plain: Operand = None if isinstance(part, torch.dtype) else part
        return plain

    op = Op(
        name=name,
        args=tuple([operand(part) for part in args]),
        kwargs={key: operand(part) for key, part in kwargs.items()},
        where="user.py:1",
    )
    result = run_op(name, args, kwargs, seed=(0, 0))
    known.append(facts(result) if isinstance(result, Tensor) else None)
    return op_flops(op, known, len(known) - 1)


@pytest.mark.parametrize("name", COUNTED)
def test_a_product_costs_what_torch_counts(name: str) -> None:
    for args, kwargs in EXAMPLES[name]:
        with FlopCounterMode(display=False) as counter:
            run_op(name, args, kwargs)
        if counted := counter.get_total_flops():
            found = cost(name, args, kwargs)
            assert found == counted or (len(args) > 3 and counted < found < 2 * counted), (args, kwargs)


def test_attention_and_factors_in_a_row_cost_their_products() -> None:
    heads = torch.randn(2, 3, 5, 4)
    assert cost("scaled_dot_product_attention", (heads, heads, heads), {}) == 2 * (2 * 2 * 3 * 5 * 5 * 4)
    first, second = torch.randn(2, 3), torch.randn(3, 4)
    assert cost("multi_dot", ([first, second],), {}) == 2 * 2 * 3 * 4


def test_every_row_has_a_cost_that_grows_with_its_operands() -> None:
    for name, examples in EXAMPLES.items():
        for args, kwargs in examples:
            found = cost(name, args, kwargs)
            if OPS[name].cost is Cost.FREE:
                assert found == 0, name
            elif not OPS[name].is_made:
                assert 0 < found < 10_000_000, (name, kwargs)
    large, small = torch.randn(40, 40), torch.randn(20, 20)
    for name, factor in (("exp", 4), ("sum", 4), ("mm", 8), ("svdvals", 8), ("inv", 8)):
        more = (large, large) if name == "mm" else (large,)
        less = (small, small) if name == "mm" else (small,)
        assert cost(name, more, {}) == factor * cost(name, less, {}), name
    assert 4 < cost("sort", (large,), {}) / cost("sort", (small,), {}) < 8
