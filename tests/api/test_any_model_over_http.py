"""A vision-language model on a Ray cluster, called as it is: the values of plain torch with hooks.

In float32, max|a - b| <= 1e-5 max(1, max|b|).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from called_by_hand import plain_run
from model_kinds import KINDS
from services import Guest, wait_until
from whole_gradients_by_hand import plain_gradients, weights_of

import polytrace
from bench.service import Service as Running
from polytrace.errors import GraphError


def test_a_service_calls_a_vision_language_model_as_one_process_does(tmp_path: Path, world_service: Running) -> None:
    plain, path, call, other = KINDS["llava"]()
    folder = tmp_path / "model"
    plain.save_pretrained(folder)
    theirs, _ = plain_run(plain, path, other)
    seen, wanted = plain_run(plain, path, call, lambda tensor: 0.5 * tensor + 0.5 * theirs)
    service = Guest(world_service.url, folder)
    try:
        wait_until(service.is_ready, 240, service)
        model: Any = polytrace.connect(f"http://127.0.0.1:{service.port}", "tiny", key="sesame")
        layer = model.get_submodule(path)
        with model.trace() as tracer:
            with tracer.invoke(**other):
                given = layer.output
            with tracer.invoke(**call):
                own = layer.output
                assert own.shape == seen.shape
                read = own.save()
                layer.output = 0.5 * own + 0.5 * given
                result = model.output.logits.save()
        assert model.validate(tracer).result_bytes == read.nbytes + result.nbytes
        _, gradients = plain_gradients(plain, path, call, double, 0.5, (1,))
        vector = torch.zeros(seen.shape[-1], requires_grad=True)
        with model.trace(**call):
            got, own = layer.input, layer.output
            own[:] = 2 * own + vector
            loss = (model.output.logits * weights_of(wanted, 1)).sum()
            with loss.backward():
                back = [got.grad.save(), own.grad.clone().save()]
                own.grad *= 0.5
            loss.backward()
        with pytest.raises(GraphError, match=r"does not take these arguments.*\(test_any_model_over_http.py:\d+\)"):
            model.trace(pixel_values=torch.ones(3, 3))
    finally:
        service.kill_all()
    for ours, theirs in zip(back, gradients[0], strict=True):
        close(ours, theirs)
    assert vector.grad is not None
    close(vector.grad, 1.5 * gradients[0][1].sum((0, 1)))  # of both backwards, the first of which was halved there
    close(read, seen)
    close(result, wanted)


def double(tensor: torch.Tensor) -> None:
    tensor *= 2


def close(ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Shards may have another number of threads."""
    assert float((ours - plain).abs().max()) <= 1e-5 * max(1.0, float(plain.abs().max()))
