"""What a write changes and from where on, when two writes are equal, and how far rows are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytrace.description import ModelDescription
from polytrace.graph import Operand, Port, Site, Write
from scheduling.checks import table_of
from scheduling.plan import Cone
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

TINY = tiny_llama()
TOKENS = [1, 2, 3, 4, 5]
ALL = slice(None)


def layer(number: int) -> str:
    return f"model.layers.{number}"


def cones(recorder: Recorder, wave: int = 0) -> dict[int, tuple[Cone, ...]]:
    """The cones of a wave by invoke; something must be saved already."""
    found = recorder.work_out().waves[wave]
    return dict(zip(found.invokes, found.cones, strict=True))


def places(cone: Cone) -> list[tuple[int, int]]:
    return [(edit.level, edit.position) for edit in cone.edits]


def set_columns(
    r: Recorder,
    index: Operand,
    value: Operand = 0.0,
    module: str = "model.layers.1",
    port: Port = Port.OUTPUT,
    invoke: int = 0,
) -> None:
    """`site[index] = value`."""
    changed = r.op("setitem", r.read(module, port, invoke), index, value)
    r.write(module, changed, port, invoke, in_place=True)


def edited(module: str, port: Port, index: Operand, prompts: list[list[int]]) -> tuple[Cone, ...]:
    r = Recorder(TINY, prompts)
    set_columns(r, index, 0.0, module, port)
    r.save(r.read("lm_head"))
    return cones(r)[0]


# Levels


def test_a_site_has_the_rows_of_its_layer() -> None:
    table = table_of(TINY)
    levels = table.levels
    order = {place[:2]: order for place, order in table.orders.items()}
    assert levels.count == 4
    assert levels.of(order["model.embed_tokens", Port.OUTPUT]) == 0
    for number in range(4):
        ports = [("", Port.INPUT), (".self_attn", Port.OUTPUT), (".mlp.up_proj", Port.OUTPUT), ("", Port.OUTPUT)]
        assert {levels.of(order[layer(number) + path, port]) for path, port in ports} == {number}
    assert levels.of(order["model.norm", Port.OUTPUT]) == levels.of(order["lm_head", Port.OUTPUT]) == 4


@pytest.mark.parametrize(
    ("module", "port", "level"),
    [
        ("model.embed_tokens", Port.OUTPUT, 0),
        (layer(0), Port.INPUT, 0),
        (f"{layer(1)}.self_attn", Port.OUTPUT, 1),
        (f"{layer(1)}.mlp", Port.INPUT, 1),
        (f"{layer(1)}.mlp", Port.OUTPUT, 1),
        (layer(1), Port.OUTPUT, 2),
        (layer(2), Port.INPUT, 2),
        (layer(3), Port.OUTPUT, 4),
        ("model.norm", Port.OUTPUT, 4),
        ("lm_head", Port.OUTPUT, 4),
    ],
)
def test_a_write_acts_from_its_level_and_on_what_a_layer_returns_from_the_next(
    module: str, port: Port, level: int
) -> None:
    assert places(edited(module, port, (ALL, 3), [TOKENS])[0]) == [(level, 3)]


# Positions


@pytest.mark.parametrize(
    ("index", "position"),
    [
        ((ALL, -1), 4),
        ((ALL, slice(2, 4)), 2),
        ((ALL, [4, 1]), 1),
        ((0, slice(None, None, 2)), 0),
        (0, 0),
        ((ALL, ALL, 3), 0),
    ],
)
def test_an_edit_begins_at_the_first_position_that_it_changes(index: Operand, position: int) -> None:
    assert places(edited(layer(1), Port.OUTPUT, index, [TOKENS])[0]) == [(2, position)]


def test_an_edit_that_names_no_column_is_none() -> None:
    assert edited(layer(1), Port.OUTPUT, (ALL, slice(3, 3)), [TOKENS])[0].edits == ()


def test_positions_of_ragged_prompts_are_counted_in_each() -> None:
    first, second, third = edited(layer(1), Port.OUTPUT, (ALL, slice(2, 4)), [TOKENS, [6, 7, 8], [9]])
    assert [places(cone) for cone in (first, second, third)] == [[(2, 2)], [(2, 0)], []]


def test_an_edit_of_named_prompts_is_none_for_the_others() -> None:
    first, second = edited(layer(1), Port.OUTPUT, (1, -1), [TOKENS, TOKENS])
    assert places(first) == [] and places(second) == [(2, 4)]


def test_a_whole_value_is_an_edit_from_the_beginning() -> None:
    r = Recorder(TINY, [TOKENS])
    r.write("model.embed_tokens", r.constant((1, 5, HIDDEN)))
    r.save(r.read("lm_head"))
    assert places(cones(r)[0][0]) == [(0, 0)]


def test_a_column_known_only_in_the_run_counts_from_the_beginning() -> None:
    r = Recorder(TINY, [TOKENS])
    place = r.op("argmax", r.read("model.embed_tokens"), shape=(), dtype="int64")
    set_columns(r, (ALL, place))
    r.save(r.read("lm_head"))
    assert places(cones(r)[0][0]) == [(2, 0)]


def test_edits_are_sorted_by_level_and_position() -> None:
    r = Recorder(TINY, [TOKENS])
    for module, column in ((layer(2), 1), (layer(0), 4), (layer(0), 2)):
        set_columns(r, (ALL, column), module=module)
    r.save(r.read("lm_head"))
    assert places(cones(r)[0][0]) == [(1, 2), (1, 4), (3, 1)]


def test_a_wave_has_the_edits_that_are_applied_in_it() -> None:
    r = Recorder(TINY, [TOKENS], [TOKENS])
    set_columns(r, (ALL, 1), module=layer(0), invoke=1)
    r.save(r.read(layer(1), invoke=1))
    late = r.index(r.read(layer(3), invoke=0), ALL, 0, shape=(1, HIDDEN))
    set_columns(r, (ALL, 2), late, module=layer(1), invoke=1)
    r.save(r.read("lm_head", invoke=1))
    assert places(cones(r, 0)[1][0]) == [(1, 1)]
    assert places(cones(r, 1)[1][0]) == [(1, 1), (2, 2)]


# Equal writes

Recording = Callable[[Recorder], None]  # writes something into invoke 0, by invoke 1 as a source


def keys(
    record: Recording, prompts: list[list[int]], other: list[list[int]], description: ModelDescription, seed: int
) -> list[tuple[object, ...]]:
    """What an edit says of each sequence of invoke 0."""
    r = Recorder(description, prompts, other, seed=seed)
    record(r)
    r.save(r.read("lm_head"))
    return [cone.edits for cone in cones(r)[0]]


def says(
    record: Recording,
    prompts: list[list[int]] | None = None,
    other: list[list[int]] | None = None,
    description: ModelDescription = TINY,
    seed: int = 0,
) -> tuple[object, ...]:
    return keys(record, prompts or [TOKENS], other or [[7, 8, 9, 10, 11]], description, seed)[0]


def noise(r: Recorder) -> None:
    """A padding of the graph: the same program stands elsewhere in it."""
    r.save(r.op("mul", r.read("model.embed_tokens"), 2.0))


def steer(amount: float, index: Operand = (ALL, 2)) -> Recording:
    def record(r: Recorder) -> None:
        base = r.read(layer(1))
        part = r.index(base, *index, shape=(1, HIDDEN)) if isinstance(index, tuple) else base
        set_columns(r, index, r.op("add", part, r.constant((1, HIDDEN), amount), shape=(1, HIDDEN)))

    return record


def patch(source: str = "model.layers.1", invoke: int = 1, *, change: float | None = None) -> Recording:
    """A token's hidden state from another prompt, that may be changed before it is read."""

    def record(r: Recorder) -> None:
        if change is not None:
            set_columns(r, (ALL, 0), change, layer(0), invoke=invoke)
        hidden = r.index(r.read(source, invoke=invoke), ALL, -1, shape=(1, HIDDEN))
        set_columns(r, (ALL, 2), hidden)

    return record


