"""Every row of the op table does what the plain torch call does, and in-place code is the same as on a clone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.ops import CALLABLES, DTYPE_NAMES, resolve, run_op
from engine.ranges import check_along, check_index, check_range
from polytrace.errors import GraphError
from polytrace.graph import DType, NodeId, Operand, Ref
from polytrace.ops import OPS, Results

torch.manual_seed(0)
X = torch.randn(2, 3, 4)
Y = torch.randn(2, 3, 4)
POSITIVE = X.abs() + 0.5
SQUARE = torch.randn(4, 4)
ROW = torch.randn(4)
IDS = torch.tensor([[0, 2, 1, 3], [1, 1, 0, 2]])
BITS = X > 0
INDEX = torch.tensor([[[0, 1, 2, 0]], [[2, 2, 1, 0]]])

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


UNARY = [
    "neg",
    "abs",
    "exp",
    "sign",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "erf",
    "floor",
    "ceil",
    "relu",
    "silu",
    "square",
    "expm1",
    "log1p",
]
LOGIC = ["isinf", "isfinite", "isnan", "logical_not"]
CASTS = ["float", "double", "half", "bfloat16", "long", "int", "bool", "contiguous"]
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]

EXAMPLES: dict[str, list[Call]] = {
    **{name: [call(X)] for name in UNARY + LOGIC},
    **{name: [call(X)] for name in CASTS},
    **{name: [call(POSITIVE)] for name in ("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal")},
    **{name: [call(X, Y), call(X, 0.5), call(X, other=Y)] for name in COMPARISONS},
    **{name: [call(BITS, X > 1)] for name in ("bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or")},
    "add": [call(X, Y), call(X, 2), call(X, Y, alpha=0.5), call(X, other=ROW)],
    "sub": [call(X, Y), call(X, other=Y, alpha=2)],
    "rsub": [call(X, 1.5), call(X, Y)],
    "mul": [call(X, Y), call(X, 3), call(X, other=Y)],
    "div": [call(X, POSITIVE), call(X, other=POSITIVE, rounding_mode="floor")],
    "rdiv": [call(POSITIVE, 2.0)],
    "floor_divide": [call(X, POSITIVE), call(IDS, 2)],
    "rfloor_divide": [call(IDS + 1, 7)],
    "remainder": [call(X, POSITIVE), call(IDS, 2)],
    "rremainder": [call(IDS + 1, 7)],
    "pow": [call(X, 2), call(POSITIVE, Y), call(POSITIVE, exponent=0.5)],
    "rpow": [call(X, 2.0)],
    "clamp": [call(X, -0.5, 0.5), call(X, min=0), call(X, max=Y)],
    "round": [call(X), call(X, decimals=2)],
    "maximum": [call(X, Y), call(X, other=Y)],
    "minimum": [call(X, Y), call(X, other=Y)],
    "gelu": [call(X), call(X, approximate="tanh")],
    "softplus": [call(X), call(X, beta=2, threshold=1)],
    "nan_to_num": [call(X / 0 * BITS), call(X / 0, nan=1.0, posinf=2.0, neginf=3.0)],
    "lerp": [call(X, Y, 0.5), call(X, end=Y, weight=POSITIVE)],
    "bitwise_not": [call(BITS), call(IDS)],
    "where": [call(BITS, X, Y), call(BITS, X, 0.0), call(BITS, 1.0, X)],
    "where_method": [call(X, BITS, Y), call(X, BITS, other=0.0)],
    "masked_fill": [call(X, BITS, 0.0), call(X, mask=BITS, value=-1e9)],
    "sum": [call(X), call(X, 1), call(X, dim=(0, 2), keepdim=True), call(IDS, dtype=torch.float64)],
    "mean": [call(X), call(X, -1, True), call(X, dim=(0, 1), keepdim=True, dtype=torch.float64)],
    "prod": [call(X), call(X, dim=1, keepdim=True, dtype=torch.float64)],
    "std": [call(X), call(X, 1), call(X, dim=1, correction=0), call(X, dim=1, unbiased=False, keepdim=True)],
    "var": [call(X), call(X, 1), call(X, dim=1, correction=0), call(X, dim=1, unbiased=False, keepdim=True)],
    "amax": [call(X), call(X, dim=(0, 1), keepdim=True)],
    "amin": [call(X), call(X, dim=(0, 1), keepdim=True)],
    "max": [call(X), call(X, 1), call(X, dim=1, keepdim=True), call(X, Y)],
    "min": [call(X), call(X, 1), call(X, dim=1, keepdim=True), call(X, Y)],
    "median": [call(X), call(X, 1), call(X, dim=1, keepdim=True)],
    "count_nonzero": [call(X), call(X, dim=1)],
    "argmax": [call(X), call(X, -1), call(X, dim=1, keepdim=True)],
    "argmin": [call(X), call(X, -1), call(X, dim=1, keepdim=True)],
    "all": [call(BITS), call(BITS, dim=1, keepdim=True)],
    "any": [call(BITS), call(BITS, dim=1, keepdim=True)],
    "logsumexp": [call(X, 1), call(X, dim=(0, 1), keepdim=True)],
    "norm": [call(X), call(X, 1, -1), call(X, dim=-1, keepdim=True), call(X, p=3, dim=1, dtype=torch.float64)],
    "linalg_norm": [
        call(X),
        call(SQUARE, "nuc"),
        call(X, dim=-1, keepdim=True),
        call(SQUARE, ord=1, dtype=torch.float64),
    ],
    "vector_norm": [call(X), call(X, 1, -1), call(X, ord=3, dim=(0, 1), keepdim=True, dtype=torch.float64)],
    "cumsum": [call(X, 1), call(IDS, dim=-1, dtype=torch.float32)],
    "cumprod": [call(X, 1), call(IDS, dim=-1, dtype=torch.float32)],
    "matmul": [call(X, SQUARE), call(X, ROW), call(X, other=SQUARE)],
    "rmatmul": [call(SQUARE, X), call(SQUARE, ROW)],
    "bmm": [call(X, Y.transpose(1, 2))],
    "mm": [call(SQUARE, SQUARE)],
    "dot": [call(ROW, SQUARE[0])],
    "outer": [call(ROW, SQUARE[0])],
    "einsum": [call("btd,de->bte", X, SQUARE), call("btd,btd->b", X, Y), call("bt d,de,e->b t", X, SQUARE, ROW)],
    "linear": [call(X, SQUARE), call(X, weight=SQUARE, bias=ROW)],
    "cosine_similarity": [call(X, Y), call(X, Y, dim=-1, eps=1e-3)],
    "softmax": [call(X, -1), call(X, dim=1, dtype=torch.float64)],
    "log_softmax": [call(X, -1), call(X, dim=1, dtype=torch.float64)],
    "layer_norm": [call(X, (4,)), call(X, normalized_shape=[4], weight=ROW, bias=ROW, eps=1e-3)],
    "normalize": [call(X), call(X, 1, -1), call(X, p=3.0, dim=-1, eps=1e-3)],
    "topk": [call(X, 2), call(X, k=2, dim=1, largest=False, sorted=True)],
    "sort": [call(X), call(X, dim=1, descending=True), call(X, stable=True)],
    "argsort": [call(X), call(X, dim=1, descending=True, stable=True)],
    "gather": [call(X, 1, INDEX), call(X, dim=1, index=INDEX)],
    "index_select": [call(X, 1, IDS[0, :3] % 3), call(X, dim=1, index=torch.tensor([2, 0]))],
    "take_along_dim": [call(X, INDEX, 1), call(X, indices=INDEX, dim=1), call(X, torch.tensor([5, 23]))],
    "scatter": [call(X, 1, INDEX, Y), call(X, dim=1, index=INDEX, value=2.0), call(X, dim=1, index=INDEX, src=Y)],
    "scatter_add": [call(X, 1, INDEX, Y), call(X, dim=1, index=INDEX, src=Y)],
    "index_add": [
        call(X, 1, torch.tensor([2, 0]), Y[:, :2]),
        call(X, dim=1, index=torch.tensor([2]), source=Y[:, :1], alpha=3),
    ],
    "one_hot": [call(IDS), call(IDS, num_classes=7)],
    "tril": [call(SQUARE), call(SQUARE, diagonal=1)],
    "triu": [call(SQUARE), call(SQUARE, diagonal=-1)],
    "cat": [call([X, Y], 1), call((X, Y), dim=-1)],
    "stack": [call([X, Y], 1), call((X, Y), dim=-1)],
    "getitem": [call(X, 0), call(X, (slice(None), -1)), call(X, (Ellipsis, None, slice(1, 3))), call(X, BITS)],
    "view": [call(X, 6, 4), call(X, (2, -1)), call(X, torch.int32)],
    "reshape": [call(X, 6, 4), call(X, (2, -1)), call(X.transpose(0, 1), shape=(6, 4))],
    "flatten": [call(X), call(X, 1), call(X, start_dim=0, end_dim=1)],
    "unflatten": [call(X, 2, (2, 2)), call(X, dim=-1, sizes=(2, -1))],
    "transpose": [call(X, 1, 2), call(X, dim0=0, dim1=-1)],
    "permute": [call(X, 2, 0, 1), call(X, (2, 0, 1)), call(X, dims=(0, 2, 1))],
    "t": [call(SQUARE)],
    "movedim": [call(X, 0, 2), call(X, source=(0, 1), destination=(1, 2))],
    "squeeze": [call(X[:1]), call(X[:1], 0), call(X[:1], dim=0)],
    "unsqueeze": [call(X, 1), call(X, dim=-1)],
    "expand": [call(ROW, 2, 3, 4), call(X[:1], (5, -1, -1))],
    "expand_as": [call(ROW, X), call(X[:1], other=X)],
    "select": [call(X, 1, 2), call(X, dim=1, index=-1)],
    "narrow": [call(X, 1, 0, 2), call(X, dim=1, start=1, length=2)],
    "diagonal": [call(X), call(X, offset=1, dim1=1, dim2=2)],
    "unbind": [call(X), call(X, dim=1)],
    "split": [call(X, 2, 1), call(X, [1, 2], dim=1)],
    "chunk": [call(X, 2), call(X, chunks=2, dim=-1)],
    "repeat": [call(X, 2, 1, 1), call(ROW, (3, 2))],
    "repeat_interleave": [call(X, 2), call(X, repeats=2, dim=1), call(X, torch.tensor([1, 0, 2]), dim=1)],
    "flip": [call(X, 0), call(X, (0, 1)), call(X, dims=(-1,))],
    "roll": [call(X, 1), call(X, 1, 0), call(X, shifts=(1, 2), dims=(0, 1))],
    "to": [call(X, torch.float64), call(X, IDS), call(X, dtype=torch.bfloat16)],
    "type_as": [call(X, IDS)],
    "clone": [call(X)],
    "detach": [call(X)],
    "zeros_like": [call(X), call(X, dtype=torch.int64)],
    "ones_like": [call(X), call(X, dtype=torch.bfloat16)],
    "full_like": [call(X, 3), call(X, fill_value=2.5, dtype=torch.float64)],
}
RECORDED_BY_THE_CLIENT = {"left_pad", "item", "setitem", "set_view"}
RANDOM = {"randn_like", "rand_like"}


def plain(name: str) -> Callable[..., Any]:
    """The torch callable behind a name of the table, found without the table's own callables."""
    place, _, attribute = name.partition(".")
    places: dict[str, Any] = {
        "Tensor": Tensor,
        "torch": torch,
        "functional": torch.nn.functional,
        "linalg": torch.linalg,
    }
    found: Callable[..., Any] = getattr(places[place], attribute)
    return found


