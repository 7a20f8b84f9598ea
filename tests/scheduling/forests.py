"""Sequences at random, to grow forests of rows from."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from scheduling.forest import Placed
from scheduling.plan import NOWHERE, Cone, Edit

LAYERS = 3
KEYS = (b"a", b"b")


def placed(
    tokens: Sequence[int],
    edits: Sequence[Edit] = (),
    needs: Sequence[int] | None = None,
    head: Sequence[int] | None = None,
    domain: object = "us",
    num_layers: int = LAYERS,
    inside: Sequence[int] | None = None,
    behind: Sequence[int] | None = None,
) -> Placed:
    """A sequence; without more said, all its rows are needed, and nothing is read."""
    cone = Cone(
        edits=tuple(sorted(edits, key=lambda edit: (edit.level, edit.position, edit.key))),
        needs=(len(tokens),) * num_layers if needs is None else tuple(needs),
        head=tuple(range(len(tokens))) if head is None else tuple(head),
        inside=(NOWHERE,) * (num_layers + 1) if inside is None else tuple(inside),
        behind=(NOWHERE,) * num_layers if behind is None else tuple(behind),
    )
    return Placed(tokens=tuple(tokens), cone=cone, domain=domain)


@st.composite
def any_sequence(draw: st.DrawFn) -> Placed:
    tokens = draw(st.lists(st.integers(0, 1), min_size=1, max_size=6))
    length = len(tokens)
    edit = st.builds(Edit, st.integers(0, LAYERS), st.integers(0, length - 1), st.sampled_from(KEYS))
    head = draw(st.sets(st.integers(0, length - 1), max_size=2))
    least = max(head, default=-1) + 1
    needs = sorted((draw(st.integers(least, length)) for _ in range(LAYERS)), reverse=True)
    domain = draw(st.sampled_from(["us", "us", "us", "them", None]))
    return placed(tokens, draw(st.lists(edit, max_size=4, unique=True)), needs, sorted(head), domain)


@st.composite
def variants(draw: st.DrawFn) -> list[Placed]:
    """Sequences that have much in common: one prompt, sets of the same few edits, some prompts cut or changed."""
    length = draw(st.integers(4, 10))
    edit = st.builds(Edit, st.integers(0, LAYERS), st.integers(0, length - 1), st.sampled_from(KEYS))
    pool = draw(st.lists(edit, min_size=1, max_size=4, unique=True))
    found = []
    for _ in range(draw(st.integers(2, 8))):
        tokens = list(range(length))[: draw(st.integers(length - 3, length))]
        if draw(st.integers(0, 3)) == 0:
            tokens[draw(st.integers(0, len(tokens) - 1))] = 99
        own = [edit for edit in pool if draw(st.booleans()) and edit.position < len(tokens)]
        stop = draw(st.integers(0, LAYERS))
        cut = draw(st.integers(1, len(tokens)))
        needs = [len(tokens)] * stop + [cut] * (LAYERS - stop)
        found.append(placed(tokens, own, needs, [cut - 1]))
    return found
