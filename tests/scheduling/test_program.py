"""Where nodes run: points, waves, what is carried, held and dropped."""

from __future__ import annotations

import time

import pytest

from polytrace.description import Limits, ModelDescription
from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import NodeId, Options, Ref, Sharing
from scheduling.plan import PROLOGUE, Program, Transfer
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

TINY = tiny_llama(num_layers=4, stages=2)  # layers 0 and 1 on the first stage


def layer(number: int) -> str:
    return f"model.layers.{number}"


def nodes_at(program: Program, wave: int, stage: int) -> dict[int, tuple[NodeId, ...]]:
    """Order -> nodes."""
    return {fragment.order: fragment.nodes for fragment in program.waves[wave].stages[stage].fragments}


def place_of(program: Program, node: Ref) -> tuple[int, int, int]:
    """(wave, stage, order) of a node that runs once."""
    (found,) = [
        (wave, stage, fragment.order)
        for wave, each in enumerate(program.waves)
        for stage, work in enumerate(each.stages)
        for fragment in work.fragments
        if node.node in fragment.nodes
    ]
    return found


def moved(transfers: tuple[Transfer, ...]) -> list[tuple[int, int, int]]:
    return [(transfer.node, transfer.source, transfer.target) for transfer in transfers]


def test_a_value_read_early_and_used_late_is_carried_within_one_wave() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    clean = r.read(layer(0), invoke=0)
    r.write(layer(3), clean, invoke=1)
    r.save(r.read("lm_head", invoke=1))
    program = r.work_out()
    (wave,) = program.waves
    assert wave.invokes == (0, 1)
    assert moved(wave.stages[0].leaving) == moved(wave.stages[1].arriving) == [(0, 0, 1)]
    assert wave.stages[0].drops == (0,)
    assert wave.stages[1].fragments[0].drops == (0,)


def test_a_value_needed_at_an_earlier_layer_opens_a_second_wave() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    late = r.read(layer(3), invoke=0)
    r.write(layer(0), late, invoke=1)
    r.save(r.read("lm_head", invoke=1))
    program = r.work_out()
    assert [wave.invokes for wave in program.waves] == [(0,), (1,)]
    assert moved(program.waves[1].stages[0].held) == moved(program.waves[1].stages[1].held) == [(0, 1, 0)]
    assert program.waves[1].stages[1].drops == (0,)


def test_a_value_stays_at_home_until_it_has_gone_to_every_stage_that_needs_it() -> None:
    r = Recorder(tiny_llama(num_layers=3, stages=3), [[1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]])
    value = r.read(layer(1), invoke=0)
    r.write(layer(2), value, invoke=1)  # a later stage, in the same wave
    r.write(layer(0), value, invoke=2)  # an earlier stage, in the next wave
    r.save(r.read(layer(2), invoke=1))
    r.save(r.read(layer(2), invoke=2))
    first, second = r.work_out().waves
    assert moved(first.stages[1].leaving) == [(0, 1, 2)] and first.stages[1].drops == ()
    assert moved(second.stages[1].held) == [(0, 1, 0)] and second.stages[1].drops == (0,)


def test_an_invoke_runs_only_as_far_as_it_is_needed() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    r.save(r.read(layer(1)))
    (wave,) = r.work_out().waves
    assert wave.until == r.sites[r.nodes[0].site][0].order  # type: ignore[union-attr]
    assert wave.kept == ((),)


def test_writes_of_earlier_waves_are_applied_again_where_a_later_wave_looks() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    early = r.write(layer(0), r.constant((1, 3, HIDDEN)), invoke=1)
    late = r.read(layer(3), invoke=0)
    r.save(r.read(layer(1), invoke=1), "before")
    r.write(layer(2), r.op("add", late, r.read(layer(2), invoke=0)), invoke=1)
    r.save(r.read(layer(3), invoke=1), "after")
    program = r.work_out()
    assert len(program.waves) == 2
    for wave in (0, 1):
        assert any(early.node in nodes for nodes in nodes_at(program, wave, 0).values())