def equal(got: Any, expected: Any) -> bool:
    if isinstance(expected, (tuple, list)):
        return len(got) == len(expected) and all(map(equal, got, expected))
    same_kind = got.dtype is expected.dtype and got.shape == expected.shape
    return same_kind and torch.equal(torch.nan_to_num(got), torch.nan_to_num(expected))


def tensors(operand: Any) -> list[Tensor]:
    if isinstance(operand, Tensor):
        return [operand]
    if isinstance(operand, dict):
        operand = list(operand.values())
    return [tensor for part in operand for tensor in tensors(part)] if isinstance(operand, (tuple, list)) else []


def test_the_table_and_the_callables_have_the_same_names() -> None:
    assert set(OPS) == set(CALLABLES) | RANDOM
    assert set(OPS) == set(EXAMPLES) | RANDOM | RECORDED_BY_THE_CLIENT


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_is_the_plain_torch_call(name: str) -> None:
    for torch_name in OPS[name].torch:
        for args, kwargs in EXAMPLES[name]:
            if kwargs and ("__" in torch_name or torch_name.split(".")[1] in ("true_divide", "swapaxes", "swapdims")):
                continue  # an operator has no keywords, an alias other ones
            if torch_name in ("torch.permute", "torch.reshape", "torch.flip") and len(args) > 2:
                continue  # only the method takes sizes and dims one by one
            if torch_name in ("torch.permute", "torch.flip") and isinstance((*args, None)[1], int):
                continue
            expected = plain(torch_name)(*args, **kwargs)
            assert equal(run_op(name, args, kwargs, seed=None), expected), (torch_name, args, kwargs)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_changes_no_operand_and_returns_tensors(name: str) -> None:
    for args, kwargs in EXAMPLES[name]:
        operands = tensors([args, kwargs])
        before = [operand.clone() for operand in operands]
        result = run_op(name, args, kwargs, seed=None)
        assert all(map(equal, operands, before))
        several = OPS[name].results
        is_many = several in (Results.TWO, Results.LIST) or (
            several is Results.TWO_WITH_DIM and not isinstance(result, Tensor)
        )
        assert all(isinstance(member, Tensor) for member in (result if is_many else [result]))


