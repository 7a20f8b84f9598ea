"""What methods return: arrays whose dimensions have names and whose places have labels (xarray)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.methods.imports import needs

if TYPE_CHECKING:
    from xarray import DataArray

Labels = Sequence[Any] | None  # of a dimension's places; None: they are numbered


def labelled(
    values: Any,
    dims: Mapping[str, Labels],
    *,
    name: str,
    tokens: Mapping[str, Sequence[str]] | None = None,
    prompts: Sequence[str] | None = None,
) -> DataArray:
    """An array with labels. `values` is a saved value (a tensor or an array), or lists of numbers.

    `tokens`: by dimension, the text of the token at each of its places; it becomes the coordinate `<dimension>_token`
    beside the numbers, as texts may repeat, and texts of `prompts` become `prompt_text`. Floating values become
    float32 or stay float64.
    """
    import numpy as np

    xarray = needs("xarray")
    plain = values.detach().cpu() if hasattr(values, "detach") else values
    if hasattr(plain, "is_floating_point") and plain.is_floating_point() and plain.element_size() < 4:
        plain = plain.float()  # numpy knows no bfloat16
    array = np.asarray(plain)
    coords: dict[str, Any] = {dim: list(labels) for dim, labels in dims.items() if labels is not None}
    for dim, texts in (tokens or {}).items():
        coords[f"{dim}_token"] = (dim, list(texts))
    if prompts is not None:
        coords["prompt_text"] = ("prompt", list(prompts))
    made: DataArray = xarray.DataArray(array, dims=tuple(dims), coords=coords, name=name)
    return made
