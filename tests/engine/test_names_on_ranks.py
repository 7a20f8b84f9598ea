"""Named points and weights where ranks split a model: the numbers of one process, and little that travels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, model_of
from names import POINTS, change
from processes import ProcessBackend, ProcessShards
from programs import difference, find
from torch import Tensor
from width import wide

from engine.local import LocalBackend
from polytrace.model import Model
from scheduling.policy import PassPolicy

TOLERANCE = 1e-5  # of max(1, max|one process|), float32
PROMPTS = [[7, 3, 5, 9, 11, 2, 4], [7, 3, 5, 1]]
LAYER = 1
NUMBER = 4  # bytes of a float32
GATHERED = ("phi3",)  # every rank has what projections give, and of their fused weights other rows than its heads'
GRIDS = [
    ("gpt2", 2),
    ("gpt_neox", 2),
    ("phi3", 2),  # whose projections give every rank the whole
    ("mistral", 4),
]


MORE_GRIDS = [("qwen3", 2), ("mixtral", 2), ("phi", 2), ("opt", 2), ("gemma2", 2)]


@pytest.fixture(scope="module", params=[*GRIDS, *map(wide, MORE_GRIDS)], ids=lambda grid: "-".join(map(str, grid)))
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    family, ranks = request.param
    folder: Path = tmp_path_factory.mktemp("model")
    model_of(family).save_pretrained(folder)
    shards = ProcessShards(str(folder), stages=1, ranks=ranks)
    policy = PassPolicy(budget_tokens=1 << 16, max_members=100)
    yield (
        family,
        ranks,
        Model(ProcessBackend(str(folder), shards, folder, policy)),
        Model(LocalBackend(str(folder), threads=1)),
    )
    shards.close()


def _layer(model: Any, family: str) -> Any:
    return find(model, f"{FAMILIES[family].layers}.{LAYER}")


def _ask(model: Any, family: str, prompts: list[list[int]], edit: str | None) -> dict[str, Tensor]:
    with model.trace(prompts):
        layer = _layer(model, family)
        if edit is not None:
            change(edit, getattr(layer, edit))
        found = {name: getattr(layer, name).save() for name in (*POINTS[family], "head_out")}
        found["logits"] = model.output.logits.save()
    return found


def test_points_are_those_of_one_process_read_and_edited_and_alone(deployed: Any) -> None:
    family, _, model, one = deployed
    for edit in (None, "q", "k", "head_out", *({"resid_mid", "mlp_post"} & POINTS[family].keys())):
        ours, expected = _ask(model, family, PROMPTS, edit), _ask(one, family, PROMPTS, edit)
        for name, value in ours.items():
            assert difference([value], [expected[name]]) <= TOLERANCE, (edit, name)
        alone = _ask(model, family, PROMPTS[:1], edit)
        assert all(torch.equal(ours[name][:1, -7:], alone[name]) for name in ours), edit


def _gradients(model: Any, family: str, edit: str | None, *, is_of_gradient: bool = False) -> dict[str, Tensor]:
    """Of a loss with regard to points of a layer and to what comes before it; one point, or its gradient, is halved."""
    with model.trace(PROMPTS):
        before, layer = (find(model, f"{FAMILIES[family].layers}.{number}") for number in (LAYER - 1, LAYER))
        names = "q", "k", "v", "scores", "pattern", "z", "head_out", *({"mlp_pre"} & POINTS[family].keys())
        points = {name: getattr(layer, name) for name in names}
        if edit is not None and not is_of_gradient:
            points[edit][:] *= 0.5
        hidden = before.output[0]
        with model.output.logits[:, -1].tanh().sum().backward():
            if edit is not None and is_of_gradient:
                points[edit].grad[:] *= 0.5
            found = {name: point.grad.save() for name, point in points.items()}
            found["before"] = hidden.grad.save()
    return found


def test_gradients_at_points_are_those_of_one_process(deployed: Any) -> None:
    family, _, model, one = deployed
    plain = _gradients(one, family, None)
    for edit, is_of_gradient in (
        (None, False),
        ("k", False),
        ("head_out", False),
        ("head_out", True),
        ("pattern", True),
    ):
        ours = _gradients(model, family, edit, is_of_gradient=is_of_gradient)
        expected = _gradients(one, family, edit, is_of_gradient=is_of_gradient)
        for name, value in ours.items():
            assert (value - expected[name]).abs().max() <= TOLERANCE * expected[name].abs().max(), (edit, name)
        changes = [float((expected[name] - own).abs().max() / own.abs().max()) for name, own in plain.items()]
        assert edit is None or max(changes) > 0.01


def test_of_a_head_only_that_head_travels(deployed: Any) -> None:
    family, ranks, model, one = deployed
    tokens, others = len(PROMPTS[0]), ranks - 1
    for name, most in {"q": tokens * 8, "head_out": tokens * 32, "z": tokens * 8}.items():
        with model.trace(PROMPTS[0]) as tracer:
            ours = getattr(_layer(model, family), name)[:, :, 3].save()
        with one.trace(PROMPTS[0]):
            expected = getattr(_layer(one, family), name)[:, :, 3].save()
        assert difference([ours], [expected]) <= TOLERANCE, name
        least = -1 if family in GATHERED else 0
        assert least < tracer.receipt.gathered_bytes <= most * NUMBER * others, (name, tracer.receipt.gathered_bytes)
    with model.trace(PROMPTS[0]) as tracer:  # an edit of it does not travel at all
        _layer(model, family).head_out[:, -1, 3] = 0.0
        model.lm_head.input[:, -1].save()
    assert tracer.receipt.gathered_bytes == 0


def test_of_a_heads_weights_only_that_heads_travel(deployed: Any) -> None:
    family, ranks, model, one = deployed
    path = FAMILIES[family].attention

    def ask(which: Any, name: str) -> tuple[Any, Tensor]:
        with which.trace([1, 2]) as tracer:
            taken = getattr(find(_layer(which, family), path), name)[3].save()
            which.lm_head.input[:, -1].save()
        return tracer, taken

    for name in ("W_Q", "W_O", "W_V_by_head"):
        (tracer, ours), (_, expected) = ask(model, name), ask(one, name)
        assert torch.equal(ours, expected), name
        if family not in GATHERED:
            assert 0 < tracer.receipt.gathered_bytes <= 32 * 8 * NUMBER * (ranks - 1), name
    names = [name for name in ("W_K", "W_V", "W_in", "W_gate", "W_out", "b_in") if name in dir(_layer(one, family))]
    for name in names:
        whole = []
        for which in (model, one):
            with which.trace([1, 2]):
                whole.append(getattr(_layer(which, family), name).save())
        assert torch.equal(*whole), name
    assert len(names) >= 2