def test_every_keyword_of_the_table_is_tried_and_taken() -> None:
    function_only = {
        ("where", "condition"),
        ("where", "input"),
        ("where", "other"),
        ("where_method", "condition"),
        ("split", "split_size"),
        ("split", "split_size_or_sections"),
    }
    for name, examples in EXAMPLES.items():
        tried = {key for _, kwargs in examples for key in kwargs}
        assert OPS[name].kwargs - tried <= {key for op, key in function_only if op == name}, name
    assert equal(run_op("where", (), {"condition": BITS, "input": X, "other": Y}), torch.where(BITS, X, Y))
    assert equal(run_op("split", (X,), {"split_size": 2, "dim": 1}), X.split(2, 1))
    assert equal(run_op("split", (X,), {"split_size_or_sections": [1, 2], "dim": 1}), torch.split(X, [1, 2], 1))
    assert equal(run_op("where_method", (X,), {"condition": BITS, "other": Y}), X.where(BITS, Y))


@pytest.mark.parametrize("key", ["out", "device", "generator", "layout", "pin_memory", "memory_format"])
def test_keywords_that_name_memory_devices_or_generators_are_refused(key: str) -> None:
    for name in OPS:
        with pytest.raises(GraphError, match=f"{name} does not take {key} here"):
            run_op(name, (X,), {key: None})


