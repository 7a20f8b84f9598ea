"""Pictures and tables say what the array says, with its tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from polytrace.errors import GraphError
from polytrace.methods import data_frame, heat_map, line_plot, top_k_table
from polytrace.methods.labels import labelled

TOKENS = ["<bos>", " $cost", " is", "\n", ""]


def grid(values: Any = None, *, name: str = "restored") -> Any:
    values = np.arange(-4.0, 11.0).reshape(3, 5) if values is None else values
    return labelled(values, {"layer": range(3), "position": range(5)}, name=name, tokens={"position": TOKENS})


def words(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def test_a_heat_map_has_tokens_on_its_axis_and_colours_centred_at_zero() -> None:
    figure = heat_map(grid(), title="a title")
    axes, bar = figure.axes
    (image,) = axes.images
    assert isinstance(figure, Figure)
    assert words(axes.xaxis) == ["<bos>", "·$cost", "·is", "⏎", "∅"]
    assert words(axes.yaxis) == ["0", "1", "2"] and axes.get_ylim() == (-0.5, 2.5)  # the first layer is at the bottom
    assert image.get_clim() == (-10.0, 10.0) and image.get_cmap().name == "RdBu_r"
    assert (np.asarray(image.get_array()) == grid().values).all()
    assert axes.get_title() == "a title" and bar.get_ylabel() == "restored"
    figure.savefig("/dev/null", format="png")  # a dollar sign is no mathematics


def test_values_that_are_never_negative_begin_at_zero() -> None:
    (image,) = heat_map(grid(np.full((3, 5), 0.25))).axes[0].images
    assert image.get_clim() == (0.0, 0.25) and image.get_cmap().name == "Blues"


def test_a_third_dimension_is_a_map_each_with_one_scale() -> None:
    array = labelled(
        np.arange(30.0).reshape(2, 3, 5), {"prompt": ["a b", "c"], "layer": range(3), "position": range(5)}, name="p"
    )
    figure = heat_map(array)
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == ["a b", "c"]
    assert {axes.images[0].get_clim() for axes in maps} == {(0.0, 29.0)}
    assert (np.asarray(maps[1].images[0].get_array()) == array.values[1]).all()
    by_prompt = heat_map(array, rows="prompt", columns="layer")
    assert len([axes for axes in by_prompt.axes if axes.images]) == 5


def test_labels_of_a_long_prompt_are_thinned_and_the_axis_says_so() -> None:
    long = labelled(np.zeros((2, 200)), {"layer": range(2), "position": range(200)}, name="x")
    axes = heat_map(long).axes[0]
    assert words(axes.xaxis) == [str(number) for number in range(0, 200, 5)]
    assert axes.get_xlabel() == "position (every 5)"


def test_dimensions_of_one_place_need_no_choice_and_others_do() -> None:
    whole = labelled(np.zeros((1, 3, 5)), {"prompt": None, "layer": range(3), "position": range(5)}, name="x")
    assert len(heat_map(whole).axes) == 2
    many = labelled(np.zeros((2, 2, 3, 5)), dict.fromkeys(("prompt", "head", "layer", "position")), name="x")
    with pytest.raises(GraphError, match=r"prompt \(2\), head \(2\), layer \(3\).*test_plots"):
        heat_map(many)
    with pytest.raises(GraphError, match="no dimension 'heads'; it has layer, position"):
        heat_map(grid(), rows="heads")


def test_curves_are_over_layers_and_named() -> None:
    axes = line_plot(grid(), level=0.5, label="P").axes[0]
    assert len(axes.lines) == 6 and list(axes.lines[1].get_ydata()) == [-3.0, 2.0, 7.0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["<bos>", "·$cost", "·is", "⏎", "∅"]
    assert axes.get_xlabel() == "layer" and axes.get_ylabel() == "P"


def test_a_table_has_the_strongest_places_with_their_tokens() -> None:
    values = np.zeros((3, 5))
    values[1, 2], values[0, 4], values[2, 0], values[2, 1] = 3.0, -5.0, 2.0, np.nan
    best = top_k_table(grid(values), 2)
    assert best[["layer", "position", "position_token", "restored"]].values.tolist() == [
        [1, 2, " is", 3.0],
        [2, 0, "<bos>", 2.0],
    ]
    assert top_k_table(grid(values), 1, by="magnitude")["restored"].tolist() == [-5.0]
    assert top_k_table(grid(values), 1, smallest=True)["position"].tolist() == [4]
    each = top_k_table(grid(values), 1, within="layer")
    assert each["layer"].tolist() == [0, 1, 2] and each["restored"].tolist() == [0.0, 3.0, 2.0]


def test_a_frame_has_a_row_for_each_place() -> None:
    table = data_frame(grid())
    assert len(table) == 15 and table["restored"].tolist() == list(range(-4, 11))
    bare = labelled(np.zeros((2, 2)), {"head": None, "layer": None}, name="x")
    assert data_frame(bare)["head"].tolist() == [0, 0, 1, 1]
