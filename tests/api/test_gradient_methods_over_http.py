"""The methods with gradients through a whole service of two stages with two ranks each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from services import PROMPT, Service, make_model, wait_until

import polytrace
from polytrace.methods import (
    attribution_patching,
    edge_attribution_patching,
    integrated_gradients,
    learn_rotation,
    learn_steering_vector,
    logit,
)

TARGET = 7
TOLERANCE = 1e-5  # float32, of max(1, max|plain|)
IDS = [list(PROMPT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gradients") / "model")


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    service = Service(folder, tmp_path_factory.mktemp("service"), "--stages", "2", "--ranks", "2")
    try:
        wait_until(service.is_ready, 240, service)
        with polytrace.connect(str(service.http.base_url), "tiny", key="sesame") as connected:
            yield connected
    finally:
        service.kill_all()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))


def test_methods_with_gradients_give_what_they_give_in_one_process(model: Any, folder: Path) -> None:
    pair: Any = (IDS[0], [*IDS[0][:2], 30, *IDS[0][3:]])
    with polytrace.load(str(folder), threads=1) as here:
        both = []
        for one in (model, here):
            vector = learn_steering_vector(one, IDS * 2, TARGET, layer=2, steps=5, optimiser="sgd")
            rotation = learn_rotation(one, pair[0], pair[1], TARGET, layer=1, size=2, steps=2, optimiser="sgd")
            integrated = integrated_gradients(
                one, pair[0], logit(TARGET), of="resid_pre", layers=[1, 3], baseline=pair[1]
            )
            estimated = attribution_patching(one, *pair, logit(TARGET), of="z", normalise=False)
            edges = edge_attribution_patching(one, *pair, logit(TARGET))
            arrays = [vector.losses, rotation.losses, integrated.effect, estimated.effect, edges.effect.fillna(0.0)]
            both.append([vector.vector, rotation.tensor, *(torch.tensor(array.values) for array in arrays)])
        assert vector.losses[-1] < vector.losses[0] - 0.01
        assert float(abs(estimated.effect - estimated.corrupt).max()) > 0.01
    for ours, theirs in zip(*both, strict=True):
        close(ours, theirs)
