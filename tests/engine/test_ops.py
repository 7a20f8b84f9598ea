"""Every row of the op table does what the plain torch call does, and in-place code is the same as on a clone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_examples import (
    BATCH,
    DETERMINED,
    DRAWN,
    EMPTY,
    EXAMPLES,
    IDS,
    MADE,
    RECORDED_BY_THE_CLIENT,
    ROW,
    SQUARE,
    SYMMETRIC,
    TALL,
    UNIT,
    X,
    Y,
    tensors,
)
from torch import Tensor

from engine.forms import FORMS
from engine.meta import Meta, freeze, result_of
from engine.ops import CALLABLES, DTYPE_NAMES, resolve, run_op
from engine.ranges import check_along, check_index, check_range
from polytrace.errors import GraphError
from polytrace.graph import DType, NodeId, Operand, Ref
from polytrace.ops import BY_TORCH_NAME, OPS, Cost, Results
from polytrace.torch_names import find


def plain(name: str) -> Callable[..., Any]:
    """The torch callable behind a name of the table."""
    found: Callable[..., Any] = find(name)
    return found


def equal(got: Any, expected: Any) -> bool:
    if isinstance(expected, (tuple, list)):
        return len(got) == len(expected) and all(map(equal, got, expected))
    if expected.is_complex() and got.is_complex():
        got, expected = torch.view_as_real(got.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    same_kind = got.dtype is expected.dtype and got.shape == expected.shape
    return same_kind and torch.equal(torch.nan_to_num(got), torch.nan_to_num(expected))


def test_the_table_and_the_callables_have_the_same_names() -> None:
    made = {name for name, spec in OPS.items() if spec.is_random or spec.is_made}
    assert set(OPS) == set(CALLABLES) | made
    assert set(OPS) == set(EXAMPLES) | RECORDED_BY_THE_CLIENT
    assert set(FORMS) <= set(CALLABLES)


def test_the_table_has_what_people_use() -> None:
    rows = {name for name, spec in OPS.items() if any(find(torch_name) is not None for torch_name in spec.torch)}
    assert len(rows) >= 300
    assert all(find(name) is not None for name in BY_TORCH_NAME if not name.startswith("polytrace."))


# What the one op's two or more torch callables do not all take; each form has another callable that does.
ONLY_BY_SOME = {
    "rsub": "Tensor.__rsub__",
    "div": "true_divide",
    "pinv": "pinverse",
    "transpose": "swap",
    "reshape": "torch.reshape",
    "permute": "torch.permute",
    "flip": "torch.flip",
    "split": "split",
}


@pytest.mark.filterwarnings("ignore:torch.cholesky is deprecated", "ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", DETERMINED)
def test_an_op_is_the_plain_torch_call(name: str) -> None:
    for args, kwargs in DETERMINED[name]:
        got, compared = run_op(name, args, kwargs, seed=None), 0
        for torch_name in OPS[name].torch:
            if torch_name.startswith("polytrace.") or (kwargs and "__" in torch_name):
                continue  # an operator has no keywords
            try:
                expected = plain(torch_name)(*args, **kwargs)
            except TypeError:
                assert ONLY_BY_SOME.get(name, "-") in torch_name, (torch_name, args, kwargs)
                continue
            if expected is not NotImplemented:
                expected = expected[:1] if name == "lstsq" else expected
                # LAPACK's last bits follow where its memory lies
                agree = agrees if OPS[name].cost is Cost.DECOMPOSITION else equal
                assert agree(got, expected), (torch_name, args, kwargs)
                compared += 1
        assert compared or OPS[name].torch[0].startswith("polytrace."), (name, kwargs)


def agrees(got: Any, expected: Any) -> bool:
    """As `equal`, but for max|a-b| <= 1e-5 max(1, max|b|)."""
    if isinstance(expected, (tuple, list)):
        return len(got) == len(expected) and all(map(agrees, got, expected))
    if got.dtype is not expected.dtype or got.shape != expected.shape:
        return False
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return bool(((got - expected).abs() <= 1e-5 * scale).all())


@pytest.mark.parametrize("name", MADE)
def test_a_tensor_of_sizes_alone_is_torchs(name: str) -> None:
    for args, kwargs in MADE[name]:
        assert equal(run_op(name, args, kwargs), getattr(torch, name)(*args, **kwargs))


@pytest.mark.parametrize("name", EMPTY)
def test_memory_that_was_anothers_is_not_read(name: str) -> None:
    for args, kwargs in EMPTY[name]:
        expected = plain(OPS[name].torch[0])(*args, **kwargs)
        got = run_op(name, args, kwargs)
        assert got.shape == expected.shape and got.dtype is expected.dtype and not got.any()


def test_decompositions_are_torchs_as_far_as_they_are_determined() -> None:
    for matrix in (BATCH, TALL):
        u, s, vh = run_op("svd", (matrix,), {"full_matrices": False})
        assert close((u * s[..., None, :]) @ vh, matrix) and close(s, torch.linalg.svdvals(matrix))
        u, s, v = run_op("svd_v", (matrix,), {})
        assert close((u * s[..., None, :]) @ v.mT, matrix)
        q, r = run_op("qr", (matrix,), {"mode": "reduced"})
        assert (
            close(q @ r, matrix) and close(q.mT @ q, torch.eye(q.shape[-1]).expand(2, -1, -1)) and not r.tril(-1).any()
        )
    values, vectors = run_op("eigh", (SYMMETRIC,), {"UPLO": "L"})
    assert close(vectors * values @ vectors.T, SYMMETRIC) and close(values, torch.linalg.eigvalsh(SYMMETRIC))
    values, vectors = run_op("eig", (SQUARE,), {})
    assert close((vectors * values @ torch.linalg.inv(vectors)).real, SQUARE)
    found = run_op("eigvals", (SQUARE,), {})
    assert close(found.sum().real, SQUARE.trace()) and close(found.prod().real, torch.linalg.det(SQUARE))


def close(got: Tensor, expected: Tensor) -> bool:
    """float32, max|a-b| <= 1e-4 max(1, max|b|): sums of products of decomposed matrices."""
    assert got.dtype is expected.dtype and got.shape == expected.shape
    return float((got - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_shape_rule_says_what_an_op_returns(name: str) -> None:
    if name in ("getitem", "one_hot", "repeat_interleave") or OPS[name].needs_values:
        return  # where values decide: `test_shapes`
    for args, kwargs in EXAMPLES[name]:
        frozen = tuple([freeze(as_meta(part), {}) for part in args])
        named = tuple([(key, freeze(as_meta(part), {})) for key, part in kwargs.items()])
        told, value = result_of(name, frozen, named), run_op(name, args, kwargs, seed=(0, 0))
        assert form(told) == form(value), (name, kwargs)


def as_meta(part: Any) -> Any:
    if isinstance(part, Tensor):
        return Meta(tuple(part.shape), part.stride(), part.dtype)
    if isinstance(part, torch.dtype):
        return DType(DTYPE_NAMES[part])
    if isinstance(part, (tuple, list)):
        return type(part)([as_meta(member) for member in part])
    return part


def form(value: Any) -> Any:
    if isinstance(value, (Tensor, Meta)):
        return tuple(value.shape), value.dtype
    return tuple(map(form, value))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_changes_no_operand_and_returns_tensors(name: str) -> None:
    for args, kwargs in EXAMPLES[name]:
        operands = tensors([args, kwargs])
        before = [operand.clone() for operand in operands]
        result = run_op(name, args, kwargs, seed=(0, 0))
        assert all(map(equal, operands, before))
        several = OPS[name].results
        is_many = several in (Results.NAMED, Results.LIST) or (
            several is Results.PAIR_WITH_DIM and not isinstance(result, Tensor)
        )
        assert all(isinstance(member, Tensor) for member in (result if is_many else [result]))
        if several is Results.NAMED:
            assert len(result) == len(OPS[name].fields)


def test_every_keyword_of_the_table_is_tried() -> None:
    for name, examples in EXAMPLES.items():
        tried = {key for _, kwargs in examples for key in kwargs} | {"draw"}  # which the recording gives
        assert OPS[name].kwargs <= tried, name


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


@pytest.mark.parametrize("name", DRAWN)
def test_draws_depend_on_the_seed_and_the_node_only(name: str) -> None:
    for args, kwargs in DRAWN[name]:
        first = run_op(name, args, kwargs, seed=(1, 5))
        torch.manual_seed(99)
        assert equal(first, run_op(name, args, kwargs, seed=(1, 5)))
        assert not equal(first, run_op(name, args, kwargs, seed=(1, 6)))
        assert not equal(first, run_op(name, args, kwargs, seed=(2, 5)))


def test_draws_leave_the_process_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    for name, examples in DRAWN.items():
        run_op(name, *examples[0], seed=(0, 0))
    assert torch.equal(torch.randn(2), expected)


def test_draws_are_of_the_named_distribution() -> None:
    like = torch.zeros(10_000)
    rate, seed = torch.full((10_000,), 0.3), (0, 1)

    def moments(name: str, *args: Any, **kwargs: Any) -> tuple[float, float]:
        drawn = run_op(name, args, kwargs, seed=seed).float()
        return round(float(drawn.mean()), 1), round(float(drawn.std()), 1)

    assert moments("randn_like", like) == moments("randn", 10_000) == moments("normal_like", like) == (0, 1)
    assert moments("normal_like", like, 2, std=3) == moments("normal", like + 2, 3.0) == (2, 3)
    assert moments("rand_like", like) == moments("rand", 10_000) == moments("uniform_like", like) == (0.5, 0.3)
    assert moments("uniform_like", like, **{"from": 2.0, "to": 4.0}) == (3, 0.6)
    assert moments("exponential_like", like, 2.0) == (0.5, 0.5)
    assert moments("bernoulli", rate) == moments("bernoulli_like", like, 0.3) == (0.3, 0.5)
    assert moments("poisson", rate * 10) == (3, 1.7)
    assert moments("randint", 0, 3, (10_000,)) == moments("randint_like", like, 3) == (1, 0.8)
    assert moments("multinomial", torch.tensor([1.0, 0.0, 1.0]), 10_000, True) == (1, 1)
    assert moments("dropout", like + 1, 0.25) == (1, 0.6)
    assert sorted(run_op("randperm", (9,), {}, seed=seed).tolist()) == list(range(9))
    normal = run_op("randn_like", (like,), {}, seed=(0, 2))
    assert moments("alpha_dropout", normal, 0.2, True) == (0, 1)


def test_dropout_puts_out_a_share_and_scales_the_rest() -> None:
    dropped = run_op("dropout", (UNIT, 0.5, True), {}, seed=(0, 0))
    assert torch.equal(dropped, torch.where(dropped == 0, 0, UNIT * 2)) and 0 < (dropped == 0).sum() < UNIT.numel()
    assert torch.equal(run_op("dropout", (UNIT, 0.5, False), {}, seed=(0, 0)), UNIT)
    assert not run_op("dropout", (UNIT, 1.0), {}, seed=(0, 0)).any()
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        run_op("dropout", (UNIT, 2.0), {}, seed=(0, 0))


def test_integers_are_not_drawn() -> None:
    for name in ("randn_like", "normal_like"):
        with pytest.raises(TypeError, match="only floating dtypes are drawn, not int64"):
            run_op(name, (IDS,), {}, seed=(0, 0))


# --- forms that torch has and a graph has not


def test_forms_that_change_an_operand_or_draw_are_refused() -> None:
    with pytest.raises(TypeError, match="in training mode"):
        run_op("batch_norm", (X, X[0, :, 0], X[0, :, 0], None, None, True), {})
    with pytest.raises(TypeError, match="in training mode"):
        run_op("instance_norm", (X, X[0, :, 0], X[0, :, 0]), {})
    with pytest.raises(TypeError, match="max_norm"):
        run_op("embedding", (IDS, SQUARE, None, 1.0), {})
    with pytest.raises(TypeError, match="draws nothing"):
        run_op("scaled_dot_product_attention", (X, X, X, None, 0.1), {})
    for name in ("elu", "leaky_relu", "hardtanh", "celu", "threshold", "relu6"):
        with pytest.raises(TypeError, match="positional arguments"):
            run_op(name, (X, 0.5, 0.5, True), {})


def test_a_choice_takes_one_side_whole() -> None:
    nan = torch.full((2,), torch.nan)
    assert torch.equal(run_op("cond", (torch.tensor(True), ROW[:2], nan), {}), ROW[:2])
    assert torch.equal(run_op("cond", (torch.tensor([[0.0]]), nan, ROW[:2]), {}), ROW[:2])
    with pytest.raises(TypeError, match="one number"):
        run_op("cond", (torch.tensor([1, 0]), ROW, ROW), {})
    with pytest.raises(TypeError, match="one shape and dtype"):
        run_op("cond", (torch.tensor(1), ROW, ROW[:1]), {})
