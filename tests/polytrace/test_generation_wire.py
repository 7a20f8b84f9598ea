"""Generations as bytes: what travels comes back, what cannot be is refused, and a loop takes the room of its body."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytrace.certificate import Fired, Generated, Receipt, Token
from polytrace.codec import from_json, to_json
from polytrace.errors import GraphError, PolytraceError, TooLargeError, WireError
from polytrace.generation import MAX_SEQUENCES
from polytrace.grammar import check_graph
from polytrace.graph import (
    Carried,
    Generation,
    Graph,
    Invoke,
    Last,
    Mask,
    Node,
    NodeId,
    Op,
    Port,
    Read,
    Ref,
    Request,
    Sampling,
    Save,
    Site,
    Stop,
    Write,
    name_at,
)
from polytrace.timing import time_of
from polytrace.wire import decode_request, decode_result, encode_request, result_header, result_room
from tests.polytrace.damaged import damaged

TOKEN = Site(module="", port=Port.TOKEN)
STEPS = 6  # of the first invoke; the second has 3, the third does not go on
WAYS = st.builds(
    Generation,
    max_new_tokens=st.just(STEPS),
    sampling=st.builds(
        Sampling,
        do_sample=st.booleans(),
        temperature=st.floats(0.1, 9.0),
        top_k=st.integers(0, 2**31 - 1),
        top_p=st.floats(0.01, 1.0),
        min_p=st.floats(0.0, 1.0),
        repetition_penalty=st.floats(0.1, 9.0),
        seed=st.integers(0, 2**63 - 1),
    ),
    eos=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
)


def site(layer: int) -> Site:
    return Site(module=f"model.layers.{layer}", port=Port.OUTPUT)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Nodes of steps whose values are there when they are used, as a client records them."""
    way = draw(WAYS)
    invokes = (
        Invoke(sequences=((1, 2, 3), (4,)), generation=way),
        Invoke(sequences=((5,),), generation=replace(way, max_new_tokens=3)),
        Invoke(sequences=((6, 7),)),
    )
    limits = (STEPS, 3, 1)
    nodes: list[Node] = []
    kinds = ["read", "token", "op", "write", "save", "save once", "stop", "last", "mask", "loop"]
    for number in range(draw(st.integers(1, 14))):
        invoke = draw(st.integers(0, 2))
        step = draw(st.integers(0, limits[invoke] - 1))
        count = draw(st.integers(1, limits[invoke] - step))
        where = draw(st.sampled_from(["a.py:1", "a.py:2"]))
        value = Ref(NodeId(draw(st.integers(0, max(0, len(nodes) - 1)))))
        others = tuple(
            Ref(NodeId(draw(st.integers(0, max(0, len(nodes) - 1))))) for _ in range(draw(st.integers(1, 3)))
        )
        node: Node
        match draw(st.sampled_from(kinds)):
            case "read":
                node = Read(site=site(number % 3), invoke=invoke, where=where, step=step)
            case "loop":
                node = Read(site=site(number % 3), invoke=invoke, where=where, step=step, num_steps=count)
            case "token":
                node = Read(site=TOKEN, invoke=invoke, where=where, step=step)
            case "mask":
                node = Mask(invoke=invoke, where=where)
            case "op":
                node = Op(name="add", args=others, where=where)
            case "write":
                node = Write(
                    site=site(1), invoke=invoke, value=value, in_place=True, where=where, step=step, num_steps=count
                )
            case "save":
                name = draw(st.sampled_from(["0", "1"]))
                node = Save(name=name, value=value, where=where, step=step, num_steps=count)
            case "save once":
                node = Save(name=f"once {number}", value=value, where=where)
            case "stop":
                node = Stop(value=value, invoke=invoke, where=where, step=step, num_steps=count)
            case _:
                node = Last(values=others, where=where)
        request = Request(graph=Graph(nodes=(*nodes, node)), invokes=invokes, constants={})
        with contextlib.suppress(GraphError):
            decode_request(file_of(request))
            nodes.append(node)
    return Request(graph=Graph(nodes=tuple(nodes)), invokes=invokes, constants={})