def test_a_write_that_nobody_reads_after_still_fires() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    write = r.write(layer(3), r.constant((1, 3, HIDDEN)))
    r.save(r.read(layer(0)))
    assert place_of(r.work_out(), write)[:2] == (0, 1)


def test_nodes_that_no_save_and_no_write_needs_do_not_run() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    dead = r.op("exp", r.read("lm_head"))
    r.save(r.read(layer(0)))
    program = r.work_out()
    assert not any(dead.node in nodes for stage in (0, 1) for nodes in nodes_at(program, 0, stage).values())
    assert program.waves[0].kept == ((),)


def test_a_module_called_on_an_earlier_value_runs_in_its_own_prologue() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    logits = r.call("lm_head", r.read(layer(0)), shape=(1, 3, VOCAB))
    r.save(logits)
    assert place_of(r.work_out(), logits) == (0, 1, PROLOGUE)


def test_a_module_called_on_a_later_value_runs_in_the_next_wave_without_rows() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    called = r.call(f"{layer(0)}.mlp", r.read(layer(3)), shape=(1, 3, HIDDEN))
    r.save(called)
    program = r.work_out()
    assert place_of(program, called) == (1, 0, PROLOGUE)
    assert program.waves[1].invokes == () and program.waves[1].until == PROLOGUE


def test_a_module_called_at_home_runs_where_its_value_is() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    hidden = r.read(layer(3))
    called = r.call("lm_head", hidden, shape=(1, 3, VOCAB))
    r.save(called)
    program = r.work_out()
    assert place_of(program, called) == place_of(program, hidden)


def test_a_parameter_of_a_later_stage_used_early_comes_a_wave_before() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    weight = r.parameter("lm_head.weight")
    row = r.index(weight, 5, shape=(HIDDEN,))
    r.write(layer(0), r.op("expand", row, shape=(1, 3, HIDDEN)))
    r.save(r.read("lm_head"))
    program = r.work_out()
    assert place_of(program, weight) == (0, 1, PROLOGUE)
    assert moved(program.waves[1].stages[0].held) == [(row.node, 1, 0)]


def test_a_parameter_is_gathered_in_the_first_wave_that_uses_it() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    weight = r.parameter("lm_head.weight")
    r.write(layer(0), r.read(layer(3), invoke=0), invoke=1)
    r.save(r.op("matmul", r.read(layer(3), invoke=1), weight, shape=(1, 3, VOCAB)))
    assert place_of(r.work_out(), weight) == (1, 1, PROLOGUE)


def test_a_parameter_of_a_later_stage_used_early_in_a_later_wave_comes_the_wave_before_that() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]])
    weight = r.parameter("lm_head.weight")
    r.write(layer(0), r.read(layer(3), invoke=0), invoke=1)
    third = r.read(layer(3), invoke=1)
    grown = r.op("matmul", third, weight, shape=(1, 3, 10 * VOCAB))
    r.write(layer(0), r.op("matmul", grown, shape=(1, 3, HIDDEN)), invoke=2)
    r.save(r.read(layer(0), invoke=2))
    assert place_of(r.work_out(), weight)[0] == 1


def test_what_grows_runs_late() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    small = r.index(r.read(layer(0), invoke=0), 0, 0, shape=(HIDDEN,))
    grown = r.op("expand", small, shape=(1, 3, HIDDEN))
    r.write(layer(3), grown, invoke=1)
    r.save(r.read("lm_head", invoke=1))
    program = r.work_out()
    assert place_of(program, grown) == (0, 1, PROLOGUE)
    assert moved(program.waves[0].stages[0].leaving) == [(small.node, 0, 1)]


