"""Gradients as bytes: what travels comes back, what cannot be is refused, and a loop takes the room of a step."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytrace.errors import GraphError, PolytraceError
from polytrace.grammar import check_graph
from polytrace.graph import (
    Backward,
    Constant,
    Generation,
    Grad,
    GradWrite,
    Graph,
    Invoke,
    Mask,
    Node,
    NodeId,
    Op,
    OpGrad,
    Parameter,
    Port,
    Read,
    Ref,
    Request,
    Save,
    SeedGrad,
    Site,
    SiteGrad,
    Turn,
    Write,
)
from polytrace.tensors import RawTensor
from polytrace.wire import decode_request, encode_request
from tests.polytrace.damaged import damaged

INVOKES = (Invoke(sequences=((1, 2, 3),)), Invoke(sequences=((4, 5),)))
CONSTANTS = {"c": RawTensor(dtype="float32", shape=(2,), data=memoryview(b"12345678"))}


def ref(place: int) -> Ref:
    return Ref(NodeId(place))


def site(layer: int) -> Site:
    return Site(module=f"model.layers.{layer}", port=Port.OUTPUT)


def request_of(*nodes: Node, invokes: tuple[Invoke, ...] = INVOKES) -> Request:
    return Request(graph=Graph(nodes=nodes), invokes=invokes, constants=CONSTANTS)


def file_of(request: Request) -> bytes:
    return b"".join(encode_request(request))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Backwards of any values, gradients of any in any of them, and losses that are made of these."""
    nodes: list[Node] = []
    kinds = ["read", "constant", "op", "backward", "grad", "grad", "grad write", "write", "save"]
    for number in range(draw(st.integers(1, 16))):
        where = draw(st.sampled_from(["a.py:1", "a.py:2"]))
        one, two, three = (ref(draw(st.integers(0, max(0, len(nodes) - 1)))) for _ in range(3))
        node: Node
        match draw(st.sampled_from(kinds)):
            case "read":
                node = Read(site=site(number % 3), invoke=number % 2, where=where)
            case "constant":
                node = Constant(name="c", where=where)
            case "op":
                node = Op(name="add", args=(one, two), where=where)
            case "backward":
                node = Backward(loss=one, gradient=draw(st.sampled_from([None, two])), where=where)
            case "grad":
                node = Grad(of=one, backward=two, where=where)
            case "grad write":
                node = GradWrite(of=one, backward=two, value=three, where=where)
            case "write":
                node = Write(site=site(1), invoke=number % 2, value=one, in_place=True, where=where)
            case _:
                node = Save(name=f"save {number}", value=one, where=where)
        with contextlib.suppress(GraphError):
            decode_request(file_of(request_of(*nodes, node)))
            nodes.append(node)
    return request_of(*nodes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests())
def test_gradients_survive_their_file(request: Request) -> None:
    assert decode_request(file_of(request)) == request


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests(), data=st.data())
def test_any_json_in_place_of_a_part_is_refused_cleanly(request: Request, data: st.DataObject) -> None:
    file = file_of(request)
    changed = damaged(file, data, ["templates", "order"], ["backward", "grad", "grad write"])
    with contextlib.suppress(PolytraceError):
        decode_request(changed)


READ = Read(site=site(0), invoke=0, where="a.py:1")
LOSS = Op(name="sum", args=(ref(0),), where="a.py:2")
BACK = Backward(loss=ref(1), gradient=None, where="a.py:3")


@pytest.mark.parametrize(
    ("node", "told"),
    [
        (Grad(of=ref(0), backward=ref(1), where="a.py:9"), "node 1 is no backward"),
        (Grad(of=ref(0), backward=ref(4), where="a.py:9"), "not before it"),
        (Grad(of=ref(4), backward=ref(2), where="a.py:9"), "not before it"),
        (Grad(of=ref(2), backward=ref(2), where="a.py:9"), "a backward has no gradient"),
        (Grad(of=ref(3), backward=ref(2), where="a.py:9"), "which has no value"),
        (Backward(loss=ref(2), gradient=None, where="a.py:9"), "which has no value"),
        (Backward(loss=ref(1), gradient=ref(3), where="a.py:9"), "which has no value"),
        (GradWrite(of=ref(0), backward=ref(2), value=ref(2), where="a.py:9"), "a backward has no value"),
        (GradWrite(of=ref(0), backward=ref(2), value=ref(3), where="a.py:9"), "which has no value"),
        (GradWrite(of=ref(0), backward=ref(2), value=ref(0), where="a.py:9"), "changed twice in one backward"),
        (Op(name="add", args=(ref(2), ref(0)), where="a.py:9"), "which has no value"),
        (Save(name="s", value=ref(2), where="a.py:9"), "which has no value"),
    ],
)
def test_gradients_that_are_not_well_formed_name_the_line(node: Node, told: str) -> None:
    change = GradWrite(of=ref(0), backward=ref(2), value=ref(0), where="a.py:4")
    with pytest.raises(GraphError, match=told) as caught:
        decode_request(file_of(request_of(READ, LOSS, BACK, change, node)))
    assert caught.value.where == "a.py:9"


