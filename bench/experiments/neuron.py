"""One neuron over a list of prompts of unequal length: a column of what an MLP holds."""

from __future__ import annotations

from typing import Any

import torch

from bench.experiments.experiment import FACTS, Answer, Values, layer_names, pieces
from bench.plain import Plain


def ask(model: Any, turn: int) -> Answer:
    """One neuron of one layer over a list of prompts of unequal length."""
    prompts, layer, neuron = _neuron(turn, len(model.model.layers))
    with model.trace(prompts) as tracer:
        activation = model.model.layers[layer].mlp.down_proj.input[..., neuron].save()
    return Answer(values={"activation": activation}, receipts=(tracer.receipt,))


def check(plain: Plain, turn: int) -> Values:
    """One forward a prompt; rows are left-padded with zeros."""
    prompts, layer, neuron = _neuron(turn, len(layer_names(plain)))
    name = f"{layer_names(plain)[layer]}.mlp.down_proj"
    rows = [plain.read(plain.ids(prompt), inputs=[name])[name][0, :, neuron] for prompt in prompts]
    longest = max(len(row) for row in rows)
    return {"activation": torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])}


def tell(values: Values, model: Any, turn: int) -> str:
    """Where the neuron fires most."""
    prompts, layer, neuron = _neuron(turn, len(model.model.layers))
    activation = values["activation"]
    row, column = divmod(int(activation.abs().argmax()), activation.shape[1])
    tokens = pieces(model, prompts[row])
    token = tokens[column - (activation.shape[1] - len(tokens))]
    peak = float(activation[row, column])
    return f"neuron {neuron} of layer {layer} peaks at {peak:.2f} on {token!r} in “{prompts[row]}”"


def _neuron(turn: int, num_layers: int) -> tuple[list[str], int, int]:
    return [prompt for prompt, _ in FACTS], (3 * turn + 1) % num_layers, 17 * (turn + 1)
