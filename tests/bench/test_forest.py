"""The picture of a pass has the rows that the pass computed, and the page shows that picture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from PIL import Image

from bench import forest
from bench.forest_picture import Kind, PassPicture, Places, colors_of, draw
from polytrace.certificate import Receipt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def seen() -> tuple[PassPicture, tuple[Receipt, ...]]:
    return forest.one_pass()


def drawn(picture: PassPicture) -> dict[tuple[int, int], str]:
    """The colour of each cell, by layer and column."""
    return {(cell.layer, cell.column): colors_of(cell.users)[0] for cell in picture.cells}


def found_in(path: Path, picture: PassPicture) -> dict[tuple[int, int], str]:
    """The same, as a file has it: which columns have a cell's colour in the middle of a layer."""
    places, known, found = Places(picture), set(drawn(picture).values()), {}
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    for layer in range(picture.num_layers):
        for column in range(len(picture.columns)):
            where = int(places.center(column)), int(pixels.height - places.middle(layer))
            color = "#" + bytes(pixels.crop((*where, where[0] + 1, where[1] + 1)).tobytes()).hex()
            if color in known:
                found[layer, column] = color
    return found


def test_the_cells_are_the_token_layers_of_the_receipts(seen: tuple[PassPicture, tuple[Receipt, ...]]) -> None:
    picture, receipts = seen
    assert len({(cell.layer, cell.column) for cell in picture.cells}) == picture.token_layers
    for receipt in receipts:
        assert picture.token_layers == sum(receipt.passes[0].layer_rows)
        assert receipt.passes[0].requests == len(receipts) == len(picture.users) == 4
    assert picture.token_layers < sum(receipt.token_layers for receipt in receipts), "users share rows"
    assert picture.token_layers_alone == (1 + 11 + 1) * 9 * 8 + 8 * 3, "of 9 tokens and 8 layers, of 8 and 3"
    shared = sum(cell.users == (0, 1, 2) for cell in picture.cells)
    assert shared == 9 * 5 - 4 * 3 + 4 + 2 * 2, "one prompt until layer 4, but for its begin that a fourth user has too"


def test_a_cell_too_few_or_of_nobody_is_not_drawn(seen: tuple[PassPicture, tuple[Receipt, ...]]) -> None:
    picture, receipts = seen
    for cells in (
        picture.cells[1:],
        (*picture.cells, picture.cells[0]),
        (dataclasses.replace(picture.cells[0], users=()), *picture.cells[1:]),
    ):
        with pytest.raises(AssertionError):
            forest.check(dataclasses.replace(picture, cells=cells), receipts)


def test_marks_are_what_users_read_write_and_save(seen: tuple[PassPicture, tuple[Receipt, ...]]) -> None:
    picture, _ = seen
    found = {(kind, user): 0 for kind in Kind for user in range(4)}
    for mark in picture.marks:
        found[mark.kind, mark.user] += 1
    lens, sweep, steered, early = range(4)
    assert {key: count for key, count in found.items() if count} == {
        (Kind.SAVED, lens): 8,
        (Kind.READ, sweep): 9,
        (Kind.WRITTEN, sweep): 9,
        (Kind.SAVED, sweep): 10,
        (Kind.WRITTEN, steered): 5,
        (Kind.SAVED, steered): 1,
        (Kind.SAVED, early): 8,
    }
    begins = {(branch.target, branch.layer) for branch in picture.branches if branch.layer}
    written = {(mark.column, mark.layer) for mark in picture.marks if mark.kind is Kind.WRITTEN}
    assert begins <= written and len(begins) == 10, "a fork begins where it is written"


def test_every_cell_is_drawn_in_its_colour_and_nothing_elsewhere(
    seen: tuple[PassPicture, tuple[Receipt, ...]], tmp_path: Path
) -> None:
    picture, _ = seen
    path = tmp_path / "new" / "forest.png"
    draw(path, picture)
    assert found_in(path, picture) == drawn(picture)


def test_the_pages_show_the_pass_as_it_is_planned_now(seen: tuple[PassPicture, tuple[Receipt, ...]]) -> None:
    picture, _ = seen
    path = ROOT / "docs" / "forest.png"
    assert found_in(path, picture) == drawn(picture), "python -m bench.forest docs/forest.png"
    assert path.stat().st_size < 150_000
    for page in ("README.md", "ARCHITECTURE.md"):
        (alt,) = re.findall(r"!\[([^]]+)\]\(docs/forest.png\)", (ROOT / page).read_text())
        numbers = [int(number) for number in re.findall(r"\d+", alt)]
        assert {picture.token_layers, picture.token_layers_alone, picture.num_runs} <= set(numbers)
