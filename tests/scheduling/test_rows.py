"""Rows by layer are what counting one layer after another gives; of trunks none run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduling.plan import RequestId, Segment
from scheduling.rows import rows_by_layer, skipped_by_layer, stretches

LAYERS = 9
falling = st.lists(st.integers(0, 6), min_size=LAYERS + 1, max_size=LAYERS + 1).map(lambda found: sorted(found)[::-1])


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    skips = draw(st.sets(st.integers(0, LAYERS - 1)))
    return Segment(
        parent=None,
        trunk=(RequestId("r"), 0) if draw(st.booleans()) else None,
        starts=tuple(draw(falling)),
        stops=tuple(draw(falling)[:LAYERS]),
        head=(),
        tokens=(),
        skips=tuple(sorted(skips)),
    )


@given(st.lists(segments(), max_size=5))
def test_rows_are_counted_as_one_layer_after_another(found: list[Segment]) -> None:
    run = [segment for segment in found if segment.trunk is None]

    def rows(segment: Segment, layer: int) -> int:
        return max(0, segment.stops[layer] - segment.starts[layer])

    assert rows_by_layer(found, LAYERS) == [sum(rows(one, layer) for one in run) for layer in range(LAYERS)]
    around = [sum(rows(one, layer) for one in run if layer in one.skips) for layer in range(LAYERS)]
    assert skipped_by_layer(found, LAYERS) == around


@given(segments())
def test_stretches_are_the_rows_of_their_layers_and_do_not_overlap(segment: Segment) -> None:
    by_layer = {
        layer: (start, stop)
        for first, until, start, stop in stretches(segment, LAYERS)
        for layer in range(first, until)
    }
    spans = enumerate(zip(segment.starts, segment.stops, strict=False))
    assert by_layer == {layer: (start, stop) for layer, (start, stop) in spans if start < stop}
