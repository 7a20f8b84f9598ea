"""Learnt steering: the vector that, added to the residual, makes the model say something, found by gradients.

Subramani et al., "Extracting Latent Steering Vectors from Pretrained Language Models" (2022, arXiv:2205.05124). The
whole learning is one request: the model's weights stay as they are, and only the vector and the losses come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.descent import Descent, Goal
from polytrace.methods.directions import Vectors
from polytrace.methods.imports import needs_torch
from polytrace.methods.labels import labelled
from polytrace.methods.places import Positions, check_stream, layers_of, position_in, prompts_of
from polytrace.methods.steering import RESIDUAL

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Learnt:
    """A steering vector; `steer(model, prompts, learnt.vectors)` and `steering_edit` take it."""

    vectors: Vectors  # of one layer
    losses: DataArray  # [step]: before each step, and after the last
    share: float | None  # of the prompts that end with saying their target; None where a metric was the goal
    receipt: Receipt

    @property
    def vector(self) -> Any:
        """`[hidden]`, float32."""
        tensor = self.vectors.tensor[0]
        return tensor if tensor.ndim == 1 else tensor[0]


def learn_steering_vector(
    model: Model,
    prompts: Any,
    targets: Any,
    *,
    layer: int,
    of: str = "resid_post",
    positions: Positions = -1,
    steps: int = 50,
    lr: float = 0.1,
    optimiser: str = "adam",
    start: Any = None,
    max_norm: float | None = None,
) -> Learnt:
    """The vector `[hidden]` that, added at a layer, makes each prompt go on with its target.

    `targets`: a token (id or text) for all prompts, or a list with one each: the loss is their mean surprise, in nats;
    or a metric, which is made large. `positions`: where the vector is added, an int or several, counted in each prompt,
    or None for every token. `of`: "resid_pre", "resid_mid" or "resid_post". `optimiser`: "adam" or "sgd", with the rate
    `lr`. `start`: a vector to begin with, else 0. `max_norm`: the vector is cut to this length behind each step.

    `steps`, at most 100, are all in one request: each runs every prompt forwards, and backwards down to the layer.
    """
    torch = needs_torch("learn_steering_vector")
    check_stream(of, RESIDUAL)
    (number,) = layers_of(model, layer)
    batch = prompts_of(model, prompts)
    places = None if positions is None else [positions] if isinstance(positions, int) else list(positions)
    for place in places or ():
        for prompt in range(len(batch)):
            position_in(batch, prompt, place)
    goal, descent = Goal.of(model, batch, targets), Descent.of(steps, lr, optimiser)
    if max_norm is not None and not max_norm > 0:
        raise GraphError(f"max_norm is above 0, not {max_norm!r}", where=user_line())
    first = _start(model, start)

    def add(vector: Any) -> None:
        residual = getattr(model.layers[number], of)
        rows = residual if positions is None else residual.at(positions)
        rows[:] = rows + vector

    def bound(vector: Any) -> Any:
        if max_norm is None:
            return vector
        return vector * (max_norm / vector.norm().clamp_min(1e-30)).clamp(max=1.0)

    with model.trace() as tracer:
        vector, losses, said = descent.run(tracer, goal, first, add, bound)
        vector, losses = vector.save(), torch.stack(losses).save()
        said = None if said is None else said.save()
    tensor = vector[None] if places is None else vector[None, None].repeat(1, len(places), 1)
    vectors = Vectors(
        tensor=tensor,
        layers=(number,),
        positions=None if places is None else tuple(places),
        of=of,
        method="learnt",
        receipts=(tracer.receipt,),
    )
    return Learnt(
        vectors=vectors,
        losses=labelled(losses, {"step": None}, name="loss"),
        share=goal.share(said),
        receipt=tracer.receipt,
    )


def _start(model: Model, start: Any) -> Any:
    torch = needs_torch("learn_steering_vector")
    hidden = model.description.hidden_size
    if start is None:
        return torch.zeros(hidden)
    given = torch.as_tensor(start, dtype=torch.float32)
    if tuple(given.shape) != (hidden,):
        raise GraphError(f"a vector to begin with is [{hidden}], not {list(given.shape)}", where=user_line())
    return given
