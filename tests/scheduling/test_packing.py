"""One stream of rows for all members of a pass."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduling.packing import Packer
from scheduling.plan import MIN_ROWS, PROLOGUE, PassId, Plan, RequestId, Span
from tests.scheduling.tiny import VOCAB, Recorder, tiny_llama

TINY = tiny_llama()
PASS = PassId(7)

prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=4)


def pack(*recorders: Recorder, wave: int = 0) -> Plan:
    programs = [recorder.compile(f"r{index}") for index, recorder in enumerate(recorders)]
    return Packer(TINY).pack(PASS, [(program, wave) for program in programs])


def reading(sequences: list[list[int]], module: str = "lm_head", column: int | None = None) -> Recorder:
    r = Recorder(TINY, sequences)
    value = r.read(module)
    if column is not None:
        value = r.index(value, slice(None), column, shape=(len(sequences), VOCAB))
    r.save(value)
    return r


@given(st.lists(prompts, min_size=1, max_size=5))
def test_every_sequence_lies_once_in_the_stream_with_positions_as_alone(requests: list[list[list[int]]]) -> None:
    plan = pack(*map(reading, requests))
    total = sum(len(sequence) for sequences in requests for sequence in sequences)
    assert len(plan.tokens) == len(plan.positions) == max(total, MIN_ROWS)
    assert set(plan.tokens[total:]) <= {0} and set(plan.positions[total:]) <= {0}
    row, seen = 0, set()
    for segment in plan.segments:
        sequence = requests[segment.member][segment.sequence]
        assert (segment.start, segment.stop) == (row, row + len(sequence))
        assert plan.tokens[segment.start : segment.stop] == tuple(sequence)
        assert plan.positions[segment.start : segment.stop] == tuple(range(len(sequence)))
        assert segment.spans == (Span(block=PASS, start=segment.start, stop=segment.stop),)
        seen.add((segment.member, segment.sequence))
        row = segment.stop
    assert row == total
    assert seen == {(member, index) for member, sequences in enumerate(requests) for index in range(len(sequences))}


@given(st.lists(st.tuples(prompts, st.sampled_from([None, 0, -1])), min_size=1, max_size=5))
def test_a_view_finds_its_rows_and_its_kept_rows(requests: list[tuple[list[list[int]], int | None]]) -> None:
    plan = pack(*(reading(sequences, column=column) for sequences, column in requests))
    starts = [view.start for view in plan.views]
    assert starts == sorted(starts)
    for view in plan.views:
        sequences, column = requests[view.member]
        longest = max(map(len, sequences))
        assert view.lengths == tuple(map(len, sequences))
        assert view.kept_columns == (tuple(range(longest)) if column is None else (column % longest,))
        row, expected = view.start, []
        for sequence in sequences:
            pads = longest - len(sequence)
            expected += [row + kept - pads for kept in view.kept_columns if kept >= pads]
            row += len(sequence)
        assert list(plan.kept[view.kept_start : view.kept_start + len(expected)]) == expected
    assert len(plan.kept) >= MIN_ROWS


def test_sequences_of_equal_length_lie_side_by_side() -> None:
    plan = pack(reading([[1, 2, 3]]), reading([[4]]), reading([[5, 6, 7]]), reading([[8]]))
    assert [segment.stop - segment.start for segment in plan.segments] == [1, 1, 3, 3]
    assert [view.member for view in plan.views] == [1, 3, 0, 2]


def test_a_pass_goes_as_far_as_its_farthest_member() -> None:
    early, late = reading([[1]], "model.layers.0"), reading([[2]], "model.layers.3")
    assert pack(early).num_stages == 1
    plan = pack(early, late)
    assert plan.num_stages == 2
    assert plan.until == max(member.program.waves[0].until for member in plan.members)
    assert plan.kept == ()


def test_a_pass_without_rows_visits_no_stage() -> None:
    r = Recorder(TINY)
    r.save(r.parameter("lm_head.weight"))
    plan = pack(r)
    assert (plan.tokens, plan.kept, plan.segments, plan.views) == ((), (), (), ())
    assert (plan.until, plan.num_stages) == (PROLOGUE, 0)


def test_a_plan_names_the_requests_that_shards_must_forget() -> None:
    program = reading([[1]]).compile()
    plan = Packer(TINY).pack(PASS, [(program, 0)], (RequestId("gone"),))
    assert plan.ended == ("gone",)
