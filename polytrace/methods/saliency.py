"""Saliency: which tokens would change a metric if they changed, by one backward.

Simonyan et al., "Deep Inside Convolutional Networks" (2013, arXiv:1312.6034): the gradient's length; Shrikumar et al.,
"Not Just a Black Box" (2016, arXiv:1605.01713): the gradient times what is there. Both look at one point of a curve:
where the metric has saturated the gradient is small, however much a token matters (`integrated_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Axis, Places, axis_of, texts_at
from polytrace.methods.metrics import Metric, Run, as_metric, measure
from polytrace.methods.places import GIVEN, OF_LAYERS, Prompts, layers_of, prompts_of, value_of
from polytrace.methods.sweeps import Scale, Sweep, sweep_of
from polytrace.points import DIMS

if TYPE_CHECKING:
    from polytrace.model import Model

EMBEDDING = "embedding"  # what the embedding of tokens gives, before any layer


def saliency(
    model: Model,
    prompts: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    of: str = EMBEDDING,
    layers: Any = None,
    positions: Any = None,
    method: str = "norm",
) -> Sweep:
    """How much a metric depends on each token: `effect` [position], or [layer, position].

    `of`: "embedding", what tokens are embedded as, or a point of layers that has a row for each token. `method`:
    "norm", the length of the metric's gradient at the token's row, or "dot", the gradient times the row. `metric` and
    `positions` as in `patch_activations`; of several positions in one step the sum. One request, one backward.
    """
    if method not in ("norm", "dot"):
        raise GraphError(f"method is 'norm' or 'dot', not {method!r}", where=user_line())
    batch, measured = prompts_of(model, prompts), as_metric(metric)
    numbers, axis = numbers_at(model, of, layers), axis_of(batch, positions)
    with model.trace(batch.ids) as tracer:
        best = measure(measured, Run(model, batch))
        values = [row_value(model, of, number) for number in numbers]
        with best.sum().backward():
            saved = []
            for value in values:
                gradient, features = value.grad.float(), list(range(2, len(value.shape)))
                if method == "dot":
                    saved.append((gradient * value.float()).sum(features).save())
                else:
                    saved.append((gradient * gradient).sum(features).sqrt().save())
        best = best.save()
    names = {"norm": f"gradient of {measured.name}", "dot": f"gradient of {measured.name} times input"}
    return sweep_of(
        by_step(model, saved, batch, axis, of),
        step_dims(of, numbers, axis),
        batch,
        name=names[method],
        scale=Scale.VALUE,
        receipt=tracer.receipt,
        clean=best,
        tokens={"position": texts_at(model, batch, axis)},
    )


def gradient_x_input(
    model: Model,
    prompts: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    of: str = EMBEDDING,
    layers: Any = None,
    positions: Any = None,
) -> Sweep:
    """`saliency` with `method="dot"`: to first order, what the metric would lose if the token's row were 0."""
    return saliency(model, prompts, metric, of=of, layers=layers, positions=positions, method="dot")


def numbers_at(model: Model, of: str, layers: Any) -> list[int | None]:
    """Layers of a point that has a row for each token; None is the embedding. Raises GraphError for other points."""
    if of == EMBEDDING:
        if layers is not None:
            raise GraphError(
                "the embedding is of no layer: leave `layers` out, or give a point of layers as `of`", where=user_line()
            )
        return [None]
    known = [EMBEDDING, *GIVEN, *(name for name in OF_LAYERS if DIMS[name][1] == "token" and name != "router")]
    if of not in known:
        raise GraphError(f"{of!r} has no row for each token; these have: {', '.join(known)}", where=user_line())
    return list(layers_of(model, layers))


def row_value(model: Model, of: str, number: int | None) -> Any:
    """In the open invoke, `[sequences, tokens, ...]`."""
    return model.embed_tokens.output if number is None else value_of(model, number, of)


def by_step(model: Model, saved: Sequence[Any], batch: Prompts, axis: Axis, of: str) -> Any:
    """Saved numbers of every token `[prompts, longest]` of each layer, put together as `step_dims` has it, numpy's.

    NaN where a prompt has no token for a step.
    """
    import numpy as np

    tokens = np.array([value.tolist() for value in saved], dtype=float).reshape(len(saved), len(batch), batch.longest)
    steps: list[Places] = [axis.places(model, batch, step) for step in range(len(axis.labels))]
    array = np.full((len(batch), len(saved), len(steps)), np.nan)
    for step, places in enumerate(steps):
        for prompt, own in enumerate(places):
            if own:
                first = batch.longest - batch.lengths[prompt]
                array[prompt, :, step] = tokens[:, prompt, [first + place for place in own]].sum(1)
    return array[:, 0] if of == EMBEDDING else array


def step_dims(of: str, numbers: Sequence[int | None], axis: Axis) -> dict[str, Sequence[Any]]:
    """Those of an effect by position."""
    return {"position": axis.labels} if of == EMBEDDING else {"layer": numbers, "position": axis.labels}