def constant(
    shape: tuple[int, ...], value: float = 0.0, *, module: str = "model.layers.1", in_place: bool = False
) -> Recording:
    return lambda r: void(r.write(module, r.constant(shape, value), in_place=in_place))


def plain(index: Operand, value: Operand = 0.0, module: str = "model.layers.1") -> Recording:
    return lambda r: set_columns(r, index, value, module)


def drawn(name: str) -> Recording:
    return lambda r: set_columns(r, (ALL, 2), r.op(name, r.constant((1, HIDDEN))))


def in_turn(*recordings: Recording) -> Recording:
    def record(r: Recorder) -> None:
        for each in recordings:
            each(r)

    return record


def void(_: object) -> None:
    """Nothing."""


WHOLE = (1, 5, HIDDEN)
A, B = plain((ALL, slice(1, 3)), 1.0), plain((ALL, slice(2, 4)), 2.0)


@pytest.mark.parametrize(
    "record",
    [
        plain((ALL, 2)),
        steer(1.0),
        patch(),
        patch(change=1.0),
        constant(WHOLE, 1.0),
        in_turn(A, B),
        plain((0, [1, -1])),
        lambda r: set_columns(r, (ALL, 2), r.index(r.parameter("model.embed_tokens.weight"), 3, shape=(HIDDEN,))),
        lambda r: set_columns(r, (ALL, 2), r.call("model.layers.0.mlp", r.constant((1, HIDDEN)), shape=(1, HIDDEN))),
        lambda r: set_columns(r, (ALL, 2), r.index(r.mask(1), ALL, slice(0, 1), shape=(1, 1))),
    ],
)
def test_writes_that_say_the_same_are_equal_wherever_they_stand(record: Recording) -> None:
    assert says(record) == says(in_turn(noise, record)) != ()


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (plain((ALL, 2)), plain((ALL, 3))),
        (plain((ALL, 2), 0.0), plain((ALL, 2), -0.0)),
        (plain((ALL, 2), 1.0), plain((ALL, 2), 2.0)),
        (plain((ALL, [2, 3])), plain((ALL, [2, 4]))),
        (plain((ALL, 2, slice(0, 2))), plain((ALL, 2, slice(0, 3)))),
        (plain((ALL, 2)), plain((ALL, 2), module="model.layers.2")),
        (plain((ALL, 2), module=f"{layer(1)}.mlp"), plain((ALL, 2), module=f"{layer(1)}.self_attn")),
        (steer(1.0), steer(2.0)),
        (patch(), patch("model.layers.0")),
        (patch(), patch(invoke=0)),
        (patch(), patch(change=1.0)),
        (patch(change=2.0), patch(change=1.0)),
        (constant(WHOLE, 1.0), constant(WHOLE, 2.0)),
        (constant(WHOLE), constant(WHOLE, in_place=True)),
        (A, B),
        (in_turn(A, B), in_turn(B, A)),
        (in_turn(A, B), in_turn(A, B, A)),
        (in_turn(A, B), A),
        (drawn("rand_like"), drawn("randn_like")),
    ],
)
def test_writes_that_say_different_things_are_different(one: Recording, two: Recording) -> None:
    assert says(one) != says(two)


