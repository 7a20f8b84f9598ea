"""Which features of an SAE are active where: encoded where the model is; the strongest, or chosen ones, come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.imports import needs
from polytrace.methods.labels import labelled
from polytrace.methods.places import Prompts, positions_of, prompts_of
from polytrace.methods.saes.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import DataArray

    from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Activations by prompt and position. Where a shorter prompt has no token they are NaN, and `feature` is -1."""

    activation: DataArray  # [prompt, position, rank], strongest first, or [prompt, position, feature] of chosen ones
    feature: DataArray | None  # [prompt, position, rank]: the number of each; None of chosen ones
    receipt: Receipt

    def table(self, prompt: int = 0) -> DataFrame:
        """One prompt: a row a token, a column a rank or feature; what is not active is left blank."""
        pandas = needs("pandas")
        own = self.activation.isel(prompt=prompt)
        cells: list[list[str]] = []
        for row in range(own.sizes["position"]):
            values = own.isel(position=row).values.tolist()
            if self.feature is None:
                cells.append([f"{value:.2f}" if value > 0 else "" for value in values])
                continue
            numbers = self.feature.isel(prompt=prompt, position=row).values.tolist()
            told = zip(numbers, values, strict=True)
            cells.append([f"{number}: {value:.2f}" if value > 0 else "" for number, value in told])
        names = pandas.Index(own.position_token.values, name="token")
        columns = own[own.dims[-1]].values if self.feature is None else range(own.sizes["rank"])
        return pandas.DataFrame(cells, index=names, columns=list(columns))

    def to_dataframe(self) -> DataFrame:
        """A row a prompt, position and active feature, in this order and strongest first."""
        from xarray import Dataset

        arrays = {"activation": self.activation} | ({} if self.feature is None else {"feature": self.feature})
        found = Dataset(arrays).to_dataframe().reset_index()
        return found[found.activation > 0].reset_index(drop=True)


def sae_features(
    model: Model,
    prompts: Any,
    sae: SparseAutoencoder,
    *,
    top_k: int = 10,
    features: Sequence[int] | int | None = None,
    positions: Any = None,
) -> Features:
    """The `top_k` strongest features of each token, or the activations of chosen `features`, of any prompts.

    Encoded on the service; weights are uploaded once and stay by their content, of chosen features their columns alone.
    8 bytes a token and rank come back, or 4 a token and feature. `positions`: an int or several, counted in each
    prompt; None: all. One request. Bricken et al. 2023; Cunningham et al. 2023 (arXiv:2309.08600).
    """
    batch = prompts_of(model, prompts)
    places, is_whole = positions_of(batch, positions)
    numbers = None if features is None else sae.numbers(features)
    if numbers is None and (not isinstance(top_k, int) or not 1 <= top_k <= sae.num_features):
        raise GraphError(f"top_k is 1-{sae.num_features}, not {top_k!r}", where=user_line())
    saved: list[tuple[Any, ...]] = []
    with model.trace() as tracer:
        for sequence in batch.sequences:  # each an invoke of its own: the bits that it has alone
            with tracer.invoke([list(sequence)]):
                value = sae.taken(model)
                rows = value if is_whole else value.at(places)
                if numbers is not None:
                    saved.append((sae.encode(rows, numbers).float().save(),))
                else:
                    values, which = sae.strongest(rows, top_k)
                    saved.append((values.float().save(), which.int().save()))
    parts = [_joined(own, batch, is_whole) for own in zip(*saved, strict=True)]
    dims: dict[str, Any] = {"prompt": None, "position": places, "rank" if numbers is None else "feature": numbers}
    around = [[own[place] if -len(own) <= place < len(own) else "" for place in places] for own in batch.texts]
    coords = {"position_token": (("prompt", "position"), around), "prompt_text": ("prompt", batch.labels)}
    named = zip(("activation", "feature"), parts, strict=False)
    arrays = {name: labelled(part, dims, name=name).assign_coords(coords) for name, part in named}
    return Features(activation=arrays["activation"], feature=arrays.get("feature"), receipt=tracer.receipt)


def _joined(parts: Sequence[Any], batch: Prompts, is_whole: bool) -> Any:
    """Prompts put together, `[prompts, positions, ...]`."""
    import numpy as np

    arrays = [np.asarray(part) for part in parts]
    if not is_whole:
        return np.concatenate(arrays)
    nothing = np.nan if arrays[0].dtype.kind == "f" else -1
    whole = np.full((len(arrays), batch.longest, *arrays[0].shape[2:]), nothing, arrays[0].dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[batch.longest - array.shape[1] :] = array[0]
    return whole
