"""How much room a cache has."""

from __future__ import annotations

from scheduling.caches import roomy
from scheduling.plan import PAGE


def test_rooms_are_whole_pages_of_few_sizes_and_at_most_a_third_is_empty() -> None:
    rooms = [roomy(positions) for positions in range(1, 5000)]
    assert all(room >= positions and room % PAGE == 0 for positions, room in enumerate(rooms, 1))
    assert all(room - positions <= max(PAGE - 1, room / 3 + PAGE) for positions, room in enumerate(rooms, 1))
    assert rooms == sorted(rooms) and len(set(rooms)) == 15
    assert [roomy(PAGE * pages) // PAGE for pages in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17)] == [
        *(1, 2, 3, 4, 6, 6, 8, 12, 16, 24)
    ]
