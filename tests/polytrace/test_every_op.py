"""Every row of the op table, written as people write it in a trace on a real model, gives what plain torch gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import op_examples
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_examples import Call
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import polytrace
from polytrace import functions
from polytrace.ops import OPS, Results
from polytrace.torch_names import find

KINDS: dict[str, dict[str, list[Call]]] = {
    "elementwise": op_examples.ELEMENTWISE,
    "reductions": op_examples.REDUCTIONS,
    "products": op_examples.PRODUCTS,
    "selection": {name: calls for name, calls in op_examples.SELECTION.items() if name != "cond"},
    "layout": op_examples.LAYOUT,
    "networks": op_examples.NETWORKS,
}
VALUES_DECIDE = {"masked_select", "nonzero", "argwhere", "unique", "unique_consecutive", "bincount"}
# torch's own second names that take other arguments than the first
OTHER_FORMS = ("true_divide", "pinverse", "swap", "torch.reshape", "torch.permute", "torch.flip", "split", "__rsub__")

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.cholesky is deprecated"),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=8, n_layer=2, n_head=2, n_inner=8)
    GPT2LMHeadModel(config).save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as loaded:
        yield loaded


class Recorder:
    """Makes values of a trace of tensors: of each the same content, and nobody knows it before the run."""

    def __init__(self, model: Any) -> None:
        hidden = model.transformer.h[0].output[0].flatten()[0]
        self.is_true = hidden == hidden
        self.known: dict[int, tuple[Tensor, Any]] = {}

    def value(self, part: Any) -> Any:
        """The recorded value of a tensor; nested arguments with such values."""
        if isinstance(part, Tensor):
            if id(part) not in self.known:
                self.known[id(part)] = part, self._made(part)
            return self.known[id(part)][1]
        if isinstance(part, (tuple, list)):
            return type(part)([self.value(member) for member in part])
        return part

    def _made(self, tensor: Tensor) -> Any:
        if tensor.is_complex():
            return torch.complex(self._made(tensor.real), self._made(tensor.imag))
        return torch.where(self.is_true, tensor.clone(), tensor.clone())


@dataclass
class Trial:
    name: str
    kwargs: Mapping[str, Any]
    expected: list[Tensor]
    shapes: list[tuple[tuple[int, ...], torch.dtype]]  # as the client says while it records
    saved: list[Any]


def flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def real(value: Any) -> Any:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def tried(recorder: Recorder, name: str, torch_name: str, args: Any, kwargs: Any) -> Trial | None:
    """One call, in torch and in the trace; None where this name does not take these arguments."""
    function: Callable[..., Any] = find(torch_name)
    try:
        expected = function(*args, **kwargs)
    except TypeError:
        assert any(form in torch_name for form in OTHER_FORMS), (torch_name, args, kwargs)
        return None
    if expected is NotImplemented:
        return None
    plain = flat(expected)[:1] if name == "lstsq" else flat(expected)
    result = function(*recorder.value(args), **{key: recorder.value(part) for key, part in kwargs.items()})
    values = flat(result)
    shapes = [(tuple(value.shape), value.dtype) for value in values]
    if OPS[name].results is Results.NAMED:
        assert result._fields == OPS[name].fields
    return Trial(name, kwargs, plain, shapes, [real(value).save() for value in values])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_recorded_by_each_of_its_names_is_the_plain_call(model: Any, kind: str) -> None:
    trials: list[Trial] = []
    with model.trace([1, 2, 3]):
        recorder = Recorder(model)
        for name, calls in KINDS[kind].items():
            if name in VALUES_DECIDE or name == "getitem":
                continue
            names = [each for each in OPS[name].torch if not each.startswith("polytrace.")]
            for args, kwargs in calls:
                if (
                    name in ("one_hot", "repeat_interleave")
                    and not set(kwargs) >= {"num_classes"}
                    and (name == "one_hot" or isinstance(args[-1], Tensor))
                ):
                    continue  # its shape would depend on values
                made = [tried(recorder, name, each, args, kwargs) for each in names if not (kwargs and "__" in each)]
                found = [trial for trial in made if trial is not None]
                assert found or all("__" in each for each in names), (name, kwargs)
                trials.extend(found)
    assert {trial.name for trial in trials} >= KINDS[kind].keys() - VALUES_DECIDE - {"getitem"}
    for trial in trials:
        assert len(trial.saved) == len(trial.expected), trial.name
        for got, expected, (shape, dtype) in zip(trial.saved, trial.expected, trial.shapes, strict=True):
            assert shape == expected.shape and dtype is expected.dtype, (trial.name, trial.kwargs)
            assert same(got, expected), (trial.name, trial.kwargs)


def same(got: Tensor, expected: Tensor) -> bool:
    """Same dtype and shape; max|a-b| <= 1e-5 max(1, max|b|), NaN and infinities in the same places."""
    expected = real(expected)
    if got.dtype is not expected.dtype or got.shape != expected.shape:
        return False
    if not got.is_floating_point():
        return torch.equal(got, expected)
    a, b = got.double().nan_to_num(), expected.double().nan_to_num()
    scale = max(1.0, float(b[b.abs() < 1e30].abs().max())) if (b.abs() < 1e30).any() else 1.0
    is_close = bool(((a - b).abs() <= 1e-5 * scale).logical_or(b.abs() >= 1e30).all())
    return is_close and torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


def test_what_is_undetermined_is_compared_by_what_it_makes(model: Any) -> None:
    batch, symmetric = op_examples.BATCH, op_examples.SYMMETRIC
    with model.trace([1, 2, 3]):
        recorder = Recorder(model)
        u, s, vh = torch.linalg.svd(recorder.value(batch))
        restored = (u @ torch.diag_embed(s) @ vh).save()
        old = recorder.value(batch).svd()
        also = (old.U @ torch.diag_embed(old.S) @ old.V.mT).save()
        q, r = torch.linalg.qr(recorder.value(batch))
        product = (q @ r).save()
        eigen = torch.linalg.eigh(recorder.value(symmetric))
        again = (eigen.eigenvectors * eigen.eigenvalues @ eigen.eigenvectors.T).save()
        values, vectors = torch.linalg.eig(recorder.value(symmetric))
        general = (vectors * values @ torch.linalg.inv(vectors)).real.save()
        total = torch.linalg.eigvals(recorder.value(batch)).sum(-1).real.save()
    for got, expected in ((restored, batch), (also, batch), (product, batch), (again, symmetric), (general, symmetric)):
        assert float((got - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert torch.allclose(total, torch.linalg.eigvals(batch).sum(-1).real, rtol=1e-4)


def test_draws_and_tensors_of_sizes_alone_are_recorded(model: Any) -> None:
    drawn: dict[str, list[Any]] = {}
    with model.trace([1, 2, 3]):
        recorder = Recorder(model)
        for name, calls in (op_examples.DRAWN | op_examples.MADE | op_examples.EMPTY).items():
            for args, kwargs in calls:
                function = getattr(functions, name)
                value = function(*recorder.value(args), **{key: recorder.value(part) for key, part in kwargs.items()})
                drawn.setdefault(name, []).append((tuple(value.shape), value.dtype, value.save()))
    for name, calls in op_examples.MADE.items():
        for (args, kwargs), (shape, dtype, value) in zip(calls, drawn[name], strict=True):
            expected = getattr(torch, name)(*args, **kwargs)
            assert torch.equal(value, expected) and (shape, dtype) == (expected.shape, expected.dtype)
    for each in drawn.values():
        assert all((value.shape, value.dtype) == (shape, dtype) for shape, dtype, value in each)
    assert len({float(value.double().sum()) for name in op_examples.DRAWN for *_, value in drawn[name]}) > 25


def test_in_place_draws_are_of_the_seed(model: Any) -> None:
    def run(seed: int) -> Tensor:
        with model.trace([1, 2, 3], seed=seed):
            hidden = model.transformer.h[0].output[0]
            noise = torch.empty_like(hidden).normal_()
            gumbel = -torch.empty_like(hidden).exponential_().log()
            dropped = torch.nn.functional.dropout(torch.ones_like(hidden), 0.5)
            both = torch.stack([noise, gumbel, dropped, torch.empty_like(hidden).uniform_(2, 3)]).save()
        result: Tensor = both
        return result

    first = run(0)
    assert torch.equal(first, run(0)) and not torch.equal(first[0], run(1)[0])
    assert set(first[2].unique().tolist()) == {0.0, 2.0} and 2 <= first[3].min() <= first[3].max() < 3


# --- programs over the whole table: each call takes earlier values where their shape and dtype fit

CHAINED = [
    (name, place)
    for kind in KINDS.values()
    for name, calls in kind.items()
    if name not in VALUES_DECIDE and name not in ("getitem", "one_hot", "repeat_interleave", "cholesky")
    for place in range(len(calls))
]
ALL = {name: calls for kind in KINDS.values() for name, calls in kind.items()}


def chained(part: Any, pool: list[tuple[Tensor, Any]], choice: int, recorder: Recorder) -> tuple[Any, Any]:
    """An argument with an earlier value in the place of a float tensor of its shape; plain and recorded."""
    if isinstance(part, Tensor):
        fitting = [pair for pair in pool if pair[0].shape == part.shape and pair[0].dtype is part.dtype]
        if fitting and part.is_floating_point():
            return fitting[choice % len(fitting)]
        return part, recorder.value(part)
    if isinstance(part, (tuple, list)):
        pairs = [chained(member, pool, choice, recorder) for member in part]
        return type(part)([one for one, _ in pairs]), type(part)([other for _, other in pairs])
    return part, part


@settings(
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(st.tuples(st.sampled_from(CHAINED), st.integers(0, 9)), min_size=3, max_size=12))
def test_programs_over_the_table_are_plain_torch(model: Any, steps: list[tuple[tuple[str, int], int]]) -> None:
    outcomes: list[tuple[str, Tensor, Any]] = []
    with model.trace([1, 2, 3]):
        recorder = Recorder(model)
        pool: list[tuple[Tensor, Any]] = []
        for (name, place), choice in steps:
            args, kwargs = ALL[name][place]
            pairs = [chained(part, pool, choice, recorder) for part in args]
            named = {key: chained(part, pool, choice, recorder) for key, part in kwargs.items()}
            function = find(next(each for each in OPS[name].torch if not (kwargs and "__" in each)))
            try:
                expected = function(*[one for one, _ in pairs], **{key: one for key, (one, _) in named.items()})
            except (RuntimeError, TypeError):  # not this matrix; a second name with other arguments
                continue
            if expected is NotImplemented:
                continue
            got = function(*[other for _, other in pairs], **{key: other for key, (_, other) in named.items()})
            plain = flat(expected)[:1] if name == "lstsq" else flat(expected)
            for one, other in zip(plain, flat(got), strict=True):
                if one.isfinite().all() and (not one.is_floating_point() or bool((one.abs() < 1e3).all())):
                    pool.append((one, other))  # so that later values stay comparable
                outcomes.append((name, one, real(other).save()))
        if not outcomes:
            recorder.is_true.save()
    for name, expected, value in outcomes:
        assert close(value, expected), (name, steps)


def close(got: Tensor, expected: Tensor) -> bool:
    """As `same`, 1e-4: what is ill-conditioned comes behind what is."""
    if same(got, expected):
        return True
    expected = real(expected)
    if got.shape != expected.shape or got.dtype is not expected.dtype or not got.is_floating_point():
        return False
    return torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-4, equal_nan=True)