def test_weights_and_masks_and_gradients_have_no_gradients() -> None:
    others: list[Node] = [Parameter(path="w", where="a.py:4"), Mask(invoke=0, where="a.py:4")]
    others.append(Grad(of=ref(0), backward=ref(2), where="a.py:4"))
    for node, name in zip(others, ("parameter", "mask", "grad"), strict=True):
        with pytest.raises(GraphError, match=f"a {name} has no gradient") as caught:
            decode_request(
                file_of(request_of(READ, LOSS, BACK, node, Grad(of=ref(3), backward=ref(2), where="a.py:9")))
            )
        assert caught.value.where == "a.py:9"


def test_several_values_have_no_gradient_as_one() -> None:
    topk = Op(name="topk", args=(ref(0), 2), where="a.py:4")
    with pytest.raises(GraphError, match="topk returns several values"):
        decode_request(file_of(request_of(READ, LOSS, BACK, topk, Grad(of=ref(3), backward=ref(2), where="a.py:9"))))


def test_what_gradients_are_made_of_is_never_sent() -> None:
    for node in (
        SiteGrad(turn=Turn.LOOK, at=NodeId(0), wave=1, value=None, where="a.py:9"),
        OpGrad(op=NodeId(1), operand=0, needs=(ref(0),), gradients=(ref(0),), where="a.py:9"),
        SeedGrad(of=ref(1), where="a.py:9"),
    ):
        graph = Graph(nodes=(READ, LOSS, node))
        with pytest.raises(TypeError, match="never sent"):
            encode_request(Request(graph=graph, invokes=INVOKES, constants={}))
        with pytest.raises(GraphError, match="never sent"):
            check_graph(graph, num_invokes=2, constants=())


def test_a_generation_that_asks_for_gradients_is_refused() -> None:
    goes_on = (replace(INVOKES[0], generation=Generation(max_new_tokens=2)),)
    with pytest.raises(GraphError, match="a generation has no gradients") as caught:
        decode_request(file_of(request_of(READ, LOSS, replace(BACK, where="a.py:9"), invokes=goes_on)))
    assert caught.value.where == "a.py:9"


def loop(steps: int) -> Request:
    """A vector that is learnt: each step adds it at a layer, has a loss, and takes a step of Adam's size."""
    nodes: list[Node] = [Constant(name="c", where="learn.py:1")]
    vector = 0
    for step in range(steps):
        first = len(nodes)
        nodes += [
            Read(site=site(5), invoke=step, where="learn.py:4"),
            Op(name="add", args=(ref(first), ref(vector)), where="learn.py:4"),
            Write(site=site(5), invoke=step, value=ref(first + 1), in_place=True, where="learn.py:4"),
            Read(site=Site(module="lm_head", port=Port.OUTPUT), invoke=step, where="learn.py:5"),
            Op(name="getitem", args=(ref(first + 3), (slice(None), -1, 17)), where="learn.py:5"),
            Op(name="sum", args=(ref(first + 4),), where="learn.py:5"),
            Backward(loss=ref(first + 5), gradient=None, where="learn.py:6"),
            Grad(of=ref(vector), backward=ref(first + 6), where="learn.py:7"),
            Op(name="mul", args=(ref(first + 7), 0.1), where="learn.py:7"),
            Op(name="sub", args=(ref(vector), ref(first + 8)), where="learn.py:7"),
        ]
        vector = first + 9
    nodes.append(Save(name="0", value=ref(vector), where="learn.py:8"))
    return request_of(*nodes, invokes=INVOKES[:1] * steps)


def test_a_learning_loop_takes_the_room_of_a_step() -> None:
    small, large = loop(3), loop(100)
    assert decode_request(file_of(large)) == large
    assert len(file_of(large)) < len(file_of(small)) + 200 < 2_000
