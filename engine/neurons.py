"""Where a layer's neurons are before and after their activation, and which module routes to experts.

Told by numbers outside of attention and experts: what projects back is given what an activation gave, or its product
with what another matrix gave.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from engine.parts import Packed, Role
from engine.seen_layer import SeenLayer, as_rows, first_tensor, is_activation, is_matrix, is_same


def find_neurons(layer: SeenLayer) -> tuple[str | None, str | None]:
    """The activation, and what projects the neurons back; outside of attention and experts. Both or none."""
    matrices = [
        path
        for path, side, value in layer.calls
        if side == "output"
        and layer.is_in_mlp(path)
        and is_matrix(layer.modules[path])
        and first_tensor(value) is not None
    ]
    hidden = as_rows(layer.value("", "input")).shape[1]
    downs = [path for path in matrices if as_rows(first_tensor(layer.value(path, "output"))).shape[1] == hidden]
    for down in reversed(downs):
        neurons = as_rows(layer.value(down, "input"))
        for path, side, value in layer.calls:
            is_act = side == "output" and layer.is_in_mlp(path) and is_activation(layer.modules[path])
            if is_act and isinstance(value, Tensor) and as_rows(value).shape == neurons.shape:
                given = as_rows(value)
                if is_same(neurons, given) or any(is_same(neurons, given * own) for own in layer.linear(neurons)):
                    return path, down
    return None, None


def find_fused(layer: SeenLayer, act: str | None) -> Iterator[tuple[Role, Packed]]:
    """Whose output the activation is given, and what its result is multiplied with."""
    if act is None:
        return
    before = as_rows(layer.value(act, "input"))
    width = before.shape[1]
    for path, features in layer.outputs(within=None):
        if not (layer.is_in_mlp(path) and is_matrix(layer.modules[path])):
            continue
        if features.shape[1] == width and is_same(features, before):
            yield "gate", Packed(path, ("gate",))
        elif features.shape[1] == 2 * width and is_same(features[:, :width], before):
            yield "gate", Packed(path, ("gate", "up"))
            yield "up", Packed(path, ("gate", "up"))
        elif features.shape[1] == 2 * width and is_same(features[:, width:], before):
            yield "gate", Packed(path, ("up", "gate"))
            yield "up", Packed(path, ("up", "gate"))
    after = as_rows(layer.value(act, "output"))
    taken = (value for path, side, value in layer.calls if side == "input" and layer.is_in_mlp(path))
    downs = [as_rows(value) for value in taken if isinstance(value, Tensor)]
    for path, features in layer.outputs(within=None):
        is_tried = layer.is_in_mlp(path) and is_matrix(layer.modules[path]) and features.shape == after.shape
        if is_tried and any(own.shape == after.shape and is_same(own, after * features) for own in downs):
            yield "up", Packed(path, ("up",))


def find_router(layer: SeenLayer, experts: str) -> tuple[str, tuple[int | str, ...]] | None:
    """Whose output has a logit an expert, and where in it."""
    number = getattr(layer.modules[experts], "num_experts", None)
    for path, side, value in layer.calls:
        if side == "output" and layer.is_in_mlp(path):
            leaves = enumerate(value) if isinstance(value, tuple) else [(None, value)]
            for place, leaf in leaves:
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[-1] == number:
                    return path, () if place is None else (place,)
    return None