def test_what_is_read_of_other_tokens_is_different() -> None:
    assert says(patch(), other=[[7, 8, 9, 10, 11]]) != says(patch(), other=[[7, 8, 9, 10, 12]])
    assert says(plain((ALL, 2)), [[1, 2, 3]]) == says(plain((ALL, 2)), [[9, 8, 7]]), "it reads nothing"


def test_random_operations_are_equal_by_seed_and_place_in_the_graph() -> None:
    assert says(drawn("rand_like"), seed=1) == says(drawn("rand_like"), seed=1) != says(drawn("rand_like"), seed=2)
    assert says(drawn("rand_like")) != says(in_turn(noise, drawn("rand_like")))


def test_an_index_counts_by_the_positions_it_names_in_a_prompt() -> None:
    short, long = [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 6, 7]]
    for index in ([1, -1], slice(1, -1), slice(1, None)):
        assert says(plain((ALL, index)), short) != says(plain((ALL, index)), long)
    assert says(plain((ALL, [1, 2])), short) == says(plain((ALL, [1, 2])), long)


def test_each_prompt_of_a_list_has_its_own_part_of_a_value() -> None:
    first, second = keys(constant((2, 5, HIDDEN)), [TOKENS, TOKENS], [[1]], TINY, 0)
    assert first != second
    assert (first, second) == tuple(keys(constant((2, 5, HIDDEN)), [TOKENS, [1, 2, 3, 4, 9]], [[1]], TINY, 0))


def test_two_visits_of_a_module_are_two_sites() -> None:
    twice = [replace(info, order=2 * info.order) for info in TINY.sites]
    again = replace(twice[0], order=1, visit=1)
    description = replace(TINY, sites=(twice[0], again, *twice[1:]))

    def written(visit: int) -> Recording:
        site = Site(module=again.module, port=again.port, visit=visit)

        def record(r: Recorder) -> None:
            value = r.constant(WHOLE)
            r._add(Write(site=site, invoke=0, value=value, in_place=False, where=r.where), None)

        return record

    assert says(written(0), description=description) != says(written(1), description=description)


# Needs


