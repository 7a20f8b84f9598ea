"""Rows of tokens that a metric's gradient is asked for: how methods that attribute to tokens begin and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Axis, Places, axis_of, texts_at
from polytrace.methods.metrics import Metric, as_metric
from polytrace.methods.places import GIVEN, OF_LAYERS, Prompts, layers_of, prompts_of, value_of
from polytrace.methods.sweeps import Scale, Sweep, sweep_of
from polytrace.points import DIMS

if TYPE_CHECKING:
    from polytrace.model import Model

EMBEDDING = "embedding"  # what the embedding of tokens gives, before any layer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRows:
    """The rows of prompts' tokens at one point, and the metric that they are asked about."""

    model: Model
    batch: Prompts
    measured: Metric
    of: str  # "embedding", or a point of layers
    numbers: Sequence[int | None]  # layers; None is the embedding
    axis: Axis  # steps of positions

    @property
    def layer_dims(self) -> dict[str, Sequence[Any]]:
        """Empty for the embedding, which is of no layer."""
        return {} if self.of == EMBEDDING else {"layer": self.numbers}

    def value(self, number: int | None) -> Any:
        """In the open invoke, `[sequences, tokens, ...]`."""
        return self.model.embed_tokens.output if number is None else value_of(self.model, number, self.of)

    def by_step(self, saved: Sequence[Any], axis: Axis) -> Any:
        """Saved numbers of every token `[prompts, longest]` of each layer as `[prompts, layers, steps]`, numpy's.

        NaN where a prompt has no token for a step.
        """
        import numpy as np

        batch, shape = self.batch, (len(saved), len(self.batch), self.batch.longest)
        tokens = np.array([value.tolist() for value in saved], dtype=float).reshape(shape)
        steps: list[Places] = [axis.places(self.model, batch, step) for step in range(len(axis.labels))]
        array = np.full((len(batch), len(saved), len(steps)), np.nan)
        for step, places in enumerate(steps):
            for prompt, own in enumerate(places):
                if own:
                    first = batch.longest - batch.lengths[prompt]
                    array[prompt, :, step] = tokens[:, prompt, [first + place for place in own]].sum(1)
        return array

    def sweep(self, saved: Sequence[Any], name: str, *, clean: Any, receipt: Receipt) -> Sweep:
        """Saved numbers of every token as an effect by position, or by layer and position."""
        array = self.by_step(saved, self.axis)
        return sweep_of(
            array[:, 0] if self.of == EMBEDDING else array,
            {**self.layer_dims, "position": self.axis.labels},
            self.batch,
            name=name,
            scale=Scale.VALUE,
            receipt=receipt,
            clean=clean,
            tokens={"position": texts_at(self.model, self.batch, self.axis)},
        )


def token_rows(
    model: Model, prompts: Any, metric: Metric | Callable[[Any], Any], *, of: str, layers: Any, positions: Any
) -> TokenRows:
    """Raises GraphError for points that have no row for each token, and for layers of the embedding."""
    batch, measured = prompts_of(model, prompts), as_metric(metric)
    numbers = _numbers_at(model, of, layers)
    axis = axis_of(batch, positions)
    return TokenRows(model=model, batch=batch, measured=measured, of=of, numbers=numbers, axis=axis)


def _numbers_at(model: Model, of: str, layers: Any) -> list[int | None]:
    """None is the embedding."""
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
