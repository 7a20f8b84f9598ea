"""Any mix of backwards, sums, resets, in-place steps and detached parts means what it means in torch.

One program runs on torch's tensors and, recorded, through the service: what `.grad` is when somebody looks, or that
there is none. The model has no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small import IDS, loaded, small_llama
from torch import Tensor

from polytrace.errors import GraphError

LEAVES = 3
TOLERANCE = 1e-6  # float32, of max(1, max|torch|)
Statement = tuple[str, int, int]

STATEMENTS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("mul", "add", "tanh", "half", "backward", "backward", "look", "look"),
                *("detach", "no_grad", "in_place", "weighed", "block", "halve", "zero", "none", "assign", "function"),
                "update",
            ]
        ),
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    min_size=4,
    max_size=24,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(small_llama(), tmp_path_factory.mktemp("llama")) as model:
        yield model


def grad_of(value: Any) -> Any:
    """What `.grad` is; None where there is none, in torch's way or in ours."""
    try:
        return value.grad
    except GraphError as error:
        if "does not depend on" in str(error) or "has no gradient yet" in str(error):
            return None
        raise


def run(leaves: list[Any], statements: list[Statement]) -> tuple[list[Any], list[Any]]:
    """What is seen at each look, a tensor or None, and all that was made. On tensors and recorded values alike."""
    is_torch = type(leaves[0]) is Tensor
    values = list(leaves)
    seen: list[Any] = []
    made_values: list[Any] = []

    def keep(value: Any) -> None:
        made_values.append(value)
        if is_torch and value.requires_grad:
            value.retain_grad()
        values.append(value)

    def back(loss: Any, *weights: Any) -> None:
        if not is_torch or loss.requires_grad:
            loss.backward(*weights, retain_graph=True)

    for kind, i, j in statements:
        a, b = values[i % len(values)], values[j % len(values)]
        match kind:
            case "mul":
                keep(a * b)
            case "add":
                keep(a + b * 0.5)
            case "tanh":
                keep(a.tanh())
            case "half":
                keep(torch.cat([a[:2], b[2:] * 3]))
            case "detach":
                keep(a.detach() * b)
            case "no_grad":
                with torch.no_grad():
                    made = a * 2 + b
                keep(made * a)
            case "in_place":
                made = a * b
                made.add_(0.5 * a)
                keep(made)
            case "backward":
                back((a * b).sum())
            case "weighed":
                back(a * 1, torch.tensor([1.0, -1.0, 0.5, 2.0]))
            case "block":
                if is_torch:
                    back(a.sum())
                else:
                    with a.sum().backward():
                        pass
            case "look":
                found = grad_of(a)
                seen.append(None if found is None else found.clone())
            case "halve":
                if grad_of(a) is not None:
                    a.grad.mul_(0.5)
            case "zero":
                if grad_of(a) is not None:
                    a.grad.zero_()
            case "none":
                a.grad = None
            case "assign":
                if not is_torch or a.requires_grad:
                    a.grad = torch.ones(4)
            case "function":
                loss = (a * a * b).sum()
                if not is_torch:
                    (found,) = torch.autograd.grad(loss, [leaves[0]], allow_unused=True)
                elif loss.requires_grad:
                    before = [None if value.grad is None else value.grad.clone() for value in made_values]
                    (found,) = torch.autograd.grad(loss, [leaves[0]], allow_unused=True, retain_graph=True)
                    for value, old in zip(made_values, before, strict=True):
                        value.grad = old  # torch lets `retain_grad` accumulate here, which its pages say it does not
                else:
                    found = None
                seen.append(found)
            case "update":  # what was made before has the old content in it: torch forbids using it on the way back
                with torch.no_grad():
                    leaf = leaves[i % LEAVES]
                    if grad_of(leaf) is not None:
                        leaf -= 0.1 * leaf.grad
                values = list(leaves)
    return seen, [*leaves, *made_values]


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
@given(STATEMENTS)
def test_gradients_mean_what_they_mean_in_torch(model: Any, statements: list[Statement]) -> None:
    starts = [torch.linspace(-1, 1, 4) * (number + 1) + 0.3 for number in range(LEAVES)]
    with torch.enable_grad():
        expected, theirs_made = run([start.clone().requires_grad_() for start in starts], statements)
    with model.trace(IDS) as tracer:
        seen, made = run([tracer.value(start) for start in starts], statements)
        found = [None if one is None else one.save() for one in seen]
        for value in (*made, model.lm_head.output[:, -1, 0]):
            value.save()
    assert [one is None for one in found] == [one is None for one in expected]
    for ours, theirs in zip([*found, *made], [*expected, *theirs_made], strict=True):
        if theirs is not None:
            theirs = theirs.detach()
            assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))
