"""Which rows go around a layer whose output is given, and what that costs."""

from __future__ import annotations

from polytrace.graph import Port
from scheduling.plan import Cone, Program
from tests.scheduling.tiny import HIDDEN, Recorder, tiny_llama

TINY = tiny_llama(num_layers=4)
TOKENS = [1, 2, 3, 4, 5]


def layer(number: int) -> str:
    return f"model.layers.{number}"


def skip(r: Recorder, number: int, invoke: int = 0) -> None:
    """The layer's input is its output."""
    r.write(layer(number), r.read(layer(number), Port.INPUT, invoke), invoke=invoke)


def cone(program: Program, invoke: int = 0) -> Cone:
    wave = program.waves[0]
    return wave.cones[wave.invokes.index(invoke)][0]


def compiled(r: Recorder) -> Program:
    r.save(r.read("lm_head"))
    return r.work_out()


def test_rows_whose_layer_is_given_its_output_do_not_run_it() -> None:
    r = Recorder(TINY, [TOKENS])
    skip(r, 1)
    skip(r, 2)
    program = compiled(r)
    assert cone(program).skips == (1, 2)
    assert [(edit.level, edit.position) for edit in cone(program).edits] == [(1, 0), (2, 0)]
    assert program.waves[0].rows.token_layers == 2 * len(TOKENS)
    assert program.waves[0].rows.widest == len(TOKENS)  # they are in the stream all the same


def test_a_layer_of_which_something_is_read_runs() -> None:
    for path, port in (("mlp", Port.OUTPUT), ("self_attn", Port.OUTPUT)):
        r = Recorder(TINY, [TOKENS])
        skip(r, 1)
        r.save(r.read(f"{layer(1)}.{path}", port))
        assert cone(compiled(r)).skips == ()


def test_a_layer_whose_own_output_goes_into_what_is_written_runs() -> None:
    r = Recorder(TINY, [TOKENS])
    r.write(layer(1), r.op("mul", r.read(layer(1)), 2.0))
    assert cone(compiled(r)).skips == ()


def test_a_layer_inside_of_which_something_is_written_runs() -> None:
    r = Recorder(TINY, [TOKENS])
    r.write(f"{layer(1)}.mlp", r.constant((1, 5, HIDDEN)))
    skip(r, 1)
    assert cone(compiled(r)).skips == ()


def test_in_place_code_on_some_tokens_skips_nothing() -> None:
    r = Recorder(TINY, [TOKENS])
    r.write(layer(1), r.op("setitem", r.read(layer(1)), (slice(None), -1), 0.0), in_place=True)
    assert cone(compiled(r)).skips == ()


def test_rows_are_shared_up_to_the_layer_and_with_those_that_skip_it_too() -> None:
    r = Recorder(TINY, *[[TOKENS]] * 3)
    for invoke in (1, 2):
        skip(r, 2, invoke)
    for invoke in range(3):
        r.save(r.read("lm_head", invoke=invoke))
    wave = r.work_out().waves[0]
    assert [one[0].skips for one in wave.cones] == [(), (2,), (2,)]
    # two layers for all three, the third for the first only, the fourth for the first and for the two that are equal
    assert wave.rows.token_layers == 5 * (1 + 1 + 1 + 2)


def test_where_rows_cannot_be_left_out_every_layer_runs() -> None:
    r = Recorder(tiny_llama(num_layers=4, has_forks=False), [TOKENS])
    skip(r, 1)
    program = compiled(r)
    assert cone(program).skips == () and program.waves[0].rows.token_layers == 4 * len(TOKENS)


def test_a_sequence_with_a_skipped_layer_is_no_trunk() -> None:
    r = Recorder(TINY, [TOKENS], [TOKENS])
    skip(r, 1)
    late = r.read(layer(3))
    r.write(layer(0), r.op("mul", late, 0.5), invoke=1)
    r.save(r.read("lm_head", invoke=0))
    r.save(r.read("lm_head", invoke=1))
    program = r.work_out()
    assert len(program.waves) == 2 and not program.trunks
