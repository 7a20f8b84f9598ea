"""Steering and ablated directions beside plain Hugging Face with hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hooked import PROMPTS, Both, close
from torch import Tensor

from polytrace.errors import GraphError
from polytrace.methods import Gate, ablate_direction, steer, steering_edit

IDS = [7, 11, 30]
VECTORS = 2 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1))  # one a layer


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2", "gpt_neox"])
def served(request: pytest.FixtureRequest, beside: Callable[[str], Both]) -> Both:
    return beside(request.param)


@pytest.fixture(scope="module")
def llama(beside: Callable[[str], Both]) -> Both:
    return beside("llama")


def added(vector: Tensor, positions: Any, weights: Tensor | None = None) -> Any:
    """A hook's change: the vector at some positions, times a weight for each token."""

    def change(hidden: Tensor) -> Tensor:
        where = slice(None) if positions is None else positions
        rows = hidden[0, where]
        own = torch.ones(hidden.shape[1]) if weights is None else weights
        hidden[0, where] = rows + own[where][..., None] * vector
        return hidden

    return change


def steered_by_hand(
    served: Both, ids: list[int], side: str, layers: list[int], positions: Any, factor: float, weights: Any = None
) -> Tensor:
    places = {layer: (served.names.layer(layer), side) for layer in layers}
    changes = {place: added(factor * VECTORS[layer], positions, weights) for layer, place in places.items()}
    return served.run(ids, changes=changes)[1]["", "output"][0, -1]


@pytest.mark.parametrize(("site", "side"), [("resid_post", "output"), ("resid_pre", "input")])
@pytest.mark.parametrize("positions", [None, -1, [1, -2]])
def test_vectors_are_added_at_layers_and_positions(served: Both, site: str, side: str, positions: Any) -> None:
    arguments: Any = (served.model, PROMPTS, VECTORS[[1, 2]], [1, -2], positions, [0.0, 0.5, -1.5])
    found, likely = steer(*arguments, of=site, tokens=IDS), steer(*arguments, of=site)
    assert found.rank is not None and likely.token_id is not None
    assert found.probability.dims == ("prompt", "factor", "token")
    for number, ids in enumerate(PROMPTS):
        plain = steered_by_hand(served, ids, side, [], None, 0.0)
        for factor in (0.0, 0.5, -1.5):
            hand = steered_by_hand(served, ids, side, [1, 2], positions, factor)
            close(found.probability.sel(prompt=number, factor=factor), hand.softmax(-1)[IDS])
            close(found.logit.sel(prompt=number, factor=factor), hand[IDS])
            best = hand.softmax(-1).topk(5)
            close(likely.probability.sel(prompt=number, factor=factor), best.values)
            assert likely.token_id.sel(prompt=number, factor=factor).values.tolist() == best.indices.tolist()
            ranks = [int((hand > hand[token]).sum()) for token in IDS]
            assert found.rank.sel(prompt=number, factor=factor).values.tolist() == ranks
            if factor:
                assert float((hand - plain).abs().max()) > 0.05


@pytest.mark.parametrize("positions", [None, -1, [1, -2]])
@pytest.mark.parametrize("position", [None, 0])
def test_a_gate_decides_by_token_or_by_prompt(llama: Both, positions: Any, position: int | None) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    place = (llama.names.layer(1), "output")
    scores = [llama.run(ids, [place])[1][place][0] @ direction for ids in PROMPTS]
    deciding = torch.cat(scores) if position is None else torch.stack([score[position] for score in scores])
    middle = deciding.sort().values[len(deciding) // 2 - 1 :][:2].mean()  # half of them are above it
    gate = Gate(direction=direction, layer=1, threshold=float(middle) + 0.25, bias=0.25, position=position)
    found = steer(llama.model, PROMPTS, VECTORS[2], 2, positions, tokens=IDS, gate=gate)
    changed = []
    for number, ids in enumerate(PROMPTS):
        opened = (scores[number] + gate.bias > gate.threshold).float()
        weights = opened if position is None else opened[position].expand(len(ids))
        hand = steered_by_hand(llama, ids, "output", [2], positions, 1.0, weights)
        close(found.logit.sel(prompt=number, factor=1.0), hand[IDS])
        where = slice(None) if positions is None else positions
        changed += weights[where].flatten().tolist()
    assert positions == -1 or 0.0 < sum(changed) < len(changed)  # open for some, closed for others


def test_a_gate_may_be_any_value_of_the_trace(llama: Both) -> None:
    gate = lambda: llama.model.layers[0].mlp_post[:, :, 3] - 0.01  # noqa: E731
    found = steer(llama.model, PROMPTS, VECTORS[2], 2, tokens=IDS, gate=gate)
    for number, ids in enumerate(PROMPTS):
        place = ("model.layers.0.mlp.down_proj", "input")
        opened = (llama.run(ids, [place])[1][place][0, :, 3] > 0.01).float()
        assert 0 < opened.sum() < len(ids)
        close(
            found.logit.sel(prompt=number, factor=1.0),
            steered_by_hand(llama, ids, "output", [2], None, 1.0, opened)[IDS],
        )


def test_a_vector_with_positions_is_added_row_by_row(llama: Both) -> None:
    rows = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(4))
    found = steer(llama.model, PROMPTS, rows, 1, [0, 2], tokens=IDS)
    for number, ids in enumerate(PROMPTS):
        change = {("model.layers.1", "output"): added(rows[0], [0, 2])}
        close(found.logit.sel(prompt=number, factor=1.0), llama.run(ids, changes=change)[0][-1, IDS])