def test_positional_forms_that_write_or_move_are_refused() -> None:
    with pytest.raises(TypeError):
        run_op("silu", (X, True), {})
    with pytest.raises(TypeError):
        run_op("normalize", (X, 2.0, 1, 1e-12, Y), {})
    with pytest.raises(TypeError):
        run_op("norm", (X, 2, 1, False, Y[:, 0]), {})
    with pytest.raises(TypeError, match="no device"):
        run_op("to", (X, "cpu"), {})
    with pytest.raises(TypeError):
        run_op("relu", (X, True), {})


def test_operands_resolve_at_any_depth() -> None:
    values = {NodeId(3): X, NodeId(5): torch.tensor(1)}
    operand: Operand = [Ref(NodeId(3)), (slice(Ref(NodeId(5)), None), Ellipsis, DType("bfloat16")), 1.5, "x", True]
    first, (cut, dots, dtype), *rest = resolve(operand, values)
    assert first is X and cut == slice(values[NodeId(5)], None) and dots is Ellipsis
    assert dtype is torch.bfloat16 and rest == [1.5, "x", True]
    assert DTYPE_NAMES[dtype] == "bfloat16"


def test_a_name_outside_the_table_runs_nothing() -> None:
    for kwargs in ({}, {"dim": 1}):
        with pytest.raises(GraphError, match="no operation '__class__'"):
            run_op("__class__", (X,), kwargs)


# --- several results