def test_what_shrinks_runs_early() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    shrunk = r.op("mean", r.read(layer(0), invoke=0), shape=(HIDDEN,))
    r.write(layer(3), r.op("add", shrunk, r.read(layer(3), invoke=0), shape=(1, 3, HIDDEN)), invoke=1)
    r.save(r.read("lm_head", invoke=1))
    assert place_of(r.work_out(), shrunk)[1] == 0


def test_a_grown_value_that_is_saved_stays_where_it_is_made() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    grown = r.op("expand", r.op("mean", r.read(layer(0)), shape=(HIDDEN,)), shape=(1, 3, HIDDEN))
    r.save(grown)
    r.write(layer(3), grown, invoke=1)
    assert place_of(r.work_out(), grown)[1] == 0


def test_every_stage_makes_its_own_constants() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    steer = r.constant((1, 3, HIDDEN))
    twice = r.op("mul", steer, 2.0)
    r.write(layer(0), twice)
    r.write(layer(3), twice)
    r.save(r.read("lm_head"))
    program = r.work_out()
    for stage in (0, 1):
        assert nodes_at(program, 0, stage)[PROLOGUE] == (steer.node, twice.node)
        assert program.waves[0].stages[stage].leaving == ()


def test_a_program_without_prompts_has_no_rows() -> None:
    r = Recorder(TINY)
    r.save(r.op("norm", r.parameter("lm_head.weight"), shape=()))
    (wave,) = r.work_out().waves
    assert wave.invokes == () and wave.until == PROLOGUE


def test_at_one_site_the_order_of_the_program_rules() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    before = r.read(layer(1))
    write = r.write(layer(1), r.op("mul", before, 2.0))
    after = r.read(layer(1))
    r.save(after)
    program = r.work_out()
    (nodes,) = nodes_at(program, 0, 0).values()
    assert [node for node in nodes if node in (before.node, write.node, after.node)] == [0, 2, 3]


def test_a_cycle_is_refused_with_both_lines() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    r.write(layer(1), r.op("mul", r.read(layer(3)), 2.0))
    r.save(r.read("lm_head"))
    with pytest.raises(
        GraphError, match=r"write to model\.layers\.1\.output \(a\.py:2\).*read of .*3\.output \(a\.py:0\)"
    ):
        r.work_out()


def test_a_cycle_over_two_prompts_is_refused() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    r.write(layer(1), r.read(layer(3), invoke=1), invoke=0)
    r.write(layer(1), r.read(layer(3), invoke=0), invoke=1)
    r.save(r.read("lm_head"))
    with pytest.raises(GraphError, match="a cycle"):
        r.work_out()


def test_saves_lie_without_holes_and_aligned_to_their_elements() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    hidden = r.read(layer(0))
    for name, dtype in (("a", "bool"), ("b", "bfloat16"), ("c", "float64"), ("d", "float32"), ("e", "uint8")):
        r.save(r.op("to", hidden, shape=(3,), dtype=dtype), name)
    slots = r.work_out().saves
    offset = 0
    for slot in slots:
        assert (
            slot.offset == offset and offset % {"float64": 8, "float32": 4, "bfloat16": 2}.get(slot.facts.dtype, 1) == 0
        )
        offset += slot.facts.num_bytes
    assert [slot.name for slot in slots] == ["c", "d", "b", "a", "e"]


def test_results_larger_than_the_limit_are_refused() -> None:
    limits = Limits(max_sequence_tokens=64, max_result_bytes=100)
    r = Recorder(tiny_llama(limits=limits), [[1, 2, 3, 4]])
    r.save(r.read(layer(0)))
    with pytest.raises(TooLargeError, match=r"128 bytes; the limit is 100"):
        r.work_out()


def test_a_value_of_unknown_shape_cannot_change_its_stage() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    unknown = r.op("getitem", r.read(layer(0)))
    r.facts[unknown.node] = None
    r.write(layer(3), r.op("add", unknown, r.read(layer(3)), shape=(1, 3, HIDDEN)), invoke=1)
    r.save(r.read("lm_head", invoke=1))
    with pytest.raises(GraphError, match="not known ahead"):
        r.work_out()


