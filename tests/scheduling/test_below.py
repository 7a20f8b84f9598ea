"""Which values stay below the gather: decided on a site table alone. What they become is tested on real ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polytrace.description import ModelDescription
from polytrace.graph import Operand, Port, Ref
from scheduling.plan import Action, Below, Cut
from tests.scheduling.tiny import HIDDEN, VOCAB, WIDE, Recorder, tiny_llama

PROMPT = [[1, 2, 3, 4, 5, 6]]
UP, LATER = "model.layers.0.mlp.up_proj", "model.layers.3.mlp.up_proj"
EVERY = slice(None)


def split_llama(ranks: int = 2, blocks: int = 1, copies: int = 1) -> ModelDescription:
    """The tiny model over ranks: what `up_proj` and the head give is split, and the head's weight by its tokens."""
    description = tiny_llama(ranks=ranks)
    sites = tuple(
        replace(site, leaves=(replace(site.leaves[0], sharded_dim=0, sharded_blocks=blocks, sharded_copies=copies),))
        if site.port is Port.OUTPUT and site.module.endswith(("up_proj", "lm_head"))
        else site
        for site in description.sites
    )
    parameters = tuple(
        replace(info, sharded_dim=0) if info.path == "lm_head.weight" else info for info in description.parameters
    )
    return replace(description, sites=sites, parameters=parameters)


def steps(recorder: Recorder) -> dict[int, Action]:
    return {node: below.action for node, below in recorder.work_out().below.items()}


def test_one_rank_has_nothing_below() -> None:
    recorder = Recorder(tiny_llama(), PROMPT)
    recorder.save(recorder.index(recorder.read(UP), EVERY, EVERY, 5, shape=(1, 6)))
    assert recorder.work_out().below == {}


def test_a_feature_is_picked_and_the_index_is_into_what_was_picked() -> None:
    recorder = Recorder(split_llama(), PROMPT)
    read = recorder.read(UP)
    one = recorder.index(read, EVERY, EVERY, -3, shape=(1, 6))
    recorder.save(one)
    program = recorder.work_out()
    cut = Cut(dim=2, size=WIDE, blocks=1)
    assert program.below[read.node] == Below(action=Action.KEEP, cut=cut, result=cut)
    assert program.below[one.node] == Below(action=Action.PICK, cut=cut, result=None, features=(WIDE - 3,))
    assert program.graph.nodes[one.node].args[1] == (EVERY, EVERY, 0)  # type: ignore[union-attr]


def test_features_are_picked_of_the_columns_that_are_read() -> None:
    recorder = Recorder(split_llama(), PROMPT)
    read = recorder.read(UP)
    some = recorder.index(read, EVERY, -1, [7, 2, 7], shape=(1, 3))
    recorder.save(some)
    program = recorder.work_out()
    assert program.narrowed[read.node] == (5,)
    assert program.below[some.node].features == (2, 7)
    assert program.graph.nodes[some.node].args[1] == (EVERY, 0, [1, 0, 1])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "rest", "step"),
    [
        ("argmax", (-1,), Action.LARGEST),
        ("topk", (3,), Action.LARGEST),
        ("sum", (2,), Action.SUM),
        ("mean", ((1, 2),), Action.SUM),
        ("amax", (-1,), Action.EXTREME),
        ("logsumexp", (-1,), Action.SOFTMAX),
    ],
)
def test_reductions_over_what_is_split_are_made_of_parts(name: str, rest: tuple[Operand, ...], step: Action) -> None:
    recorder = Recorder(split_llama(), PROMPT)
    read = recorder.read(UP)
    scaled = recorder.op("mul", read, 2.0)
    made = recorder.op(name, scaled, *rest, shape=(1, 6))
    recorder.save(made)
    assert steps(recorder) == {read.node: Action.KEEP, scaled.node: Action.KEEP, made.node: step}


@pytest.mark.parametrize(("name", "rest"), [("sum", (1,)), ("argmax", ()), ("cumsum", (-1,)), ("sort", (-1,))])
def test_what_parts_do_not_give_is_made_of_the_whole(name: str, rest: tuple[Operand, ...]) -> None:
    recorder = Recorder(split_llama(), PROMPT)
    recorder.save(recorder.op(name, recorder.read(UP), *rest))
    assert recorder.work_out().below == {}