def test_item_takes_one_of_several_results() -> None:
    pair = run_op("topk", (X, 2), {})
    assert equal(run_op("item", (pair, 1), {}), X.topk(2).indices)
    with pytest.raises(TypeError, match="one of several"):
        run_op("item", (X, 0), {})
    with pytest.raises(IndexError):
        run_op("item", (pair, 2), {})


# --- indexing and in-place code, against torch on a clone


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...] = (2, 3, 4), *, basic: bool = False) -> Any:
    """An index that torch accepts for the shape: ints, slices, None, Ellipsis and, unless basic, lists and tensors."""

    def part(size: int) -> Any:
        whole = st.integers(-size, size - 1)
        bound = st.none() | st.integers(-size - 1, size + 1)
        kinds = [whole, st.builds(slice, bound, bound, st.none() | st.integers(1, 2))]
        if not basic:
            kinds.append(st.lists(whole, min_size=2, max_size=2).map(torch.tensor))
            kinds.append(st.lists(whole, min_size=2, max_size=2))
        return draw(st.one_of(kinds))

    kept = draw(st.integers(0, len(shape)))
    parts = [part(size) for size in shape[:kept]]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), None)
    if draw(st.booleans()):
        parts.append(Ellipsis)
    if not basic and not parts and draw(st.booleans()):
        return torch.tensor(draw(st.lists(st.booleans(), min_size=24, max_size=24))).view(2, 3, 4)
    return parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)


BASES = {
    "contiguous": X,
    "transposed": X.transpose(0, 2).contiguous().transpose(0, 2),
    "sliced": torch.randn(4, 3, 8)[::2, :, ::2],
    "expanded": torch.randn(1, 3, 1).expand(2, 3, 4),
    "integers": torch.arange(24).view(2, 3, 4),
    "bfloat16": X.bfloat16(),
}


@settings(deadline=None)
@given(index=indices(), base=st.sampled_from(sorted(BASES)))
def test_getitem_is_torchs(index: Any, base: str) -> None:
    assert equal(run_op("getitem", (BASES[base], index), {}), BASES[base][index])


@settings(deadline=None)
@given(
    index=indices(), base=st.sampled_from(sorted(BASES)), kind=st.sampled_from(["scalar", "tensor", "row", "float64"])
)
def test_setitem_is_in_place_code_on_a_clone(index: Any, base: str, kind: str) -> None:
    original = BASES[base]
    before = original.clone()
    part = original[index]
    value: Any = 2.5
    if kind == "tensor":
        value = torch.randn(part.shape).to(original.dtype)
    elif kind == "row" and part.dim():
        value = torch.randn(part.shape[-1:])
    elif kind == "float64":
        value = torch.randn(part.shape, dtype=torch.float64)
    expected: Any = original.clone()
    failure = None
    try:
        expected[index] = value.to(original.dtype) if isinstance(value, Tensor) else value
    except (RuntimeError, IndexError) as error:
        failure = str(error)
    if failure is not None:
        with pytest.raises((RuntimeError, IndexError)):
            run_op("setitem", (original, index, value), {})
        return
    assert equal(run_op("setitem", (original, index, value), {}), expected)
    assert torch.equal(original, before)


STEPS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "transpose": ((0, -1), {}),
    "permute": ((2, 0, 1), {}),
    "movedim": ((0, 1), {}),
    "unsqueeze": ((), {"dim": 1}),
    "squeeze": ((), {}),
    "select": ((0, -1), {}),
    "narrow": ((), {"dim": 0, "start": 0, "length": 1}),
    "getitem": ((slice(None, None, 2),), {}),
    "unflatten": ((-1, (2, -1)), {}),
}


@settings(deadline=None)
@given(
    chain=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4),
    base=st.sampled_from(sorted(BASES)),
    scalar=st.booleans(),
)
def test_set_view_is_in_place_code_on_a_view_of_a_clone(chain: list[str], base: str, scalar: bool) -> None:
    original = BASES[base]
    before, expected = original.clone(), original.clone()
    view: Any = expected
    for name in chain:
        args, kwargs = STEPS[name]
        try:
            view = plain(OPS[name].torch[0])(view, *args, **kwargs)
        except (RuntimeError, IndexError):
            return
    value: Any = 7 if scalar else torch.randn(view.shape)
    view[...] = value
    steps = tuple((name, STEPS[name][0], tuple(STEPS[name][1].items())) for name in chain)
    assert equal(run_op("set_view", (original, steps, value), {}), expected)
    assert torch.equal(original, before)