@pytest.mark.parametrize(
    "gate", [None, Gate(direction=VECTORS[0], layer=0), Gate(direction=VECTORS[0], layer=0, position=-1)]
)
@pytest.mark.parametrize("positions", [None, -1, [1, -2]])
def test_an_edit_steers_every_trace(llama: Both, positions: Any, gate: Gate | None) -> None:
    edited = steering_edit(llama.model, VECTORS[2], 2, positions, 1.5, gate=gate)
    with edited.trace(PROMPTS):
        ours = llama.model.lm_head.output[:, -1, IDS].save()
    with llama.model.trace(PROMPTS):
        plain = llama.model.lm_head.output[:, -1, IDS].save()
    expected = steer(llama.model, PROMPTS, VECTORS[2], 2, positions, 1.5, gate=gate, tokens=IDS)
    close(ours, torch.tensor(expected.logit.sel(factor=1.5).values))
    if gate is None:
        assert float((ours - plain).abs().max()) > 0.05


def test_a_steering_edit_is_kept_by_name(llama: Both) -> None:
    steering_edit(llama.model, VECTORS[2], 2, factor=1.5, name="louder")
    with llama.model.trace(PROMPTS, edits=["louder"]):
        ours = llama.model.lm_head.output[:, -1, IDS].save()
    close(ours, torch.tensor(steer(llama.model, PROMPTS, VECTORS[2], 2, None, 1.5, tokens=IDS).logit.values[:, 0]))


def test_a_model_with_edits_is_steered_from_there(llama: Both) -> None:
    edited = steering_edit(llama.model, VECTORS[1], 1)
    found = steer(edited, PROMPTS, VECTORS[2], 2, factor=torch.tensor([0.0, 1.0]), tokens=IDS)
    for number, ids in enumerate(PROMPTS):
        for factor, layers in ((0.0, [1]), (1.0, [1, 2])):
            hand = steered_by_hand(llama, ids, "output", layers, None, 1.0)
            close(found.logit.sel(prompt=number, factor=factor), hand[IDS])


@pytest.mark.parametrize("directions", [1, 2])
def test_an_ablated_direction_is_nowhere_in_the_residual(served: Both, directions: int) -> None:
    basis = torch.linalg.qr(VECTORS[:directions].T).Q
    edited = ablate_direction(served.model, VECTORS[:directions] if directions > 1 else VECTORS[0])
    with edited.trace(PROMPTS):
        left = [(layer.resid_post.at(-1) @ basis).abs().amax().save() for layer in served.model.layers]
        ours = served.model.lm_head.output[:, -1].save()
    assert max(map(float, left)) < 1e-4

    def without(hidden: Tensor) -> Tensor:
        return hidden - (hidden @ basis) @ basis.T

    names = served.names
    sides = [("", "input"), (names.attention, "output"), (names.mlp, "output")]
    changes = {(names.layer(layer, path), side): without for layer in range(4) for path, side in sides}
    for number, ids in enumerate(PROMPTS):
        hand, plain = served.run(ids, changes=changes)[0][-1], served.run(ids)[0][-1]
        close(ours[number], hand)
        assert float((hand - plain).abs().max()) > 0.05


def test_sites_and_layers_of_an_ablation_are_chosen(llama: Both) -> None:
    edited = ablate_direction(llama.model, VECTORS[0], layers=slice(1, 3), of=["mlp_added"])
    with edited.trace(PROMPTS[0]):
        ours = llama.model.lm_head.output[0, -1].save()
    unit = VECTORS[0] / VECTORS[0].norm()
    changes = {(f"model.layers.{layer}.mlp", "output"): lambda h: h - (h @ unit)[..., None] * unit for layer in (1, 2)}
    close(ours, llama.run(PROMPTS[0], changes=changes)[0][-1])


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ((VECTORS[0], 4), {}, "no layer 4; this model has layers 0-3"),
        ((VECTORS[0], []), {}, "no layer is chosen"),
        ((VECTORS[0, :5], 1), {}, r"vectors for 1 layers are \[32\] or \[1, 32\], not \[5\]"),
        ((VECTORS, [1, 2]), {}, r"vectors for 2 layers are .* not \[4, 32\]"),
        ((VECTORS[0], 1), {"of": "z"}, "'z' is no part of the residual; it is one of resid_pre, resid_mid, resid_post"),
        ((VECTORS[0], 1), {"gate": Gate(direction=VECTORS[0], layer=2)}, "behind resid_post of layer 1"),
        ((VECTORS[0], 1, 9), {}, "no position 9 in prompt 0"),
    ],
)
def test_wrong_arguments_are_told_with_their_line(llama: Both, arguments: Any, options: Any, told: str) -> None:
    with pytest.raises(GraphError, match=f"{told}.*test_steering.py"):
        steer(llama.model, PROMPTS, *arguments, **options)


def test_a_direction_that_is_none_is_refused(llama: Both) -> None:
    for wrong in (torch.zeros(32), torch.zeros(5), torch.zeros(2, 2, 32)):
        with pytest.raises(GraphError, match=r"a direction is \[32\] .*test_steering.py"):
            ablate_direction(llama.model, wrong)
    with pytest.raises(GraphError, match="'z' is no part of the residual"):
        ablate_direction(llama.model, VECTORS[0], of=["z"])
