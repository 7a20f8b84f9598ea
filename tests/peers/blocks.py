"""One program for both: what stands around and inside of a block, written once, run by nnsight and by polytrace.

As a command it is nnsight's side: `python -m peers.blocks OUT` saves what each block gave.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "tinyworld" / "model"
EIFFEL = "The Eiffel Tower is in the city of"
SHORT = "The Colosseum is in"
# what both constructors take
LOADED: dict[str, Any] = {
    "device_map": "cpu",
    "dispatch": True,
    "torch_dtype": torch.float32,
    "rename": {"model.layers": "blocks", "mlp": "feedforward"},
}


def run(model: Any, save: Callable[[Any], Any]) -> dict[str, torch.Tensor]:
    """What each block gave, by name."""
    layers, found = model.model.layers, {}

    with model.trace(EIFFEL):
        for number in range(3, 6):
            layers[number].skip(layers[number].input)
            if number == 4:
                found["a skipped layer's output"] = save(layers[4].output)
        found["three layers skipped"] = save(model.lm_head.output)

    with model.trace(EIFFEL):
        first = layers[0].output
        layers[1].mlp.skip(layers[1].mlp.input)
        layers[5].skip(first)
        found["an mlp and a layer skipped"] = save(model.lm_head.output)

    with model.trace(EIFFEL) as tracer:
        found["before a stop"] = save(layers[0].output)
        tracer.stop()

    with model.trace(EIFFEL) as tracer:
        cache = tracer.cache(modules=[layers[0], layers[5].mlp, "model.lm_head"], include_inputs=True)
        layers[0].output[:, -1] = 0
    found["cached, changed"] = cache["model.model.layers.0"].output
    found["cached by attribute"] = cache.model.model.layers[5].mlp.output
    found["cached input"] = cache.model.model.layers[5].mlp.input
    found["cached head"] = cache["model.lm_head"].output

    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(EIFFEL):
            clean = layers[3].output[:, -1]
            barrier()
        with tracer.invoke(SHORT):
            barrier()
            layers[3].output[:, -1] = clean
            found["patched behind a barrier"] = save(model.lm_head.output[:, -1])

    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            found["first of three"] = save(model.lm_head.output[:, -1])
        with tracer.invoke([SHORT, EIFFEL]):
            found["others of three"] = save(model.lm_head.output[:, -1])
        with tracer.invoke():
            found["all of three"] = save(model.lm_head.output[:, -1])

    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            found["steered for all, long"] = save(model.lm_head.output[:, -1])
        with tracer.invoke(SHORT):
            found["steered for all, short"] = save(model.lm_head.output[:, -1])
        with tracer.invoke():
            layers[2].output[:, -1] = layers[2].output[:, -1] * 2

    with model.trace(EIFFEL) as tracer:
        result = save(tracer.result)
    found["the model's result"] = result["logits"]

    with model.trace(EIFFEL, remote=False):
        found["by an alias"] = save(model.blocks[2].feedforward.output)

    with model.trace(EIFFEL):
        kept = save([])
        for layer in layers:
            kept.append(layer.output[:, -1])
    found["a list that was filled"] = torch.stack(list(kept))

    with model.scan(EIFFEL):
        width = save(layers[0].output.shape[-1])
    found["a scanned width"] = torch.tensor(width)
    return {name: value.detach().clone() for name, value in found.items()}


if __name__ == "__main__":
    import nnsight
    from safetensors.torch import save_file

    save_file(run(nnsight.LanguageModel(str(FOLDER), **LOADED), nnsight.save), sys.argv[1])
