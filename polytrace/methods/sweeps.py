"""What a sweep returns: a metric of many runs that differ in one thing, as a labelled array, and what it did cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Part
from polytrace.methods.labels import labelled
from polytrace.methods.places import Prompts
from polytrace.points import DIMS

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.certificate import Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Of one prompt, arrays have no dimension "prompt"; of a list of prompts it is the first."""

    effect: DataArray  # of each run: dimensions as the method says
    clean: DataArray  # the metric of the unchanged run
    corrupt: DataArray | None  # ... of the other one, where the method has two
    receipt: Receipt


class Scale(Enum):
    """What an effect is."""

    VALUE = "value"  # the metric
    CHANGE = "change"  # less that of the clean run
    RESTORED = "restored"  # 0 as in the corrupt run, which is changed, 1 as in the clean one
    KEPT = "kept"  # the same numbers where the clean run is changed


def collect(
    cells: Mapping[tuple[int, ...], Any],
    dims: Mapping[str, Sequence[Any]],
    batch: Prompts,
    *,
    name: str,
    scale: Scale,
    receipt: Receipt,
    clean: Any,
    corrupt: Any = None,
    tokens: Mapping[str, list[list[str]] | None] | None = None,
    absent: Iterable[tuple[int, int]] = (),
) -> Sweep:
    """Saved metrics `[prompts]` by their place in `dims`; places without one are NaN.

    Of several runs of each prompt, one after another, the mean is taken. `absent`: prompts, and places in the last
    dimension that they do not have: NaN too. The rest is as in `sweep_of`.
    """
    import numpy as np

    values: Any = np.full((len(batch), *map(len, dims.values())), np.nan)
    for place, value in cells.items():
        values[(slice(None), *place)] = numbers_of(value, batch)
    for prompt, last in absent:
        values[prompt, ..., last] = np.nan
    return sweep_of(
        values, dims, batch, name=name, scale=scale, receipt=receipt, clean=clean, corrupt=corrupt, tokens=tokens
    )


def sweep_of(
    values: Any,
    dims: Mapping[str, Sequence[Any]],
    batch: Prompts,
    *,
    name: str,
    scale: Scale,
    receipt: Receipt,
    clean: Any,
    corrupt: Any = None,
    tokens: Mapping[str, list[list[str]] | None] | None = None,
) -> Sweep:
    """Metrics `[prompts, *dims]`, numpy's. `clean` and `corrupt` are saved, as `collect` has them.

    `tokens`: by dimension, each prompt's texts.
    """
    best = numbers_of(clean, batch)
    least = None if corrupt is None else numbers_of(corrupt, batch)
    shape = (-1, *[1] * len(dims))
    if scale is Scale.CHANGE:
        values = values - best.reshape(shape)
    elif scale in (Scale.RESTORED, Scale.KEPT):
        assert least is not None
        if (best == least).any():
            prompt = int((best == least).argmax())
            raise GraphError(
                f"the metric {name!r} is {best[prompt]:g} in the clean and in the corrupt run of prompt {prompt}: "
                "there is nothing to restore; normalise=False gives it as it is",
                where=user_line(),
            )
        values = (values - least.reshape(shape)) / (best - least).reshape(shape)
    titles = {Scale.VALUE: name, Scale.CHANGE: f"change of {name}"}
    named: dict[str, Sequence[Any] | None] = dict(dims)
    effect = of_prompts(values, named, batch, titles.get(scale, f"{name} {scale.value}"))
    for dim, texts in (tokens or {}).items():
        if texts is not None:
            alike = all(own == texts[0] for own in texts)
            coordinate = (dim, texts[0]) if alike else (("prompt", dim), texts)
            effect = effect.assign_coords({f"{dim}_token": coordinate})
    return Sweep(
        effect=effect,
        clean=of_prompts(best, {}, batch, name),
        corrupt=None if least is None else of_prompts(least, {}, batch, name),
        receipt=receipt,
    )


def cell(of: str, part: Part, unit: int | None = None) -> tuple[Any, ...]:
    """The index of a part of a point, of one head or neuron of it or of all."""
    rows, columns = part
    if DIMS.get(of, ())[1:2] == ("head",):  # scores and patterns: columns are queries
        return (rows, slice(None) if unit is None else unit, columns)
    return (rows, columns) if unit is None else (rows, columns, unit)


def copy_parts(target: Any, source: Any, of: str, pairs: Sequence[tuple[Part, Part]], unit: int | None = None) -> None:
    """Puts places of one run's value into another run's, in place. `pairs`: the target's part, the source's part."""
    for ours, theirs in pairs:
        target[cell(of, ours, unit)] = source[cell(of, theirs, unit)]


def numbers_of(value: Any, batch: Prompts) -> Any:
    """A saved metric as one number for each prompt, numpy's float64."""
    import numpy as np

    return np.array(value.tolist(), dtype=float).reshape(len(batch), -1).mean(1)


def of_prompts(values: Any, dims: Mapping[str, Sequence[Any] | None], batch: Prompts, name: str) -> DataArray:
    """Numbers `[prompts, *dims]` with labels; without the first dimension where one prompt was given alone."""
    if batch.is_single:
        return labelled(values[0], dims, name=name)
    return labelled(values, {"prompt": None, **dims}, name=name, prompts=batch.labels)
