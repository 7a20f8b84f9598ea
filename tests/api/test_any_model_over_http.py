"""A vision-language model on a Ray cluster, called as it is: the values of plain torch with hooks.

In float32, max|a - b| <= 1e-5 max(1, max|b|).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from called_by_hand import plain_run
from model_kinds import KINDS
from services import Guest, wait_until
from whole_gradients_by_hand import plain_gradients, weights_of

import polytrace
from bench import tinyworld
from bench.service import Service as Running
from polytrace.errors import GraphError

SPREAD = {  # layer 0, which is read and edited, is on the disk
    "vit.embeddings": "cpu",
    "vit.layers.0": "disk",
    "vit.layers.1": "cpu",
    "vit.layernorm": "disk",
    "classifier": "cpu",
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"device_map": "gpu"}, "'gpu' is no device map: a device map is one of auto, balanced"),
    ({"device_map": {"vit": "tpu"}}, "puts vit on 'tpu': a device is"),
    ({"device_map": {"vit": 1.5}}, "device_map"),
    ({"device_map": {"vit": {"a": 1}}}, "device_map"),
    ({"device_map": {f"a{number}": "cpu" for number in range(5000)}}, "has 5000 entries; it has at most 4096"),
    ({"stages": 2}, "stages is 2 and ranks 1, and a device map spreads a model within one shard"),
    ({"gpus": 2}, "the device map names no GPU"),
    ({"device_map": None, "gpus": 2}, "gpus is 2: it is for a device map"),
]
FAILING: dict[str, dict[str, Any]] = {
    "less": {"device_map": {"vit": "cpu"}},
    "more": {"device_map": SPREAD | {"classifier": 1}},
    "language": {"source": str(tinyworld.FOLDER), "device_map": "auto"},
}
TOLD = {
    "less": "the device map leaves out classifier.weight",
    "more": "its device map needs a machine with 2 GPUs, and the one with most has 0",
    "language": "is served as a language model, for which no device map is: spread it with stages, ranks",
}


def test_a_service_calls_a_vision_language_model_as_one_process_does(tmp_path: Path, world_service: Running) -> None:
    plain, path, call, other = KINDS["llava"]()
    folder = tmp_path / "model"
    plain.save_pretrained(folder)
    theirs, _ = plain_run(plain, path, other)
    seen, wanted = plain_run(plain, path, call, lambda tensor: 0.5 * tensor + 0.5 * theirs)
    vit, block, images, _ = KINDS["vit"]()
    vit.save_pretrained(tmp_path / "vit")
    service = Guest(world_service.url, folder)
    try:
        wait_until(service.is_ready, 240, service)
        asked = {"source": str(tmp_path / "vit"), "cpus": 0.1, "device_map": SPREAD}
        service.http.put("/v1/models/vit", json=asked).raise_for_status()
        assert model_of(service, "vit")["spec"]["device_map"] == SPREAD
        for wrong, told in REFUSED:
            answer = service.http.put("/v1/models/wrong", json=asked | wrong)
            assert answer.status_code in (400, 422) and told in answer.text, answer.text
        for name, wish in FAILING.items():
            service.http.put(f"/v1/models/{name}", json=asked | wish).raise_for_status()
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
        with model.trace(**call) as asked:
            got, own = layer.input, layer.output
            own[:] = 2 * own + vector
            loss = (model.output.logits * weights_of(wanted, 1)).sum()
            with loss.backward():
                back = [got.grad.save(), own.grad.clone().save()]
                own.grad *= 0.5
            loss.backward()
        assert model.validate(asked).tape_bytes == asked.receipt.tape_bytes > read.nbytes
        with pytest.raises(GraphError, match=r"does not take these arguments.*\(test_any_model_over_http.py:\d+\)"):
            model.trace(pixel_values=torch.ones(3, 3))
        with pytest.raises(GraphError, match=r"given: pixels; forward takes .*pixel_values, .*\(test_any"):
            model.trace(pixels=images["pixel_values"])
        wait_until(lambda: service.is_ready("vit"), 240, service)
        users: Any = polytrace.connect(f"http://127.0.0.1:{service.port}", "vit", key="sesame")
        calls = [torch.randn_like(images["pixel_values"]) for _ in range(6)]
        alone = run_all(users, block, calls[:1])
        together = run_all(users, block, calls)
        with users.trace(pixel_values=calls[0]):
            weight = users.get_submodule(block).mlp.fc1.weight.save()
        for name, told in TOLD.items():
            wait_until(lambda name=name: model_of(service, name)["state"] == "failed", 60, service)
            assert told in model_of(service, name)["progress"]
        for _ in range(20):  # until some have waited for the shard at the same time
            if max(num_merged for num_merged, _ in together) > 1:
                break
            together = run_all(users, block, calls)
    finally:
        service.kill_all()
    for ours, theirs in zip(back, gradients[0], strict=True):
        close(ours, theirs)
    assert max(num_merged for num_merged, _ in together) > 1
    assert alone[0][0] == 0
    assert torch.equal(weight, vit.get_submodule(block).get_parameter("mlp.fc1.weight"))
    assert torch.equal(alone[0][1], together[0][1])
    for number, (_, logits) in enumerate(together):
        close(logits, plain_run(vit, block, {"pixel_values": calls[number]}, partial(moved, number))[1])
    assert vector.grad is not None
    close(vector.grad, 1.5 * gradients[0][1].sum((0, 1)))  # of both backwards, the first of which was halved there
    close(read, seen)
    close(result, wanted)


def model_of(service: Guest, name: str) -> dict[str, Any]:
    """What the service says of a deployment."""
    return next(one for one in service.http.get("/v1/models").json()["models"] if one["name"] == name)


def run_all(model: Any, path: str, calls: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    """Sends an edit of each call before any has run; how many calls were one with it, and its logits."""
    tracers = []
    for number, call in enumerate(calls):
        with model.trace(pixel_values=call, run=False) as tracer:
            moved(number, model.get_submodule(path).output)
            model.output.logits.save()
        tracers.append(tracer)
    jobs = [model.backend.submit(tracer.built_request()) for tracer in tracers]
    for job in jobs:
        job.wait(120, None)
    results = [job.result() for job in jobs]
    found = []
    for result in results:
        (logits,) = result.values.values()
        found.append((result.receipt.passes[0].calls_merged, torch.as_tensor(logits)))
    return found


def moved(number: int, tensor: Any) -> None:
    tensor[:, 1] += number


def double(tensor: torch.Tensor) -> None:
    tensor *= 2


def close(ours: torch.Tensor, plain: torch.Tensor) -> None:
    """Shards may have another number of threads."""
    assert float((ours - plain).abs().max()) <= 1e-5 * max(1.0, float(plain.abs().max()))
