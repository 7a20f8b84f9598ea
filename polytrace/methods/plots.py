"""Pictures and tables of labelled arrays: heat maps with tokens on the axes, curves over layers, the strongest places.

Takes what `polytrace.methods.labels.labelled` makes, and so what every method returns. Knows no method. A figure
belongs to whoever asked for it: pyplot keeps none, `figure.savefig(path)` writes it, a notebook shows it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.imports import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from xarray import DataArray

_MAX_ROWS, _MAX_COLUMNS = 48, 48  # labels on an axis; of longer ones every second, third, ... is written
_UPWARDS = ("layer",)  # dimensions that grow from the bottom, as a model is drawn
_FONT: Any = {"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10}


def heat_map(
    array: DataArray,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    rows: str | None = None,
    columns: str | None = None,
    limits: tuple[float, float] | None = None,
    colours: str | None = None,
    label: str | None = None,
    write: bool = False,
) -> Figure:
    """A labelled array of two dimensions as colours; of three, a map for each place of the third, side by side.

    `rows` and `columns`: the dimensions of the axes, by default the last two; dimensions of one place are left out.
    An axis shows the coordinate `<dimension>_token` where there is one. Colours are centred at 0 if a value is
    negative, else they begin at 0; `limits` are others, `colours` is a colour map of matplotlib's. `label` is of the
    colour bar, by default the array's name. `write`: values stand in their cells. `ax`: axes to draw in, of one map.
    Returns the figure. Raises GraphError for more than three dimensions, or dimensions that are not there.
    """
    matplotlib, figures = needs("matplotlib"), needs("matplotlib.figure")
    import numpy as np

    maps, row, column, facet = _maps(array, rows, columns)
    if ax is not None and len(maps) > 1:
        raise GraphError(f"{len(maps)} maps do not fit into one ax: leave it out", where=user_line())
    finite = array.values[np.isfinite(array.values)]
    low, high = limits or _limits(finite)
    chosen = colours or ("RdBu_r" if low < 0 else "Blues")
    with matplotlib.rc_context(_FONT):
        if ax is None:
            across = min(len(maps), 3)
            down = -(-len(maps) // across)
            width = across * min(14 / across, max(2.6, 0.45 * maps[0].sizes[column] + 0.8)) + 1.1
            height = down * (min(9.0, max(1.6, 0.3 * maps[0].sizes[row])) + 1.3)
            figure: Figure = figures.Figure(figsize=(width, height), layout="constrained")
            grid = figure.subplots(down, across, squeeze=False)
            places = list(grid.flat)
            for spare in places[len(maps) :]:
                spare.set_axis_off()
        else:
            figure, places = ax.figure, [ax]  # type: ignore[assignment]
        for one, axes in zip(maps, places, strict=False):
            image = axes.imshow(
                one.transpose(row, column).values.astype(float),
                vmin=low,
                vmax=high,
                cmap=chosen,
                aspect="auto",
                origin="lower" if row in _UPWARDS else "upper",
            )
            _label_axis(axes.xaxis, one, column, _MAX_COLUMNS // (across if ax is None else 1))
            _label_axis(axes.yaxis, one, row, _MAX_ROWS)
            axes.tick_params(length=0)
            if write:
                _write(axes, one.transpose(row, column).values, low, high)
            if facet is not None:
                place = one.coords[facet].item()
                axes.set_title(place if isinstance(place, str) else f"{facet} {place}", parse_math=False)
        bar = figure.colorbar(image, ax=places[: len(maps)], label=label or str(array.name or ""), aspect=30)
        bar.outline.set_visible(False)
        if title is not None:
            (places[0].set_title if facet is None else figure.suptitle)(title)
    return figure


def line_plot(
    array: DataArray,
    *,
    x: str | None = None,
    title: str | None = None,
    ax: Axes | None = None,
    level: float | None = None,
    label: str | None = None,
) -> Figure:
    """A labelled array of one or two dimensions as curves over `x`, by default over "layer", else the last dimension.

    Of two dimensions each place of the other one is a curve, named in the legend. `level`: a dotted line across, such
    as the value of the unchanged run. `label`: of the vertical axis, by default the array's name. Returns the figure.
    """
    matplotlib, figures = needs("matplotlib"), needs("matplotlib.figure")
    array = _without_single(array, {x} - {None})
    over = x or ("layer" if "layer" in array.dims else str(array.dims[-1]))
    _check_dims(array, over)
    others = [str(dim) for dim in array.dims if dim != over]
    if len(others) > 1:
        raise GraphError(
            f"curves over {over} have one dimension beside it, not {', '.join(others)}: "
            f"array.mean({others[0]!r}) or array.isel({others[0]}=0)",
            where=user_line(),
        )
    with matplotlib.rc_context(_FONT):
        figure: Any = figures.Figure(figsize=(6.4, 3.8), layout="constrained") if ax is None else ax.figure
        axes = figure.subplots() if ax is None else ax
        curves = [array] if not others else [array.isel({others[0]: n}) for n in range(array.sizes[others[0]])]
        names = [None] if not others else [_shown(text) for text in _texts(array, others[0])]
        for curve, name in zip(curves, names, strict=True):
            axes.plot(range(curve.sizes[over]), curve.values, marker="o", markersize=4, label=name)
        if level is not None:
            axes.axhline(level, linestyle=":", color="gray")
        _label_axis(axes.xaxis, array, over, _MAX_COLUMNS)
        axes.set_ylabel(label or str(array.name or ""))
        axes.spines[["top", "right"]].set_visible(False)
        if others:
            axes.legend(title=others[0], frameon=False)
        if title is not None:
            axes.set_title(title)
    return figure  # type: ignore[no-any-return]


def data_frame(array: DataArray) -> DataFrame:
    """A labelled array as a table: a row for each place, columns for its labels, its tokens and its value."""
    needs("pandas")
    named = array.rename(array.name or "value")
    numbered = {dim: range(size) for dim, size in array.sizes.items() if dim not in array.coords}
    return named.assign_coords(numbered).to_dataframe().reset_index()


def top_k_table(
    array: DataArray, k: int = 10, *, within: str | Sequence[str] = (), by: str = "value", smallest: bool = False
) -> DataFrame:
    """The `k` strongest places of a labelled array as rows, strongest first, with their labels and tokens.

    `within`: dimensions at each place of which there are `k` of their own (`within="layer"`). `by="magnitude"` looks at
    the size of values and not at their sign; `smallest` begins at the other end. NaN is never among them. Equal values
    stand in the order of the array.
    """
    if by not in ("value", "magnitude") or k < 1:
        raise GraphError(f"by is 'value' or 'magnitude' and k at least 1, not {by!r} and {k}", where=user_line())
    groups = [within] if isinstance(within, str) else list(within)
    _check_dims(array, *groups)
    table = data_frame(array).dropna(subset=[array.name or "value"])
    strength = table[array.name or "value"]
    order = (strength.abs() if by == "magnitude" else strength).sort_values(ascending=smallest, kind="stable").index
    best = table.loc[order]
    if groups:
        best = best.groupby(groups, sort=True).head(k).sort_values(groups, kind="stable")
    return best.head(k if not groups else len(best)).reset_index(drop=True)


def _maps(array: DataArray, rows: str | None, columns: str | None) -> tuple[list[DataArray], str, str, str | None]:
    """The two-dimensional pieces, the dimensions of their axes, and the one that tells them apart."""
    named = [dim for dim in (rows, columns) if dim is not None]
    _check_dims(array, *named)
    array = _without_single(array, set(named))
    left = [str(dim) for dim in array.dims if dim not in named]
    column = columns or (left.pop() if left else "")
    row = rows or (left.pop() if left else "")
    if not row or not column or len(left) > 1:
        raise GraphError(
            f"a heat map has two dimensions, and a third one for maps side by side; this array has "
            f"{', '.join(f'{dim} ({size})' for dim, size in array.sizes.items()) or 'none'}: choose with .sel(...), "
            "combine with .mean(...), or draw line_plot(array)",
            where=user_line(),
        )
    if not left:
        return [array], row, column, None
    (facet,) = left
    labels = array if facet in array.coords else array.assign_coords({facet: range(array.sizes[facet])})
    return [labels.isel({facet: number}) for number in range(array.sizes[facet])], row, column, facet


def _without_single(array: DataArray, wanted: set[Any]) -> DataArray:
    """Dimensions of one place are left out while there are more than two."""
    single: list[Hashable] = [dim for dim, size in array.sizes.items() if size == 1 and dim not in wanted]
    return array.isel(dict.fromkeys(single[: max(0, array.ndim - 2)], 0))


def _check_dims(array: DataArray, *dims: str) -> None:
    for dim in dims:
        if dim not in array.dims:
            raise GraphError(
                f"this array has no dimension {dim!r}; it has {', '.join(map(str, array.dims))}", where=user_line()
            )


def _limits(finite: Any) -> tuple[float, float]:
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    most = max(abs(low), abs(high)) or 1.0
    # noise below zero is no sign
    return (-most, most) if low < -1e-3 * most else (0.0, most)


def _texts(array: DataArray, dim: str) -> list[Any]:
    for name in (f"{dim}_token", dim):
        if name in array.coords and array.coords[name].dims == (dim,):
            return list(array.coords[name].values.tolist())
    return list(range(array.sizes[dim]))


def _label_axis(axis: Any, array: DataArray, dim: str, limit: int) -> None:
    texts = _texts(array, dim)
    step = -(-len(texts) // limit)
    kept = range(0, len(texts), step)
    are_words = any(isinstance(text, str) for text in texts)
    axis.set_ticks(kept, [_shown(texts[place]) for place in kept])
    if are_words and axis.axis_name == "x":
        longest = max(len(str(text)) for text in texts)
        for tick in axis.get_ticklabels():
            tick.set(rotation=90 if longest * len(kept) > 400 else 45, ha="right", rotation_mode="anchor")
    for tick in axis.get_ticklabels():
        tick.set_parse_math(False)  # a `$` in a token is no mathematics
    axis.set_label_text(dim if step == 1 else f"{dim} (every {step})")


def _shown(label: Any) -> str:
    """A token as a person reads it: a leading space as a small mark, a line break as a sign."""
    if not isinstance(label, str):
        return str(label)
    return label.replace(" ", "·").replace("\n", "⏎") or "∅"


def _write(axes: Any, values: Any, low: float, high: float) -> None:
    import numpy as np

    for row, column in np.argwhere(np.isfinite(values)).tolist():
        value = values[row, column]
        share = (value - low) / ((high - low) or 1)
        is_dark = share > 0.75 or (low < 0 and share < 0.25)
        colour = "white" if is_dark else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