def test_a_softmax_stays_cut_for_who_takes_little_of_it_and_is_whole_for_who_saves_it() -> None:
    for is_saved in (False, True):
        recorder = Recorder(split_llama(), PROMPT)
        read = recorder.read("lm_head")
        soft = recorder.op("softmax", read, -1)
        recorder.save(recorder.op("max", soft, -1, shape=(1, 6)))
        if is_saved:
            recorder.save(soft)
        assert (soft.node in recorder.work_out().below) is not is_saved


def test_a_whole_operand_is_cut_where_it_has_the_split_dimension() -> None:
    recorder = Recorder(split_llama(), PROMPT)
    read, vector, column = recorder.read(UP), recorder.constant((WIDE,)), recorder.constant((6, 1))
    product = recorder.op("mul", read, vector)
    moved = recorder.op("add", column, product, shape=(1, 6, WIDE))
    recorder.save(recorder.op("sum", moved, -1, shape=(1, 6)))
    below = recorder.work_out().below
    assert below[product.node].parts == ((1, 0),)
    assert below[moved.node].parts == ()


def test_a_product_with_a_whole_vector_is_made_of_partial_products() -> None:
    recorder = Recorder(split_llama(), PROMPT)
    product = recorder.op("matmul", recorder.read(UP), recorder.constant((WIDE,)), shape=(1, 6))
    recorder.save(product)
    assert recorder.work_out().below[product.node].action is Action.PRODUCT


def test_an_edit_goes_back_in_parts_unless_somebody_reads_the_site_behind_it() -> None:
    for is_read in (False, True):
        recorder = Recorder(split_llama(), PROMPT)
        changed = recorder.op("setitem", recorder.read(UP), (EVERY, EVERY, slice(3, 9)), 0.0)
        recorder.write(UP, changed, in_place=True)
        if is_read:
            recorder.save(recorder.read(UP))
        recorder.save(recorder.read("model.norm"))
        assert bool(recorder.work_out().below) is not is_read


def test_features_by_a_list_beside_another_list_are_put_into_the_whole() -> None:
    recorder = Recorder(split_llama(), PROMPT)
    changed = recorder.op("setitem", recorder.read(UP), (EVERY, [0, 5], [3, 4]), 0.0)
    recorder.write(UP, changed, in_place=True)
    recorder.save(recorder.read("model.norm"))
    assert recorder.work_out().below == {}


def test_what_goes_to_another_stage_or_pass_is_whole() -> None:
    recorder = Recorder(split_llama(), PROMPT)
    early = recorder.read(UP)
    recorder.save(recorder.op("sum", recorder.op("mul", early, recorder.read(LATER)), -1, shape=(1, 6)))
    assert early.node not in recorder.work_out().below
    recorder = Recorder(split_llama(), PROMPT, PROMPT)
    late = recorder.read(LATER)
    recorder.write(UP, recorder.op("mul", late, 2.0), invoke=1)
    recorder.save(recorder.read("model.norm", invoke=1))
    assert recorder.work_out().below == {}


def test_rows_of_a_split_parameter_and_logits_of_a_called_head_are_picked() -> None:
    recorder = Recorder(split_llama(), PROMPT)
    weight = recorder.parameter("lm_head.weight")
    row = recorder.index(weight, 17, shape=(HIDDEN,))
    lens = recorder.call("lm_head", recorder.read("model.layers.3"), shape=(1, 6, VOCAB))
    likely = recorder.op("argmax", lens, -1, shape=(1, 6))
    recorder.save(row)
    recorder.save(likely)
    found = steps(recorder)
    assert found[weight.node] is Action.KEEP and found[row.node] is Action.PICK
    assert found[lens.node] is Action.KEEP and found[likely.node] is Action.LARGEST


def test_copies_of_key_value_heads_are_gathered() -> None:
    recorder = Recorder(split_llama(ranks=4, copies=2), PROMPT)
    recorder.save(recorder.index(recorder.read(UP), EVERY, EVERY, 5, shape=(1, 6)))
    assert recorder.work_out().below == {}


def test_values_that_nobody_needs_are_not_looked_at() -> None:
    recorder = Recorder(split_llama(), PROMPT)
    read = recorder.read(UP)
    recorder.op("sort", read, -1)
    one: Ref = recorder.index(read, EVERY, EVERY, 5, shape=(1, 6))
    recorder.save(one)
    assert recorder.work_out().below[one.node].action is Action.PICK
