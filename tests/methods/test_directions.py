"""Contrastive vectors beside means, differences and singular vectors of plain Hugging Face's hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hooked import Both, close
from torch import Tensor

from polytrace.errors import GraphError, WireError
from polytrace.methods import Vectors, activation_addition, contrastive_vectors, directions, steer

_draw = torch.Generator().manual_seed(0)
POSITIVE = [torch.randint(3, 90, (4 + n % 3,), generator=_draw).tolist() for n in range(9)]
NEGATIVE = [torch.randint(3, 90, (4 + n % 2,), generator=_draw).tolist() for n in range(9)]


@pytest.fixture(scope="module")
def served(beside: Callable[[str], Both]) -> Both:
    return beside("llama")


def rows_by_hand(served: Both, prompts: list[list[int]], layer: int, positions: Any, side: str = "output") -> Tensor:
    place = (f"model.layers.{layer}", side)
    hidden = [served.run(ids, [place])[1][place][0] for ids in prompts]
    if positions is None:
        return torch.stack([one.mean(0) for one in hidden])
    return torch.stack([one[positions] if isinstance(positions, int) else one[positions].mean(0) for one in hidden])


@pytest.mark.parametrize("size", ["one request", "parts"])
@pytest.mark.parametrize("positions", [-1, [0, -2], None])
@pytest.mark.parametrize("method", ["mean", "pca"])
def test_vectors_are_those_of_the_hidden_states(
    served: Both, method: str, positions: Any, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, *(("_ONE_REQUEST", 4) if size == "parts" else ("_IN_ONE_VIEW", 4)))
    found = contrastive_vectors(served.model, POSITIVE, NEGATIVE, layers=[1, -1], positions=positions, method=method)
    assert found.layers == (1, 3) and bool(found.receipts) == (size == "one request")
    for layer in found.layers:
        above, below = (rows_by_hand(served, prompts, layer, positions) for prompts in (POSITIVE, NEGATIVE))
        if method == "mean":
            expected = above.mean(0) - below.mean(0)
        else:
            second = (above - below).T.double() @ (above - below).double()
            expected = torch.linalg.eigh(second)[1][:, -1].float()
            expected = expected * torch.sign(((above - below) @ expected).mean())
        close(found[layer], expected, scale=1 if method == "mean" else 10)
        unit = expected / expected.norm()
        a, b = above @ unit, below @ unit
        spread = ((a.var(unbiased=True) * 8 + b.var(unbiased=True) * 8) / 16).sqrt()
        middle = (a.mean() + b.mean()) / 2
        right = ((a > middle).sum() + (b < middle).sum()) / 18
        told = found.separation.sel(layer=layer)
        assert float(told.sel(measure="distance")) == pytest.approx(float((a.mean() - b.mean()) / spread), rel=1e-3)
        assert float(told.sel(measure="accuracy")) == pytest.approx(float(right))
        gate = found.gate(layer, position=-1)
        assert gate.threshold == pytest.approx(float(middle), abs=1e-4) and gate.layer == layer
        close(gate.direction, unit, scale=10)


def test_sets_of_different_sizes_have_means_and_no_pairs(served: Both) -> None:
    found = contrastive_vectors(served.model, POSITIVE, NEGATIVE[:4], layers=2, of="resid_pre")
    means = [rows_by_hand(served, prompts, 2, -1, "input").mean(0) for prompts in (POSITIVE, NEGATIVE[:4])]
    close(found[2], means[0] - means[1])
    with pytest.raises(GraphError, match=r"these have 9 and 4 prompts.*test_directions.py"):
        contrastive_vectors(served.model, POSITIVE, NEGATIVE[:4], method="pca")
    with pytest.raises(GraphError, match="there is no vector of layer 1, only of 2"):
        found[1]


def test_activation_addition_is_added_to_the_first_tokens(served: Both) -> None:
    one, other, prompt = [3, 17, 42, 5], [3, 9], [8, 25, 1, 60, 11, 2]
    found = activation_addition(served.model, one, other, layers=[1, 2], pad=7)
    assert found.positions == (0, 1, 2, 3) and found.of == "resid_pre"
    changes = {}
    for layer in (1, 2):
        place = (f"model.layers.{layer}", "input")
        rows = [served.run(ids, [place])[1][place][0] for ids in (one, [*other, 7, 7])]
        difference = rows[0] - rows[1]
        close(found[layer], difference)

        def change(hidden: Tensor, difference: Tensor = difference) -> Tensor:
            return torch.cat([hidden[:, :4] + 3 * difference, hidden[:, 4:]], 1)

        changes[place] = change
    hand, plain = served.run(prompt, changes=changes)[0][-1], served.run(prompt)[0][-1]
    ours = steer(served.model, prompt, found, factor=3.0, tokens=[5, 6]).logit
    close(ours.values[0, 0], hand[[5, 6]])
    assert float((hand - plain)[[5, 6]].abs().max()) > 0.05


def test_vectors_come_back_from_their_file(served: Both, tmp_path: Path) -> None:
    found = contrastive_vectors(served.model, POSITIVE, NEGATIVE, layers=[1, 3])
    found.save(tmp_path / "v.safetensors")
    again = Vectors.load(tmp_path / "v.safetensors")
    assert torch.equal(again.tensor, found.tensor)
    assert (again.layers, again.of, again.method) == (found.layers, found.of, "mean")
    assert again.separation is not None and again.separation.equals(found.separation)
    close(again.unit()[3].norm(), torch.tensor(1.0))
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WireError, match=r"other.safetensors has no vectors"):
        Vectors.load(tmp_path / "other.safetensors")