def test_a_certificate_notes_reads_that_see_later_lines_and_rows_written_to_padding() -> None:
    r = Recorder(TINY, [[1, 2, 3], [4]])
    r.save(r.read(layer(3)))
    r.write(layer(0), r.constant((2, 3, HIDDEN)))
    notes = r.certify().notes
    assert notes == (
        "the read at a.py:0 sees the write at a.py:3, which stands later but acts at an earlier layer",
        "the write at a.py:3 writes 2 rows of left padding, which vanish",
    )


def test_a_certificate_counts_rows_times_the_layers_they_run_through() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5]])
    r.save(r.read(f"{layer(2)}.self_attn"))
    certificate = r.certify()
    assert (certificate.tokens, certificate.token_layers, certificate.token_layers_alone) == (3, 9, 9)


def test_a_certificate_counts_equal_rows_once_and_says_what_they_would_cost_alone() -> None:
    r = Recorder(TINY, *[[[1, 2, 3, 4, 5, 6]]] * 3)
    for invoke in (1, 2):
        changed = r.op("setitem", r.read(layer(2), invoke=invoke), (slice(None), 4), float(invoke))
        r.write(layer(2), changed, invoke=invoke)
    for invoke in range(3):
        r.save(r.read("lm_head", invoke=invoke))
    certificate = r.certify()
    assert (certificate.tokens, certificate.token_layers) == (18, 6 * 4 + 2 * 2)
    assert certificate.token_layers_alone == 18 * 4
    r.options = Options(sharing=Sharing.OFF)
    assert r.certify().token_layers == r.certify().token_layers_alone


def test_a_narrow_read_moves_only_its_columns() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    hidden = r.read(layer(0), invoke=0)
    last = r.index(hidden, slice(None), slice(-1, None), shape=(1, 1, HIDDEN))
    r.save(last)
    certificate = r.certify()
    assert certificate.read_bytes == HIDDEN * 4
    assert certificate.nodes[hidden.node].shape == (1, 3, HIDDEN)  # type: ignore[union-attr]


def test_a_certificate_has_the_operations_of_the_ops_that_run() -> None:
    r = Recorder(TINY, [[1, 2]])
    hidden = r.read(layer(0))
    r.save(r.op("mul", hidden, 2))
    r.op("exp", hidden)  # nothing needs it
    assert r.certify().op_flops == 2 * HIDDEN
    r.save(r.op("mm", hidden, r.parameter("lm_head.weight"), shape=(1, 2, 7)))
    assert r.certify().op_flops == 2 * HIDDEN + 2 * 2 * 7 * HIDDEN


def test_a_sharded_deployment_carries_a_value_once_a_rank() -> None:
    r = Recorder(tiny_llama(ranks=4), [[1, 2, 3]], [[4, 5, 6]])
    r.write(layer(3), r.read(layer(0), invoke=0), invoke=1)
    r.save(r.read("lm_head", invoke=1))
    assert r.certify().carried_bytes == 4 * 3 * HIDDEN * 4


def test_ten_thousand_nodes_are_worked_out_in_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    description = long_model()
    r = Recorder(description, *[[[1, 2, 3]]] * 200)
    for invoke in range(200):
        value = r.read(layer(invoke % 100), invoke=invoke)
        for _ in range(47):
            value = r.op("mul", value, 2.0)
        if invoke:
            r.write(layer((invoke * 7) % 100), value, invoke=invoke - 1)
        r.save(value)
    began = time.process_time()
    program = r.work_out()
    seconds = time.process_time() - began
    with capsys.disabled():
        per_node = seconds / len(r.nodes) * 1e6
        print(f"\n{len(r.nodes)} nodes, {len(program.waves)} waves: {seconds * 1e3:.0f} ms, {per_node:.1f} us a node")


def long_model() -> ModelDescription:
    return tiny_llama(num_layers=126, stages=8)
