"""The fewest rows of batched products that have the bits of many."""

from __future__ import annotations

import pytest
import torch
from decoded import threads

from engine.few_rows import fewest_rows
from engine.pages import add_pages, product
from scheduling.plan import MIN_ROWS, PAGE


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("count", "columns"), [(1, 2 * PAGE), (2, PAGE), (2, 9 * PAGE), (5, 3 * PAGE), (64, 4 * PAGE)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 9, 11])
def test_rows_have_the_bits_that_they_have_among_many(number: int, count: int, columns: int, rows: int) -> None:
    drawn = torch.Generator().manual_seed(rows)
    queries, keys, values = (torch.randn(count, size, 64, generator=drawn) for size in (64, columns, columns))
    with threads(number):
        least = fewest_rows(count, 64, 64)
        scores = product(queries, keys.transpose(1, 2))
        few = product(queries[:, :rows].contiguous(), keys.transpose(1, 2), least)
        assert torch.equal(few, scores[:, :rows])
        pattern, own = scores.softmax(2), few.softmax(2)
        many = add_pages(torch.zeros(count, 64, 64), pattern, values)
        assert torch.equal(add_pages(torch.zeros(count, rows, 64), own, values, least), many[:, :rows])


def test_rows_of_one_product_alone_are_as_many_as_of_any_kind() -> None:
    assert fewest_rows(1, 64, 64) == MIN_ROWS