def file_of(request: Request) -> bytes:
    return b"".join(encode_request(request))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests())
def test_a_generation_survives_its_file(request: Request) -> None:
    back = decode_request(file_of(request))
    assert back == request
    whens: list[Any] = []
    for node in back.graph.nodes:
        whens.append(time_of(node, lambda place: whens[place]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests(), data=st.data())
def test_any_json_in_place_of_a_part_of_a_generation_is_refused_cleanly(request: Request, data: st.DataObject) -> None:
    file = file_of(request)
    changed = damaged(file, data, ["generations", "templates", "order"], ["at", "last", "stop"])
    with contextlib.suppress(PolytraceError):
        decode_request(changed)


WAY = Generation(max_new_tokens=4)
GOES_ON = (Invoke(sequences=((1, 2),), generation=WAY), Invoke(sequences=((3,),)))
READ = Read(site=site(0), invoke=0, where="a.py:1", step=2)


def refused(*nodes: Node, invokes: tuple[Invoke, ...] = GOES_ON, kind: type[PolytraceError] = GraphError) -> str:
    with pytest.raises(kind) as caught:
        decode_request(file_of(Request(graph=Graph(nodes=nodes), invokes=invokes, constants={})))
    assert kind is WireError or caught.value.where == "a.py:9" or caught.value.where is None
    return str(caught.value)


def at(node: Any, **changes: Any) -> Any:
    return replace(node, where="a.py:9", **changes)


def test_steps_that_cannot_be_are_refused_with_the_line() -> None:
    value = Ref(NodeId(0))
    write = Write(site=site(1), invoke=0, value=value, in_place=True, where="a.py:9", step=2)
    save = Save(name="s", value=value, where="a.py:9", step=2)
    assert "there are 4, 0-3" in refused(at(READ, step=4))
    assert "steps 2-4" in refused(at(READ, num_steps=3))
    assert "there are 1, 0-0" in refused(at(READ, invoke=1, step=1))
    assert "no next token" in refused(at(READ, site=TOKEN, invoke=1, step=0))
    assert "only at step 2" in refused(READ, at(write, step=1))
    assert "only at step 2" in refused(READ, at(save, step=0))
    assert "only at step 2" in refused(READ, Stop(value=value, invoke=0, where="a.py:9", step=0))
    assert "two values are saved as 's@2'" in refused(READ, save, at(save))
    assert "saved at steps, and once too" in refused(READ, save, at(save, step=None))
    last = Last(values=(value,), where="a.py:9")
    assert "no value of one of its steps" in refused(READ, last, at(last, values=(Ref(NodeId(1)),)))
    assert "only at the end" in refused(READ, last, at(write, value=Ref(NodeId(1)), step=3))
    loop = at(READ, step=0, num_steps=3)
    other = at(READ, step=1, num_steps=3)
    add = Op(name="add", args=(value, Ref(NodeId(1))), where="a.py:9")
    assert "do not meet" in refused(loop, other, add)
    assert "recorded once for steps 0-2" in refused(loop, READ, add)
    assert "is a value of steps 0-2 and is saved once" in refused(loop, at(save, step=None))
    assert "no prompt of this request goes on" in refused(at(READ), invokes=(Invoke(sequences=((1,),)),) * 2)


def test_a_carried_value_is_never_sent() -> None:
    carried = Carried(shape=(1,), dtype="float32", stage=0, where="a.py:9")
    request = Request(graph=Graph(nodes=(carried,)), invokes=GOES_ON, constants={})
    with pytest.raises(TypeError, match="never sent"):
        encode_request(request)
    with pytest.raises(GraphError, match="never sent"):
        check_graph(request.graph, num_invokes=2, constants=())
    with pytest.raises(GraphError, match="the last of no values"):
        check_graph(Graph(nodes=(Last(values=(), where="a.py:9"),)), num_invokes=2, constants=())


@pytest.mark.parametrize(
    ("way", "told"),
    [
        (replace(WAY, max_new_tokens=0), "max_new_tokens is from 1"),
        (replace(WAY, sampling=Sampling(temperature=0.0)), "temperature"),
        (replace(WAY, sampling=Sampling(temperature=float("nan"))), "temperature"),
        (replace(WAY, sampling=Sampling(top_p=1.5)), "top_p"),
        (replace(WAY, sampling=Sampling(min_p=-0.1)), "min_p"),
        (replace(WAY, sampling=Sampling(top_k=-1)), "top_k"),
        (replace(WAY, sampling=Sampling(repetition_penalty=0.0)), "repetition_penalty"),
        (replace(WAY, sampling=Sampling(seed=1 << 63)), "seed"),
        (replace(WAY, eos=(-1,)), "eos"),
        (replace(WAY, eos=tuple(range(65))), "eos"),
        (replace(WAY, stop=("",)), "stop"),
        (replace(WAY, stop=("x" * 257,)), "stop"),
        (replace(WAY, logprobs=21), "logprobs"),
    ],
)
def test_numbers_that_cannot_be_are_refused(way: Generation, told: str) -> None:
    assert told in refused(invokes=(Invoke(sequences=((1,),), generation=way),), kind=WireError)


def test_all_steps_together_are_counted_before_they_are_made() -> None:
    long = Invoke(sequences=((1,),), generation=Generation(max_new_tokens=1000))
    read = replace(READ, where="a.py:9", step=0, num_steps=1000)
    request = Request(graph=Graph(nodes=(read,) * 2), invokes=(long,), constants={})
    assert decode_request(file_of(request), max_nodes=2000) == request
    with pytest.raises(TooLargeError, match="more than 1999 nodes"):
        decode_request(file_of(request), max_nodes=1999)
    several = Request(graph=Graph(nodes=()), invokes=(long,) * 3, constants={})
    with pytest.raises(TooLargeError, match="3000 new tokens in all; 2999 is the most"):
        decode_request(file_of(several), max_nodes=2999)


def test_sequences_that_go_on_are_counted_over_all_invokes() -> None:
    half = Invoke(sequences=((1,),) * (MAX_SEQUENCES // 2), generation=Generation(max_new_tokens=1))
    request = Request(graph=Graph(nodes=()), invokes=(half, half), constants={})
    assert decode_request(file_of(request)) == request
    one_more = replace(half, sequences=((1,),))
    told = f"{MAX_SEQUENCES + 1} sequences that go on .* {MAX_SEQUENCES} is the most: send it in several requests"
    with pytest.raises(TooLargeError, match=told):
        decode_request(file_of(replace(request, invokes=(half, half, one_more))))


def test_a_request_that_does_not_go_on_has_no_word_of_generation() -> None:
    request = Request(graph=Graph(nodes=(replace(READ, step=0),)), invokes=GOES_ON[1:], constants={})
    assert b"generation" not in file_of(request) and b'\\"at\\"' not in file_of(request)


def loop(steps: int, sites: int) -> Request:
    """A vector added at many sites, a running sum and a save at every step, all of it used behind the loop."""
    nodes: list[Node] = []
    totals: list[NodeId] = []
    tokens: list[NodeId] = []
    for step in range(steps):
        for layer in range(sites):
            first = len(nodes)
            nodes += [
                Read(site=site(layer), invoke=0, where="loop.py:3", step=step),
                Op(name="mul", args=(Ref(NodeId(first)), 0.5), where="loop.py:3"),
                Write(
                    site=site(layer),
                    invoke=0,
                    value=Ref(NodeId(first + 1)),
                    in_place=True,
                    where="loop.py:3",
                    step=step,
                ),
            ]
        first = len(nodes)
        nodes += [
            Read(site=TOKEN, invoke=0, where="loop.py:4", step=step),
            Save(name="0", value=Ref(NodeId(first)), where="loop.py:4", step=step),
        ]
        tokens.append(NodeId(first))
        before = totals[-1] if totals else tokens[-1]
        nodes.append(Op(name="add", args=(Ref(before), Ref(tokens[-1])), where="loop.py:5"))
        totals.append(NodeId(len(nodes) - 1))
    nodes.append(Last(values=tuple(Ref(total) for total in reversed(totals)), where="loop.py:6"))
    nodes += [Last(values=(Ref(token),), where="loop.py:7") for token in tokens]
    lasts = [Ref(NodeId(place)) for place, node in enumerate(nodes) if node.where == "loop.py:7"]
    nodes += [
        Op(name="stack", args=(lasts,), where="loop.py:8"),
        Save(name="1", value=Ref(NodeId(len(nodes))), where="loop.py:8"),
        Save(name="2", value=Ref(NodeId(len(nodes) - steps - 1)), where="loop.py:9"),
    ]
    invoke = Invoke(sequences=((1, 2),), generation=Generation(max_new_tokens=steps))
    return Request(graph=Graph(nodes=tuple(nodes)), invokes=(invoke,), constants={})


def test_a_loop_over_steps_takes_the_room_of_its_body() -> None:
    small, large = loop(4, 4), loop(64, 24)
    assert decode_request(file_of(large)) == large
    assert len(large.graph.nodes) > 4_700
    assert len(file_of(large)) < len(file_of(small)) + 1_800 < 4_000


def test_what_was_generated_comes_back_with_its_receipt(receipt_of_a_run: Receipt) -> None:
    likeliest = (((5, -0.1), (6, -2.5)),)
    generated = (
        Generated(invoke=0, sequence=0, ids=(5,), finish="eos", logprobs=(-0.1,), likeliest=likeliest),
        Generated(invoke=0, sequence=1, ids=(7, 8), finish="length"),
    )
    fired = (
        Fired(site="m.output", invoke=0, kind="read", passes=2, where="a.py:1", steps=1, of_steps=64),
        Fired(site="m.output", invoke=1, kind="write", passes=2, where="a.py:1", steps=64, of_steps=64),
    )
    receipt = replace(receipt_of_a_run, generated=generated, fired=fired)
    header = result_header((), receipt, 8192)
    assert decode_result(header)[1] == receipt
    token = Token(invoke=0, sequence=0, step=1, id=5, logprob=-0.1, likeliest=likeliest[0], finish="eos")
    assert from_json(Token, json.loads(json.dumps(to_json(token)))) == token
    assert "fired at 1 of 64 steps" in str(fired[0])


def test_there_is_room_for_all_that_a_receipt_may_tell_of_new_tokens(receipt_of_a_run: Receipt) -> None:
    way = Generation(max_new_tokens=50, logprobs=3)
    invokes = (Invoke(sequences=((1,),) * 4, generation=way),)
    told = (2**31 - 1, -1.2345678901234567e-100)
    generated = tuple(
        Generated(
            invoke=0,
            sequence=number,
            ids=(2**31 - 1,) * 50,
            finish="length",
            logprobs=(told[1],) * 50,
            likeliest=((told,) * 3,) * 50,
        )
        for number in range(4)
    )
    nodes = tuple(replace(READ, step=step, num_steps=1) for step in range(50))
    fired = tuple(
        Fired(site=str(site(0)), invoke=0, kind="write in place", passes=50 + n, where="a.py:1", steps=n, of_steps=50)
        for n in range(50)
    )
    receipt = replace(receipt_of_a_run, generated=generated, fired=fired)
    room = result_room((), Graph(nodes=nodes), invokes=invokes)
    assert decode_result(result_header((), receipt, room))[1] == receipt
    assert name_at("0", 3) == "0@3"