@settings(deadline=None)
@given(index=indices(basic=True), more=st.sampled_from(["t", "view", "none"]))
def test_set_view_walks_getitem_steps(index: Any, more: str) -> None:
    expected = X.clone()
    view = expected[index]
    steps: list[Any] = [("getitem", (index,), ())]
    if more == "t" and view.dim() == 2:
        view, steps = view.t(), [*steps, ("t", (), ())]
    if more == "view" and view.is_contiguous():
        view, steps = view.view(-1), [*steps, ("view", (-1,), ())]
    view[...] = view * 2 + 1
    assert equal(run_op("set_view", (X, tuple(steps), view.clone()), {}), expected)


def test_set_view_reaches_one_of_several_views() -> None:
    expected = X.clone()
    expected.chunk(2, dim=-1)[1].fill_(0)
    steps = (("chunk", (2,), (("dim", -1),)), ("item", (1,), ()))
    assert equal(run_op("set_view", (X, steps, 0), {}), expected)


def test_set_view_refuses_steps_that_copy() -> None:
    with pytest.raises(GraphError, match="copy"):
        run_op("set_view", (X, (("getitem", (torch.tensor([0]),), ()),), 0), {})
    for name in ("clone", "mul", "no_such_op", "set_view"):
        with pytest.raises(GraphError, match="copy"):
            run_op("set_view", (X, ((name, (), ()),), 0), {})
    with pytest.raises(TypeError, match="one tensor"):
        run_op("set_view", (X, (("unbind", (), ()),), 0), {})


# --- ranges, which a GPU kernel does not check


@settings(deadline=None)
@given(parts=st.lists(st.integers(-4, 4), min_size=1, max_size=3), lists=st.integers(0, 7), ends=st.booleans())
def test_an_index_is_in_range_where_torch_says_so(parts: list[int], lists: int, ends: bool) -> None:
    index: tuple[Any, ...] = tuple(
        torch.tensor([0, part]) if lists >> i & 1 else slice(None) for i, part in enumerate(parts)
    )
    index = (Ellipsis, *index) if ends else (None, *index)
    try:
        _ = X[index]
    except IndexError:
        with pytest.raises(IndexError, match="out of bounds"):
            check_index(X, index)
    else:
        check_index(X, index)


def test_indices_along_a_dimension_have_no_signs() -> None:
    check_along(X, 1, torch.tensor([0, 2]))
    check_along(X, 1, torch.tensor([], dtype=torch.int64))
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match=f"index {wrong} is out of bounds for a dimension with size 3"):
            check_along(X, 1, torch.tensor([0, wrong]))
    with pytest.raises(IndexError):
        check_range(torch.tensor([-1]), None, is_signed=False)


# --- random ops


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_draws_depend_on_the_seed_and_the_node_only(name: str) -> None:
    first = run_op(name, (X,), {}, seed=(1, 5))
    torch.manual_seed(99)
    assert torch.equal(first, run_op(name, (Y,), {}, seed=(1, 5)))
    assert not torch.equal(first, run_op(name, (X,), {}, seed=(1, 6)))
    assert not torch.equal(first, run_op(name, (X,), {}, seed=(2, 5)))
    assert run_op(name, (X,), {"dtype": torch.bfloat16}, seed=(1, 5)).dtype is torch.bfloat16


def test_draws_leave_the_process_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    run_op("randn_like", (X,), {}, seed=(0, 0))
    assert torch.equal(torch.randn(2), expected)


def test_draws_are_of_the_named_distribution() -> None:
    like = torch.empty(10_000)
    normal, uniform = run_op("randn_like", (like,), {}, seed=(0, 1)), run_op("rand_like", (like,), {}, seed=(0, 1))
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02


def test_integers_are_not_drawn() -> None:
    with pytest.raises(TypeError, match="floating"):
        run_op("randn_like", (IDS,), {}, seed=(0, 0))
