"""Where a role's features lie in fused matrices, of the whole and of a rank's part."""

from __future__ import annotations

import pytest
import torch

from engine.partitions import units_of

SIZE = 4
COUNTS = {"q": 6, "k": 2, "v": 2}
ORDER = ("q", "k", "v")


def _side_by_side() -> torch.Tensor:
    """`[3, W]`, each feature told by role, head and place: the roles one behind the other."""
    parts = [
        [1000 * number + 10 * head + place for head in range(COUNTS[role]) for place in range(SIZE)]
        for number, role in enumerate(ORDER)
    ]
    return torch.tensor([feature for part in parts for feature in part]).expand(3, -1).clone()


def _interleaved() -> torch.Tensor:
    """The same, by key/value head."""
    whole = _side_by_side()[0].split([SIZE * COUNTS[role] for role in ORDER])
    groups = zip(*(part.chunk(COUNTS["k"]) for part in whole), strict=True)
    return torch.cat([part for group in groups for part in group]).expand(3, -1).clone()


@pytest.mark.parametrize("role", ORDER)
@pytest.mark.parametrize("periods", [1, 2])
def test_a_role_is_found_and_put_back(role: str, periods: int) -> None:
    fused = _side_by_side() if periods == 1 else _interleaved()
    units = units_of(role, ORDER, COUNTS, SIZE, periods)
    heads = units.of(fused, -1)
    number = ORDER.index(role)
    expected = [[1000 * number + 10 * head + place for place in range(SIZE)] for head in range(COUNTS[role])]
    assert heads[1].tolist() == expected
    before = fused.clone()
    units.put(fused, -heads.clone())
    assert torch.equal(units.of(fused, -1), -units.of(before, -1))
    assert int((fused != before).sum()) == 3 * SIZE * COUNTS[role] - 3 * (number == 0)  # the first feature is 0
    assert units.is_view == (periods == 1 or COUNTS[role] == periods)


@pytest.mark.parametrize("role", ORDER)
def test_a_ranks_part_has_its_share_of_every_role(role: str) -> None:
    local = torch.cat([part.chunk(2)[1] for part in _side_by_side()[0].split([SIZE * COUNTS[r] for r in ORDER])])
    heads = units_of(role, ORDER, COUNTS, SIZE, 1).of(local, 0)
    assert heads[0, 0] == 1000 * ORDER.index(role) + 10 * (COUNTS[role] // 2)
    with pytest.raises(ValueError, match="not whole heads"):
        units_of(role, ORDER, COUNTS, SIZE, 1).of(local[: SIZE * 3], 0)
