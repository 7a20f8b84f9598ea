"""What backwards become: which waves run which others backwards, and who takes his turn where."""

from __future__ import annotations

import pytest

from polytrace.errors import GraphError
from polytrace.graph import NodeId, OpGrad, Port, Read, Ref, SiteGrad, Turn, Write, operands
from scheduling.plan import Program
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

TINY = tiny_llama(num_layers=4, stages=2)  # layers 0 and 1 on the first stage


def layer(number: int) -> str:
    return f"model.layers.{number}"


def turns(program: Program, wave: int) -> list[tuple[int, str, str]]:
    """(stage, turn, site) of a wave that runs backwards, in the order in which they happen."""
    found = []
    stages = list(enumerate(program.waves[wave].stages))
    for stage, work in reversed(stages):
        for fragment in work.fragments:
            for node in fragment.nodes:
                event = program.graph.nodes[node]
                if isinstance(event, SiteGrad):
                    at = program.graph.nodes[event.at]
                    assert isinstance(at, (Read, Write))
                    found.append((stage, event.turn.value, str(at.site)))
    return found


def order_of(site: str) -> int:
    module, _, port = site.rpartition(".")
    return next(info.order for info in TINY.sites if (info.module, info.port) == (module, Port(port)))


def scalar(r: Recorder, invoke: int = 0) -> Ref:
    return r.op("sum", r.read("lm_head", invoke=invoke), shape=())


def test_a_gradient_runs_its_wave_backwards_through_the_stages() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early = r.read(layer(0))
    r.save(r.grad(early, r.backward(scalar(r))), "g")
    program = r.work_out()
    forward, backward = program.waves
    assert (forward.of, backward.of) == (None, 0)
    inputs = [order_of(f"{layer(number)}.input") for number in (1, 2, 3)]  # where a layer's gradients are added up
    assert forward.cuts == (order_of("model.layers.0.output"), *inputs, order_of("lm_head.output"))
    assert backward.frees == (0,)
    assert backward.invokes == ()
    assert turns(program, 1) == [(1, "add", "lm_head.output"), (0, "look", "model.layers.0.output")]
    (slot,) = program.saves
    assert (slot.stage, slot.facts.shape) == (0, (1, 3, HIDDEN))
    assert program.sharing_domain is None  # its rows are its own


def test_forward_rows_are_all_there_up_to_the_last_layer() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early = r.read(layer(0))
    loss = r.op("sum", r.index(r.read("lm_head"), slice(None), -1, shape=(1, VOCAB)), shape=())
    r.save(r.grad(early, r.backward(loss)), "g")
    program = r.work_out()
    (cone,) = program.waves[0].cones[0]
    assert cone.needs == (3, 3, 3, 3)
    assert program.waves[0].kept == ((2,),)  # the head runs on what is read


def test_a_write_takes_the_gradient_and_stops_it() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early = r.read(layer(0))
    vector = r.constant((1, 3, HIDDEN))
    r.write(layer(2), vector)
    b = r.backward(scalar(r))
    r.save(r.grad(vector, b), "v")
    program = r.work_out()
    assert turns(program, 1) == [(1, "add", "lm_head.output"), (1, "take", "model.layers.2.output")]
    del early


def test_a_write_between_takes_even_what_nobody_asks_for() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early = r.read(layer(0))
    r.write(layer(2), r.constant((1, 3, HIDDEN)))
    r.save(r.grad(early, r.backward(scalar(r))), "g")
    program = r.work_out()
    assert turns(program, 1) == [
        (1, "add", "lm_head.output"),
        (1, "take", "model.layers.2.output"),
        (0, "look", "model.layers.0.output"),
    ]


def test_in_place_steering_hands_the_gradient_on_to_what_was_read() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early, here = r.read(layer(0)), r.read(layer(2))
    vector = r.constant((HIDDEN,))
    r.write(layer(2), r.op("add", here, vector), in_place=True)
    b = r.backward(scalar(r))
    r.save(r.grad(early, b), "g")
    r.save(r.grad(vector, b), "v")
    r.save(r.grad(here, b), "h")
    program = r.work_out()
    assert turns(program, 1) == [
        (1, "add", "lm_head.output"),
        (1, "take", "model.layers.2.output"),
        (1, "add", "model.layers.2.output"),
        (1, "look", "model.layers.2.output"),
        (0, "look", "model.layers.0.output"),
    ]


def test_prompts_that_give_to_others_have_their_gradient_too() -> None:
    r = Recorder(TINY, [[1, 2, 3]], [[4, 5, 6]])
    clean = r.read(layer(3), invoke=0)
    r.write(layer(1), clean, invoke=1)
    target = r.read(layer(0), invoke=0)
    r.save(r.grad(target, r.backward(scalar(r, invoke=1))), "g")
    program = r.work_out()
    assert [wave.of for wave in program.waves] == [None, None, 1, 0]
    assert turns(program, 2) == [(1, "add", "lm_head.output"), (0, "take", "model.layers.1.output")]
    assert turns(program, 3) == [(1, "add", "model.layers.3.output"), (0, "look", "model.layers.0.output")]


