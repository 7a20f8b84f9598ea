"""Looking at values while a trace is recorded: the branch that is taken, the bits, what may not be written any more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small import IDS, OTHER, close, hooked, loaded, small_llama
from torch import Tensor

import polytrace
from polytrace.errors import GraphError


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def model(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(plain, tmp_path_factory.mktemp("llama")) as made:
        yield made


def halve(hidden: Tensor) -> Tensor:
    return hidden * 0.5


@pytest.mark.parametrize("is_above", [True, False])
def test_an_if_on_a_value_takes_the_branch_that_the_value_says(plain: Any, model: Any, is_above: bool) -> None:
    logits, seen = hooked(plain, IDS)
    norm = float(seen["model.layers.1"].norm())
    bound = norm * 0.9 if is_above else norm * 1.1
    with model.trace(IDS, peek=True) as tracer:
        hidden = model.model.layers[1].output[0]
        if hidden.norm() > bound:
            hidden[:] *= 0.5
        ours = model.lm_head.output.save()
    halved = hooked(plain, IDS, {"model.layers.1": halve})[0]
    close(ours, halved if is_above else logits)
    assert (halved - logits).abs().max() > 0.1
    assert len(tracer.peeks) == 1
    assert tracer.peeks[0].result_bytes == 1  # one bool came


def test_what_was_seen_is_what_comes_back_bit_for_bit(model: Any) -> None:
    with model.trace(peek=True, seed=5) as tracer:
        with tracer.invoke([IDS, OTHER]):
            model.model.layers[0].output[0][:, -1] += 2.0
            first = torch.rand_like(model.model.layers[1].output[0][:, -1])
        with tracer.invoke(OTHER):
            hidden = model.model.layers[2].output[0]
            hidden[:, 0] += first[:1]
            hidden[:, -1] += torch.randn_like(hidden[:, -1])
            wanted = [model.model.layers[3].output[0], hidden[:, -1].sum(-1), first]
            seen = [torch.tensor(value.tolist()) for value in wanted]
            model.model.layers[3].output[0][:, 1] = 1.0  # later than all that was seen
            for value in wanted:
                value.save()
    for saved, early in zip(wanted, seen, strict=True):
        assert type(saved) is Tensor
        assert torch.equal(saved, early)
    assert len(tracer.peeks) == 3


def test_each_value_is_asked_for_once(model: Any) -> None:
    with model.trace(IDS, peek=True) as tracer:
        norm = model.model.layers[1].output[0].norm()
        assert float(norm) == norm.item() == float(f"{norm:.17g}")
        assert int(norm) == int(norm.item())
        assert "tensor(" in repr(norm)
        assert len(tracer.peeks) == 1
        best = model.lm_head.output[:, -1].argmax(-1)
        assert best.tolist() == best.numpy().tolist() == np.asarray(best).tolist()
        assert [IDS, OTHER][best[0] % 2] in (IDS, OTHER)
        assert int(best) in best
        assert torch.equal(best, torch.tensor([int(best)]))
        assert torch.allclose(torch.tensor(float(norm)), norm)
        assert int(best) + 1 not in best
        norm.save()
    assert len(tracer.peeks) == 3  # the norm, the best and the best % 2
    assert float(norm) == float(norm)
    assert all(receipt.result_bytes <= 8 for receipt in tracer.peeks)


def test_a_write_that_would_change_what_was_seen_is_refused(model: Any) -> None:
    with (
        pytest.raises(
            GraphError, match=r"layers.2.output \(test_peeking.*was looked at.*layers.1.mlp.output"
        ) as caught,
        model.trace(IDS, peek=True),
    ):
        if model.model.layers[2].output[0].norm() > 0:
            model.model.layers[1].mlp.output = model.model.layers[1].mlp.output * 2
        model.lm_head.output.save()
    assert str(caught.value.where).startswith("test_peeking.py:")


def test_a_look_in_an_invoke_of_its_own_steers_another_one(plain: Any, model: Any) -> None:
    with model.trace(peek=True) as tracer:
        with tracer.invoke(IDS):
            norm = model.model.layers[2].output[0].norm()
        with tracer.invoke(IDS):
            if norm > 0:
                model.model.layers[0].output[0][:] *= 0.5
            ours = model.lm_head.output.save()
    close(ours, hooked(plain, IDS, {"model.layers.0": halve})[0])


def test_a_session_is_looked_into_between_its_traces(plain: Any, model: Any) -> None:
    with model.session(peek=True) as session:
        with model.trace(IDS):
            norm = model.model.layers[2].output[0].norm()
        prompt = OTHER if float(norm) > 0 else IDS
        with model.trace(prompt):
            ours = model.lm_head.output.save()
    close(ours, hooked(plain, OTHER)[0])
    assert len(session.peeks) == 1


def test_without_peek_the_refusal_names_it(model: Any) -> None:
    uses = (bool, float, int, complex, Tensor.item, Tensor.tolist, lambda value: torch.equal(value, torch.ones(())))
    for use in (*uses, lambda value: value.item(), lambda value: value.tolist()):
        with pytest.raises(GraphError, match=r"or use trace\(\.\.\., peek=True\)"), model.trace(IDS) as tracer:
            use(model.model.layers[1].output[0].norm())
        assert tracer.peeks == ()


def test_a_look_that_cannot_be_had_says_why_and_a_value_behind_the_block_is_refused(model: Any) -> None:
    with pytest.raises(polytrace.RunError), model.trace(IDS, peek=True):
        print(model.model.embed_tokens(model.lm_head.output.argmax(-1) + 1000))
    with model.trace(IDS, peek=True):
        norm = model.model.layers[1].output[0].norm()
        model.lm_head.output.save()
    with pytest.raises(GraphError, match="was not saved"):
        float(norm)
