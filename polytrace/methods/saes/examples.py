"""The tokens of a dataset for which features of an SAE are strongest, with what stands around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polytrace
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.labels import labelled
from polytrace.methods.places import prompts_of
from polytrace.methods.saes.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import DataArray

    from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The strongest tokens of each feature. Where a feature was active fewer times the rest is 0, -1 and ""."""

    activation: DataArray  # [feature, rank]; coordinates "prompt", "position", "token", "before", "after"

    def table(self, feature: int | None = None) -> DataFrame:
        """A row an example, of one feature or all: its activation, prompt, position, token and what is around it."""
        chosen = self.activation if feature is None else self.activation.sel(feature=[feature])
        found = chosen.to_dataframe(name="activation").reset_index()
        order = ["feature", "rank", "activation", "prompt", "position", "before", "token", "after"]
        return found[found.activation > 0][order].reset_index(drop=True)


def top_activations(
    model: Model,
    dataset: Iterable[Any],
    sae: SparseAutoencoder,
    features: Sequence[int] | int,
    top_k: int = 10,
    *,
    once: bool = True,
    context: int = 12,
) -> Examples:
    """The `top_k` strongest tokens of each of some features over a dataset (Bricken et al. 2023).

    `dataset`: prompts as `model.map` takes them; they are kept here, as the examples' words are found again in them.
    `once`: of each prompt its strongest token alone. `context`: tokens that are told before and after. Encoded and
    combined where the model is: of each feature `top_k` numbers and their places come back.
    """
    numbers = sae.numbers(features)
    if not isinstance(top_k, int) or top_k < 1 or not isinstance(context, int) or context < 0:
        raise GraphError(
            f"top_k is at least 1 and context at least 0, not {top_k!r} and {context!r}", where=user_line()
        )
    if isinstance(dataset, str):
        raise GraphError("a dataset is a list of prompts, or another iterable, not one text", where=user_line())
    prompts = list(dataset)

    def body() -> dict[str, Any]:
        active = sae.encode(sae.taken(model), numbers).float()
        if once:
            active = active * (active == active.amax(1, keepdim=True))
        return {str(number): polytrace.top_k(active[..., place], top_k) for place, number in enumerate(numbers)}

    found = model.map(prompts, body).run()
    rows = []
    for number in numbers:
        best = found[str(number)]
        own = zip(best.values.tolist(), best.prompts.tolist(), best.positions.tolist(), strict=True)
        told = [_example(model, prompts[prompt], prompt, place[0], value, context) for value, prompt, place in own]
        told = [one for one in told if one[0] > 0]
        rows.append(told + [(0.0, -1, -1, "", "", "")] * (top_k - len(told)))
    columns = [[[one[place] for one in row] for row in rows] for place in range(6)]
    names = ("prompt", "position", "before", "token", "after")
    coords = {name: (("feature", "rank"), column) for name, column in zip(names, columns[1:], strict=True)}
    dims: dict[str, Any] = {"feature": numbers, "rank": list(range(top_k))}
    return Examples(activation=labelled(columns[0], dims, name="activation").assign_coords(coords))


def _example(
    model: Model, given: Any, prompt: int, position: int, value: float, context: int
) -> tuple[float, int, int, str, str, str]:
    texts = prompts_of(model, given).texts[0]
    before, after = texts[max(0, position - context) : position], texts[position + 1 : position + 1 + context]
    return float(value), int(prompt), position, "".join(before), texts[position], "".join(after)
