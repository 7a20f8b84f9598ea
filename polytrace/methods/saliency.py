"""Saliency: which tokens would change a metric if they changed, by one backward.

Simonyan et al., "Deep Inside Convolutional Networks" (2013, arXiv:1312.6034): the gradient's length; Shrikumar et al.,
"Not Just a Black Box" (2016, arXiv:1605.01713): the gradient times what is there. Both look at one point of a curve:
where the metric has saturated the gradient is small, however much a token matters (`integrated_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.metrics import Metric, Run, measure
from polytrace.methods.sweeps import Sweep
from polytrace.methods.token_rows import EMBEDDING, token_rows

if TYPE_CHECKING:
    from polytrace.model import Model


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
    rows = token_rows(model, prompts, metric, of=of, layers=layers, positions=positions)
    with model.trace(rows.batch.ids) as tracer:
        best = measure(rows.measured, Run(model, rows.batch))
        values = [rows.value(number) for number in rows.numbers]
        with best.sum().backward():
            saved = []
            for value in values:
                gradient, features = value.grad.float(), list(range(2, len(value.shape)))
                if method == "dot":
                    saved.append((gradient * value.float()).sum(features).save())
                else:
                    saved.append((gradient * gradient).sum(features).sqrt().save())
        best = best.save()
    name = f"gradient of {rows.measured.name}" + (" times input" if method == "dot" else "")
    return rows.sweep(saved, name, clean=best, receipt=tracer.receipt)


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