def test_a_learning_loop_is_one_request() -> None:
    prompts = [[[1, 2, 3]]] * 3
    r = Recorder(TINY, *prompts)
    vector = r.constant((HIDDEN,))
    for step in range(3):
        here = r.read(layer(1), invoke=step)
        r.write(layer(1), r.op("add", here, vector), invoke=step, in_place=True)
        vector = r.op("sub", vector, r.grad(vector, r.backward(scalar(r, invoke=step))))
    r.save(vector, "v")
    program = r.work_out()
    assert [wave.of for wave in program.waves] == [None, 0, None, 2, None, 4]
    assert [wave.invokes for wave in program.waves] == [(0,), (), (1,), (), (2,), ()]


def test_a_gradient_that_is_changed_goes_on_as_that() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early, late = r.read(layer(0)), r.read(layer(2))
    b = r.backward(scalar(r))
    seen = r.grad(late, b)
    r.set_grad(late, b, r.op("mul", seen, 2.0))
    r.save(r.grad(early, b), "g")
    program = r.work_out()
    assert turns(program, 1) == [
        (1, "add", "lm_head.output"),
        (1, "look", "model.layers.2.output"),
        (1, "set", "model.layers.2.output"),
        (0, "look", "model.layers.0.output"),
    ]


def test_two_losses_run_the_same_wave_backwards_twice() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early, logits = r.read(layer(0)), r.read("lm_head")
    for name in ("a", "b"):
        r.save(r.grad(early, r.backward(r.op("sum", logits, shape=()))), name)
    program = r.work_out()
    assert [wave.of for wave in program.waves] == [None, 0, 0]
    assert [wave.frees for wave in program.waves] == [(), (), (0,)]


def test_the_gradient_of_a_product_is_worked_out_for_each_operand() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early, scale = r.read(layer(0)), r.constant((1, 3, HIDDEN))
    loss = r.op("sum", r.op("mul", early, scale), shape=())
    b = r.backward(loss)
    r.save(r.grad(scale, b), "s")
    r.save(r.grad(early, b), "e")
    program = r.work_out()
    found = [node.operand for node in program.graph.nodes if isinstance(node, OpGrad)]
    assert sorted(found) == [0, 0, 1]  # of the sum, and of both factors


def test_what_the_loss_does_not_depend_on_has_no_gradient() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    loss = r.op("sum", r.read(layer(0)), shape=())
    late = r.read(layer(2))
    asked = r.grad(late, r.backward(loss))
    r.save(asked, "g")
    with pytest.raises(GraphError, match=r"does not depend on this value") as caught:
        r.work_out()
    assert caught.value.where == f"a.py:{asked.node}"


def test_detached_values_stop_gradients() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early = r.read(layer(0))
    r.write(layer(2), r.op("detach", r.read(layer(2))))
    r.save(r.grad(early, r.backward(scalar(r))), "g")
    program = r.work_out()
    assert turns(program, 1)[1:2] == [(1, "take", "model.layers.2.output")]
    assert (1, "add", "model.layers.2.output") not in turns(program, 1)
    assert Turn.LOOK.value in [turn for _, turn, _ in turns(program, 1)]


def test_a_parameter_has_no_gradient_here() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    weight = r.parameter("lm_head.weight")
    loss = r.op("sum", weight, shape=())
    r.save(r.grad(weight, r.backward(loss)), "g")
    with pytest.raises(GraphError, match=r"lm_head\.weight would count its uses in this program alone"):
        r.work_out()


def test_operands_stand_before_what_uses_them() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    early = r.read(layer(0))
    b = r.backward(scalar(r))
    r.save(r.op("mul", r.grad(early, b), early), "g")
    program = r.work_out()
    for node, event in enumerate(program.graph.nodes):
        assert all(part < NodeId(node) for part in operands(event))


def test_a_way_back_counts_as_two_forwards_of_the_layers_that_it_runs_through() -> None:
    r = Recorder(TINY, [[1, 2, 3]])
    r.save(r.grad(r.read(layer(1)), r.backward(scalar(r))), "g")
    certificate = r.certify()
    assert (certificate.passes, certificate.tokens) == (2, 3)
    assert certificate.token_layers == certificate.token_layers_alone == 3 * 4 + 2 * 3 * 2
    r.save(r.grad(r.read(layer(1)), r.backward(scalar(r))), "h")
    twice = r.certify()
    assert (twice.passes, twice.token_layers) == (3, 3 * 4 + 2 * (2 * 3 * 2))
    assert twice.tape_bytes == certificate.tape_bytes