def reading(*reads: tuple[str, Operand | None], prompts: list[list[int]] | None = None) -> tuple[Cone, ...]:
    r = Recorder(TINY, prompts or [TOKENS])
    for module, column in reads:
        value = r.read(module)
        width = VOCAB if module == "lm_head" else HIDDEN
        r.save(value if column is None else r.index(value, ALL, column, shape=(1, width)))
    return cones(r)[0]


@pytest.mark.parametrize(
    ("reads", "needs", "head"),
    [
        ([("lm_head", None)], (5, 5, 5, 5), (0, 1, 2, 3, 4)),
        ([("lm_head", -1)], (5, 5, 5, 5), (4,)),
        ([("lm_head", 2)], (3, 3, 3, 3), (2,)),
        ([("model.norm", 1), ("lm_head", 3)], (4, 4, 4, 4), (1, 3)),
        ([(layer(1), None)], (5, 5, 0, 0), ()),
        ([(layer(1), 2)], (3, 3, 0, 0), ()),
        ([(f"{layer(2)}.self_attn", 1), (layer(0), 3)], (4, 2, 2, 0), ()),
        ([(layer(3), 0)], (1, 1, 1, 1), ()),
        ([("model.embed_tokens", None)], (5, 0, 0, 0), ()),
        ([(layer(1), None), ("lm_head", 0)], (5, 5, 1, 1), (0,)),
    ],
)
def test_rows_are_needed_up_to_the_last_read(
    reads: list[tuple[str, Operand | None]], needs: tuple[int, ...], head: tuple[int, ...]
) -> None:
    (cone,) = reading(*reads)
    assert (cone.needs, cone.head) == (needs, head)


def test_each_of_ragged_prompts_needs_its_own_rows() -> None:
    first, second = reading(("lm_head", 2), prompts=[TOKENS, [6, 7, 8]])
    assert (first.head, second.head) == ((2,), (0,))
    first, second = reading(("lm_head", 1), prompts=[TOKENS, [6, 7, 8]])
    assert (second.needs, second.head) == ((0, 0, 0, 0), ())


def test_a_write_that_nobody_reads_after_needs_no_rows() -> None:
    r = Recorder(TINY, [TOKENS])
    r.write(layer(3), r.constant(WHOLE))
    r.save(r.read(layer(0)))
    assert cones(r)[0][0].needs == (5, 0, 0, 0)


def test_a_dead_read_needs_nothing() -> None:
    r = Recorder(TINY, [TOKENS])
    r.op("exp", r.read("lm_head"))
    r.save(r.read(layer(0)))
    assert cones(r)[0][0].needs == (5, 0, 0, 0)


def test_each_wave_needs_what_is_read_in_it() -> None:
    r = Recorder(TINY, [TOKENS], [TOKENS])
    r.save(r.read(layer(0), invoke=1))
    late = r.index(r.read(layer(3), invoke=0), ALL, 1, shape=(1, HIDDEN))
    set_columns(r, (ALL, 2), late, module=layer(1), invoke=1)
    r.save(r.index(r.read("lm_head", invoke=1), ALL, 3, shape=(1, VOCAB)))
    assert cones(r, 0)[0][0].needs == (2, 2, 2, 2)
    assert cones(r, 0)[1][0].needs == (5, 3, 0, 0)
    assert (cones(r, 1)[1][0].needs, cones(r, 1)[1][0].head) == ((4, 4, 4, 4), (3,))


def test_a_model_that_cannot_leave_rows_out_needs_them_all() -> None:
    r = Recorder(tiny_llama(has_forks=False), [TOKENS])
    r.save(r.index(r.read(layer(0)), ALL, 1, shape=(1, HIDDEN)))
    (cone,) = cones(r)[0]
    assert (cone.needs, cone.head) == ((5, 5, 5, 5), (0, 1, 2, 3, 4))


@given(
    st.lists(st.tuples(st.sampled_from([layer(n) for n in range(4)] + ["model.norm", "lm_head"]), st.integers(0, 4)))
)
def test_needs_never_grow_and_hold_every_read(reads: list[tuple[str, int]]) -> None:
    (cone,) = reading(("model.embed_tokens", 0), *reads)
    assert list(cone.needs) == sorted(cone.needs, reverse=True)
    levels = {layer(n): n for n in range(4)}
    for module, column in reads:
        if module in levels:
            assert column < cone.needs[levels[module]]
        else:
            assert column in cone.head and column < cone.needs[-1]
    assert set(cone.head) == {column for module, column in reads if module not in levels}
