"""A generation's graph is cut into steps: what each has, what it carries, and which are the same."""

from __future__ import annotations

import pytest

from polytrace.errors import GraphError
from polytrace.graph import (
    Carried,
    Constant,
    Generation,
    Graph,
    Invoke,
    Last,
    Node,
    NodeId,
    Op,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Site,
    Write,
)
from scheduling.absence import absent_nodes, without_absent
from scheduling.plan import ValueFacts
from scheduling.steps import ENDING, TOKEN, CutStep, Cutter

LAYER, LATER = (Site(module=f"model.layers.{layer}", port=Port.OUTPUT) for layer in (0, 3))
STEPS = 4


def request(*nodes: Node, steps: int = STEPS) -> Request:
    invoke = Invoke(sequences=((1, 2, 3), (4,)), generation=Generation(max_new_tokens=steps))
    return Request(graph=Graph(nodes=nodes), invokes=(invoke,), constants={})


def read(step: int, num_steps: int = 1, site: Site = LAYER) -> Read:
    return Read(site=site, invoke=0, where=f"read {step}", step=step, num_steps=num_steps)


def write(value: int, step: int, num_steps: int = 1) -> Write:
    return Write(
        site=LAYER, invoke=0, value=ref(value), in_place=False, where=f"write {step}", step=step, num_steps=num_steps
    )


def op(name: str, *args: int) -> Op:
    return Op(name=name, args=tuple(map(ref, args)), where=name)


def ref(node: int) -> Ref:
    return Ref(NodeId(node))


def save(value: int, step: int | None = None) -> Save:
    return Save(name="s", value=ref(value), where="save", step=step)


def known(node: NodeId) -> tuple[ValueFacts, int]:
    return ValueFacts(shape=(2, 1, 8), dtype="float32", num_bytes=64), 0


def cut(cutter: Cutter, step: int) -> CutStep:
    return cutter.cut(step, known)


def kinds(found: CutStep) -> list[str]:
    return [
        node.name
        if isinstance(node, Op)
        else "token"
        if isinstance(node, Read) and node.site == TOKEN
        else type(node).__name__
        for node in found.request.graph.nodes
    ]


def test_a_step_has_its_own_nodes_and_draws_a_token_at_the_end() -> None:
    cutter = Cutter(request(read(0), save(0, 0), read(2), save(2, 2)))
    assert [kinds(cut(cutter, step)) for step in range(STEPS)] == [
        ["Read", "Save", "token"],
        ["token"],
        ["Read", "Save", "token"],
        ["token"],
    ]
    first, third = cut(cutter, 0).request, cut(cutter, 2).request
    assert first.invokes[0].sequences == ((1, 2, 3), (4,)), "step 0 is the prompt"
    assert third.invokes[0].sequences == ((0,), (0,)), "later steps have one column"
    assert all(node.step == 0 for node in third.graph.nodes if isinstance(node, Read)), "a step counts from itself"


def test_a_body_of_several_steps_is_at_each_of_them_and_looked_at_once() -> None:
    cutter = Cutter(request(read(0, STEPS), op("neg", 0), write(1, 0, STEPS)))
    assert all(kinds(cut(cutter, step)) == ["Read", "neg", "Write", "token"] for step in range(STEPS))
    assert [cutter.is_like(step) for step in range(1, STEPS)] == [False, True, True]


def test_what_is_computed_of_constants_belongs_to_whoever_uses_it() -> None:
    nodes = (
        Constant(name="v", where="v"),
        op("neg", 0),
        read(0),
        op("add", 2, 1),
        save(3, 0),
        read(1),
        op("add", 5, 1),
        save(6, 1),
    )
    cutter = Cutter(request(*nodes))
    assert [kinds(cut(cutter, step)) for step in (0, 1)] == [["Read", "Constant", "neg", "add", "Save", "token"]] * 2
    assert not cutter.held(cut(cutter, 0))


def test_values_of_earlier_steps_are_carried_and_held_until_then() -> None:
    cutter = Cutter(request(read(0), read(1), op("add", 0, 1), read(3), op("add", 2, 3), save(4)))
    steps = [cut(cutter, step) for step in range(STEPS)]
    assert kinds(steps[1]) == ["Read", "Carried", "add", "token"]
    assert steps[1].sources == {1: 0} and steps[1].request.graph.nodes[1] == Carried(
        shape=(2, 1, 8), dtype="float32", stage=0, where="read 0"
    )
    assert kinds(steps[3]) == ["Read", "Carried", "add", "Save", "token"] and steps[3].sources == {1: 2}
    assert [cutter.held(step) for step in steps] == [{0}, {2}, set(), set()]


def test_what_stands_behind_the_loop_is_the_ending() -> None:
    last = Last(values=(ref(1), ref(0)), where="last")
    cutter = Cutter(request(read(0), read(1), last, op("neg", 2), save(3)))
    assert cutter.has_ending
    found = cut(cutter, ENDING)
    assert kinds(found) == ["Carried", "Carried", "Last", "neg", "Save"] and [*found.sources.values()] == [1, 0]
    assert not Cutter(request(read(0), save(0))).has_ending


def test_a_value_of_the_prompt_may_enter_a_body_of_all_steps() -> None:
    cutter = Cutter(request(read(0), read(0, STEPS, LATER), op("add", 1, 0), save(2, 0)))
    assert kinds(cut(cutter, 0)) == ["Read", "Read", "add", "Save", "token"]
    with_all = Cutter(request(read(0), read(0, STEPS, LATER), op("add", 1, 0), write(2, 0, STEPS)))
    assert kinds(cut(with_all, 2)) == ["Read", "Carried", "add", "Write", "token"]


@pytest.mark.parametrize(
    ("nodes", "told"),
    [
        ((read(STEPS), save(0, STEPS)), f"step {STEPS} is asked for; this generation has steps 0-{STEPS - 1}"),
        ((read(2), write(0, 1)), "a value of a later step is used at an earlier one"),
        ((read(0, 2), read(3), op("add", 0, 1), save(2, 3)), "which could be any of them"),
    ],
)
def test_what_no_step_can_mean_is_refused_with_the_line(nodes: tuple[Node, ...], told: str) -> None:
    with pytest.raises(GraphError, match=told) as refused:
        Cutter(request(*nodes))
    assert refused.value.where in ("read 4", "write 1", "add")


def test_what_is_made_of_values_that_do_not_come_does_not_come() -> None:
    stack = Op(name="stack", args=([ref(0), ref(1)],), where="stack")
    lone = Op(name="stack", args=([ref(0)],), where="stack")
    nodes = (
        Carried(shape=(1,), dtype="float32", stage=0, where="a"),
        Carried(shape=(1,), dtype="float32", stage=0, where="b"),
        stack,
        lone,
        Last(values=(ref(0), ref(1)), where="last"),
        op("add", 0, 1),
        save(5),
    )
    absent = absent_nodes(Graph(nodes=nodes), (), [NodeId(0)])
    assert absent == {0, 3, 5, 6}, "lists lose members, and the last that came is there"
    assert without_absent(stack.args[0], absent) == [ref(1)]
    assert absent_nodes(Graph(nodes=nodes[:3]), (), [NodeId(0)]) == {0, 2}, "at a step a list is whole or not there"
    assert absent_nodes(Graph(nodes=(read(0), op("neg", 0), write(1, 0))), (0,), ()) == {0, 1, 2}
