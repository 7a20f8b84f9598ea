"""A read of many layers in nnsight. Run by `bench.language` with the Python of nnsight's own environment; answers JSON
lines on the standard output.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

nnsight: Any = importlib.import_module("nnsight")


def main() -> None:
    """Answers the commands on the standard input until it ends."""
    folder, answers = Path(sys.argv[1]), sys.stdout
    sys.stdout = sys.stderr
    module = importlib.import_module("nnsight.modeling.transformers")
    model = module.TransformersModel(str(folder), task="text-generation", dtype=torch.float32, dispatch=True)
    for line in sys.stdin:
        command = json.loads(line)
        torch.set_num_threads(command["threads"])
        layers = range(model.config.num_hidden_layers)
        start = time.perf_counter()
        with torch.no_grad():
            saved = read_every(model, command["ids"], layers if command["every"] else layers[-1:])
        answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
        answer["last"] = saved[-1][0, -1].tolist()
        print(json.dumps(answer), file=answers, flush=True)


def read_every(model: Any, ids: list[int], layers: range) -> Any:
    """The outputs of layers, as its documentation collects them."""
    with model.trace([ids]):
        saved = nnsight.save([model.model.layers[layer].output for layer in layers])
    return saved  # noqa: RET504  nnsight takes the block's source apart: a return inside of it would not run


if __name__ == "__main__":
    main()
