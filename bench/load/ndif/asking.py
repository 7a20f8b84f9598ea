"""Runs with the Python of NDIF's environment: requests as nnsight sends them, and the values of answers.

    asking.py write MODEL CHOICES.json FOLDER    FOLDER/0.bin, 1.bin, ..., and `model_key`
    asking.py read FOLDER                        FOLDER/0.answer, ... -> FOLDER/answers.json

A choice is what `bench.workloads.Choice` says; the kinds are those of `bench.workloads` that both sides have.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch


def write(name: str, choices: list[dict[str, Any]], folder: Path) -> None:
    """The payload of each choice."""
    remote = importlib.import_module("nnsight.intervention.backends.remote")
    schema = importlib.import_module("nnsight.schema.request")

    class Kept(remote.RemoteBackend):  # type: ignore[misc, name-defined]
        """Serializes as nnsight does, and sends nothing."""

        payload = b""

        def __call__(self, tracer: Any = None) -> None:
            self.payload = schema.RequestModel.serialize(tracer, self.compress)

    model = importlib.import_module("nnsight.modeling.transformers").TransformersModel(name, task="text-generation")
    (folder / "model_key").write_text(model.to_model_key())
    for number, choice in enumerate(choices):
        backend = Kept(model.to_model_key())
        KINDS[choice["kind"]](model, choice, backend)
        (folder / f"{number}.bin").write_bytes(backend.payload)


def ask_residual(model: Any, at: dict[str, Any], backend: Any) -> None:
    layer = at["layer"]
    with model.trace(at["prompt"], backend=backend):
        residual = model.model.layers[layer].output[:, -1].save()


def ask_lens(model: Any, at: dict[str, Any], backend: Any) -> None:
    layer = at["layer"]
    with model.trace(at["prompt"], backend=backend):
        hidden = model.model.layers[layer].output[:, -1]
        top = model.lm_head(model.model.norm(hidden)).softmax(-1).topk(5)[0].save()


def ask_steering(model: Any, at: dict[str, Any], backend: Any) -> None:
    layer, direction = at["layer"], torch.tensor(at["direction"])
    with model.trace(at["prompt"], backend=backend):
        model.model.layers[layer].output[:, -1] += direction
        logits = model.lm_head.output[:, -1].save()


def ask_ablation(model: Any, at: dict[str, Any], backend: Any) -> None:
    layer, start, stop = at["layer"], at["start"], at["stop"]
    with model.trace(at["prompt"], backend=backend):
        model.model.layers[layer].self_attn.o_proj.input[..., start:stop] = 0
        logits = model.lm_head.output[:, -1].save()


KINDS = {
    "residual": ask_residual,
    "logit lens": ask_lens,
    "steering": ask_steering,
    "head ablation": ask_ablation,
}


def read(folder: Path) -> None:
    """The values of each answer, as lists of numbers."""
    schema = importlib.import_module("nnsight.schema.response")
    found = []
    for number in range(len(list(folder.glob("*.answer")))):
        response = schema.ResponseModel.unpickle((folder / f"{number}.answer").read_bytes())
        content = importlib.import_module("zstandard").ZstdDecompressor().decompress(response.data)
        saves = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
        (value,) = saves.values()
        found.append({"shape": list(value.shape), "values": value.flatten().tolist()})
    (folder / "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(sys.argv[2], json.loads(Path(sys.argv[3]).read_text()), Path(sys.argv[4]))
    else:
        read(Path(sys.argv[2]))
