"""Tiny models of many families: a small sweep of patches and random programs, shared, alone and by plain hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import run_by_hand
from families import CONFIGS, FAMILIES, Place, model_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import crowds, difference, get, serve
from torch import Tensor
from transformers import PreTrainedModel

from engine.local import LocalBackend
from polytrace.certificate import Receipt
from polytrace.model import Model

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
POSITIONS = (-1, 7, 2)
HEAD = slice(8, 16)
FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)


def places(name: str) -> list[tuple[Place, slice]]:
    """Sites to patch and which features of them: the residual stream, the attention's output, one head."""
    family = FAMILIES[name]
    attention = next(part for part in family.parts if part[0] in ("self_attn", "attention", "attn"))
    every = slice(None)
    return [
        (place, features)
        for layer in range(family.num_layers)
        for place, features in (
            (family.residual(layer), every),
            (family.place(layer, attention), every),
            (family.heads(layer), HEAD),
        )
    ]


def sweep(model: Model, name: str, **options: Any) -> tuple[list[Tensor], Receipt]:
    """The last token's logits of the prompt, once as it is and once for each patch."""
    head = FAMILIES[name].logits().module
    with model.trace(**options) as tracer:
        with tracer.invoke(PROMPT):
            saved = [getattr(model, head).output[:, -1].save()]
        for place, features in places(name):
            for position in POSITIONS:
                with tracer.invoke(PROMPT):
                    get(model, place)[:, position, features] = 0.25
                    saved.append(getattr(model, head).output[:, -1].save())
    assert tracer.receipt is not None
    return saved, tracer.receipt


def by_hand(plain: PreTrainedModel, name: str) -> list[Tensor]:
    """The same, one run of the plain model each."""
    head = plain.get_submodule(FAMILIES[name].logits().module)  # a soft-cap may follow it
    seen: list[Tensor] = []

    def logits() -> Tensor:
        handle = head.register_forward_hook(lambda _module, _args, output: seen.append(output))
        with torch.no_grad():
            plain(input_ids=torch.tensor([PROMPT]), use_cache=False)
        handle.remove()
        return seen[-1][:, -1]

    found = [logits()]
    for place, features in places(name):
        module = plain.get_submodule(place.module)
        for position in POSITIONS:
            handle = _hook(module, place, (slice(None), position, features))
            found.append(logits())
            handle.remove()
    return found


def _hook(module: Any, place: Place, cells: tuple[Any, ...]) -> Any:
    def write(_module: Any, args: tuple[Any, ...], output: Any = None) -> None:
        value = args[0] if place.port == "input" else output
        tensor = value[place.selector[0]] if place.selector else value
        tensor[cells] = 0.25

    return module.register_forward_pre_hook(write) if place.port == "input" else module.register_forward_hook(write)


class Loaded:
    """A family in one process, through the gate, beside the plain model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.plain = model_of(name)
        self.plain.save_pretrained(folder)
        self.backend = LocalBackend(str(folder), threads=1)
        self.model = Model(self.backend)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(request.param, tmp_path_factory.mktemp(request.param))


def test_the_gate_finds_that_rows_may_be_shared(loaded: Loaded) -> None:
    description = loaded.backend.description
    assert description.has_forks
    assert description.notes == ()


def test_a_sweep_has_its_own_bits_and_hugging_faces_numbers(loaded: Loaded) -> None:
    shared, receipt = sweep(loaded.model, loaded.name)
    alone, _ = sweep(loaded.model, loaded.name, sharing="off")
    assert receipt.token_layers < 0.6 * receipt.token_layers_alone
    assert all(map(torch.equal, shared, alone))
    expected = by_hand(loaded.plain, loaded.name)
    assert difference(shared, expected) <= FLOAT32_TOLERANCE
    moved = [not torch.allclose(theirs, expected[0], atol=1e-3) for theirs in expected[1:]]
    assert sum(moved) > 0.5 * len(moved)


@settings(
    max_examples=2,  # the first is the smallest, the second a random one
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(data=st.data())
def test_random_programs_have_their_own_bits_and_hugging_faces_numbers(loaded: Loaded, data: st.DataObject) -> None:
    users = data.draw(crowds(FAMILIES[loaded.name], 12))
    for program, ours in zip(users, serve(loaded.model, loaded.backend, users, torch.float32), strict=True):
        (alone,) = serve(loaded.model, loaded.backend, [program], torch.float32, sharing="off")
        assert ours.has_bits_of(alone), program
        assert difference(ours.values, run_by_hand(loaded.plain, program)) <= FLOAT32_TOLERANCE, program
