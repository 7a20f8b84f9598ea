"""One forest of rows for all members of a pass."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polytrace.graph import Sharing
from scheduling.packing import Going, Packer
from scheduling.plan import PROLOGUE, PassId, Plan, RequestId
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

TINY = tiny_llama()
PASS = PassId(7)
ALL = slice(None)

prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=4)


def pack(*recorders: Recorder, wave: int = 0) -> Plan:
    programs = [recorder.work_out(f"r{index}") for index, recorder in enumerate(recorders)]
    return Packer(TINY).pack(PASS, [Going(program=program, wave=wave) for program in programs])


def reading(
    sequences: list[list[int]],
    module: str = "lm_head",
    column: int | None = None,
    sharing: Sharing = Sharing.TENANT,
) -> Recorder:
    r = Recorder(TINY, sequences, sharing=sharing)
    value = r.read(module)
    if column is not None:
        value = r.index(value, ALL, column, shape=(len(sequences), VOCAB))
    r.save(value)
    return r


def patching(tokens: list[int], layer: int, position: int, value: float = 0.0) -> Recorder:
    r = Recorder(TINY, [tokens])
    module = f"model.layers.{layer}"
    r.write(module, r.op("setitem", r.read(module), (ALL, position), value), in_place=True)
    r.save(r.index(r.read("lm_head"), ALL, -1, shape=(1, VOCAB)))
    return r


def tokens_of(plan: Plan, segment: int, length: int) -> list[int]:
    """A sequence's tokens, from the segments that it is made of."""
    found: list[int] = []
    owner: int | None = segment
    while owner is not None:
        own = plan.segments[owner]
        found = [*own.tokens[: max(0, length - own.starts[0])], *found]
        owner, length = own.parent, min(length, own.starts[0])
    return found


@given(st.lists(prompts, min_size=1, max_size=5))
def test_every_sequence_finds_its_tokens(requests: list[list[list[int]]]) -> None:
    plan = pack(*map(reading, requests))
    assert [view.member for view in plan.views] == list(range(len(requests)))
    for view in plan.views:
        sequences = requests[view.member]
        assert view.lengths == tuple(map(len, sequences))
        for segment, sequence in zip(view.segments, sequences, strict=True):
            assert tokens_of(plan, segment, len(sequence)) == sequence
    assert plan.layer_rows[0] == sum(len(segment.tokens) for segment in plan.segments)
    assert plan.layer_rows[0] <= sum(len(sequence) for sequences in requests for sequence in sequences)


@given(st.lists(st.tuples(prompts, st.sampled_from([None, 0, -1])), min_size=1, max_size=5))
def test_a_view_says_the_columns_that_the_head_runs_on(
    requests: list[tuple[list[list[int]], int | None]],
) -> None:
    plan = pack(*(reading(sequences, column=column) for sequences, column in requests))
    for view in plan.views:
        sequences, column = requests[view.member]
        longest = max(map(len, sequences))
        assert view.kept_columns == (tuple(range(longest)) if column is None else (column % longest,))


def test_equal_sequences_of_different_requests_are_one_segment() -> None:
    plan = pack(reading([[1, 2, 3]]), reading([[4, 5], [1, 2, 3]]), reading([[1, 2, 3]], "model.layers.0"))
    one, two, three = plan.views
    assert one.segments[0] == two.segments[1] == three.segments[0] != two.segments[0]
    assert plan.layer_rows == (5,) * 4


def test_requests_that_share_nothing_keep_their_rows() -> None:
    plan = pack(*(reading([[1, 2, 3], [1, 2, 3]], sharing=Sharing.OFF) for _ in range(2)), reading([[1, 2, 3]]))
    assert plan.layer_rows == (15,) * 4
    assert len({segment for view in plan.views for segment in view.segments}) == 5


def test_patches_of_one_prompt_fork_where_they_act() -> None:
    tokens = [*range(1, 13)]
    plan = pack(reading([tokens]), patching(tokens, 0, 9), patching(tokens, 2, 11), patching(tokens, 2, 11))
    clean, early, late, again = (view.segments[0] for view in plan.views)
    assert late == again and {plan.segments[early].parent, plan.segments[late].parent} == {clean}
    assert plan.segments[early].starts == (12, 9, 9, 9, 9)
    assert plan.segments[late].starts == (12, 12, 12, 11, 11)
    assert plan.layer_rows == (12, 15, 15, 16)


def test_patches_that_read_different_values_are_apart() -> None:
    tokens = [*range(1, 13)]
    plan = pack(patching(tokens, 1, 9, 1.0), patching(tokens, 1, 9, 2.0))
    assert plan.layer_rows == (12, 12, 15, 15)


def test_a_patch_from_another_request_is_the_same_patch() -> None:
    def patched(clean: list[int]) -> Recorder:
        r = Recorder(TINY, [clean], [[*range(1, 13)]])
        hidden = r.index(r.read("model.layers.1"), ALL, -1, shape=(1, HIDDEN))
        r.write("model.layers.1", r.op("setitem", r.read("model.layers.1", invoke=1), (ALL, 10), hidden), invoke=1)
        r.save(r.read("lm_head", invoke=1))
        return r

    one, two, three = pack(patched([3, 4]), patched([3, 4]), patched([3, 5])).views[1::2]
    assert one.segments == two.segments != three.segments


def test_a_pass_goes_as_far_as_its_farthest_member() -> None:
    early, late = reading([[1]], "model.layers.0"), reading([[2]], "model.layers.3")
    plan = pack(early)
    assert (plan.num_stages, plan.layer_rows) == (1, (1, 0, 0, 0))
    plan = pack(early, late)
    assert (plan.num_stages, plan.layer_rows) == (2, (2, 1, 1, 1))
    assert plan.until == max(member.program.waves[0].until for member in plan.members)
    assert all(segment.head == () for segment in plan.segments)


def test_a_pass_without_rows_visits_no_stage() -> None:
    r = Recorder(TINY)
    r.save(r.parameter("lm_head.weight"))
    plan = pack(r)
    assert (plan.segments, plan.views, plan.layer_rows) == ((), (), (0, 0, 0, 0))
    assert (plan.until, plan.num_stages) == (PROLOGUE, 0)


def test_a_plan_names_the_requests_that_shards_must_forget() -> None:
    program = reading([[1]]).work_out()
    plan = Packer(TINY).pack(PASS, [Going(program=program, wave=0)], (RequestId("gone"),))
    assert plan.ended == ("gone",)
