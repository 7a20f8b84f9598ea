from __future__ import annotations

import contextlib
import json
import math
import random
import re
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytrace.certificate import Fired, PassEntry, Receipt
from polytrace.errors import GraphError, WireError
from polytrace.graph import (
    Call,
    Constant,
    DType,
    Graph,
    Invoke,
    Mask,
    Node,
    NodeId,
    Op,
    Options,
    Parameter,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Sharing,
    Site,
    Write,
)
from polytrace.tensors import DTYPES, RawTensor, num_bytes
from polytrace.wire import decode_request, decode_result, encode_request, result_header, result_room

texts = st.text(max_size=8) | st.from_regex(r"[a-z.]{0,3}(00?|7|12)[a-z0-9.{}]{0,6}", fullmatch=True)
names = (st.text(min_size=1, max_size=12) | st.from_regex(r"c[0-9]{1,3}", fullmatch=True)).filter(
    lambda name: name != "__metadata__"
)
counts = st.integers(0, 2**31 - 1)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(sorted(DTYPES)).map(DType),
    st.just(Ellipsis),
    st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.none() | st.integers(1, 3)),
)


PROMPTS = st.lists(st.lists(counts, min_size=1, max_size=3), min_size=1, max_size=2)
OPERANDS: st.SearchStrategy[Any] = st.recursive(
    scalars | st.integers(0, 99).map(lambda number: Ref(NodeId(number))),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)
SITES = st.builds(
    Site,
    module=texts,
    port=st.sampled_from([port for port in Port if port is not Port.TOKEN]),  # which needs a generation
    selector=st.lists(st.text(max_size=4) | st.integers(0, 5), max_size=3).map(tuple),
    visit=st.integers(0, 2),
)


def earlier(operand: Any, valued: list[Ref]) -> Any:
    """An operand whose references are to nodes that have values."""
    if isinstance(operand, Ref):
        return valued[operand.node % len(valued)] if valued else None
    if isinstance(operand, (tuple, list)):
        return type(operand)(earlier(part, valued) for part in operand)
    return operand


@st.composite
def tensors(draw: st.DrawFn) -> RawTensor:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = num_bytes(dtype, shape)
    return RawTensor(dtype=dtype, shape=shape, data=memoryview(draw(st.binary(min_size=size, max_size=size))))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Every kind of node, over few prompts and constants. Plain draws: strategies made anew for each node are slow."""
    constants = draw(st.dictionaries(names, tensors(), max_size=2))
    invokes = tuple(
        Invoke(sequences=tuple(tuple(sequence) for sequence in draw(PROMPTS))) for _ in range(draw(st.integers(1, 2)))
    )
    nodes: list[Node] = []
    valued: list[Ref] = []
    leaves = ["read", "mask", "parameter", *(["constant"] if constants else [])]
    for number in range(draw(st.integers(0, 6))):
        if nodes and draw(st.booleans()):  # the same once more, as in a loop
            last = nodes[-1]
            nodes.append(replace(last, name=f"again {number}") if isinstance(last, Save) else last)
            if not isinstance(last, (Write, Save)):
                valued.append(Ref(NodeId(number)))
            continue
        where = draw(st.sampled_from(["experiment.py:12", "<ipython>:3", "é.py:1"]))
        invoke = draw(st.integers(0, len(invokes) - 1))
        kind = draw(st.sampled_from([*leaves, *(["write", "save", "call", "op", "sum", "getitem"] if valued else [])]))
        ref = draw(st.sampled_from(valued)) if valued else Ref(NodeId(0))
        node: Node
        match kind:
            case "read":
                node = Read(site=draw(SITES), invoke=invoke, where=where)
            case "mask":
                node = Mask(invoke=invoke, where=where)
            case "parameter":
                node = Parameter(path=draw(texts), where=where)
            case "constant":
                node = Constant(name=draw(st.sampled_from(sorted(constants))), where=where)
            case "write":
                node = Write(site=draw(SITES), invoke=invoke, value=ref, in_place=draw(st.booleans()), where=where)
            case "save":
                node = Save(name=f"save {number}", value=ref, where=where)
            case "call":
                node = Call(module=draw(texts), args=(ref,), where=where)
            case "sum":
                node = Op(name="sum", args=(ref,), kwargs={"dim": (0, 1)}, where=where)
            case "getitem":
                node = Op(name="getitem", args=(ref, earlier(draw(OPERANDS), valued)), where=where)
            case _:
                args = [earlier(draw(OPERANDS), valued) for _ in range(draw(st.integers(1, 3)))]
                node = Op(name=draw(st.sampled_from(["add", "where", "cat"])), args=tuple(args), where=where)
        if not isinstance(node, (Write, Save)):
            valued.append(Ref(NodeId(number)))
        nodes.append(node)
    return Request(
        graph=Graph(nodes=tuple(nodes)),
        invokes=invokes,
        constants=constants,
        options=Options(seed=draw(st.integers(0, 2**63 - 1)), sharing=draw(st.sampled_from(Sharing))),
    )


def file_of(request: Request) -> bytes:
    return b"".join(encode_request(request))


SMALL = Request(
    graph=Graph(
        nodes=(
            Read(site=Site(module="model.layers.5", port=Port.OUTPUT), invoke=0, where="a.py:1"),
            Constant(name="c", where="a.py:2"),
            Op(name="add", args=(Ref(NodeId(0)), Ref(NodeId(1))), where="a.py:3"),
            Save(name="s", value=Ref(NodeId(2)), where="a.py:3"),
        )
    ),
    invokes=(Invoke(sequences=((1, 2, 3), (4,))),),
    constants={"c": RawTensor(dtype="float32", shape=(2,), data=memoryview(b"12345678"))},
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests())
def test_a_request_survives_its_file(request: Request) -> None:
    back = decode_request(file_of(request))
    assert repr(back.graph) == repr(request.graph)  # by text: nan is not itself
    assert back.invokes == request.invokes
    assert back.options == request.options
    assert back.constants == dict(request.constants)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests(), data=st.data())
def test_damaged_bytes_give_a_wire_or_graph_error_or_a_request(request: Request, data: st.DataObject) -> None:
    damaged = bytearray(file_of(request))
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "splice"]))
        place = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        if kind == "cut":
            del damaged[place:]
        elif kind == "flip" and damaged:
            damaged[place] = data.draw(st.integers(0, 255))
        else:
            damaged[place:place] = data.draw(
                st.sampled_from([b"[", b"{", b'"', b"-1", b"null", b"1e999", b"NaN", b"\\ud800"])
            )
    with contextlib.suppress(WireError, GraphError):
        decode_request(bytes(damaged))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests(), data=st.data())
def test_any_json_in_place_of_a_part_is_refused_cleanly(request: Request, data: st.DataObject) -> None:
    file = file_of(request)
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    body = json.loads(header["__metadata__"]["request"])
    junk = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ref", "tuple", "slice", "x"]), inner)
        ),
        max_leaves=5,
    )
    spot: Any = body
    while True:
        key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
        if not isinstance(spot[key], (dict, list)) or not spot[key] or data.draw(st.booleans()):
            break
        spot = spot[key]
    spot[key] = data.draw(junk)
    header["__metadata__"]["request"] = json.dumps(body)
    text = json.dumps(header).encode()
    with contextlib.suppress(WireError, GraphError):
        decode_request(struct.pack("<Q", len(text)) + text + file[8 + length :])


@given(st.binary(max_size=64))
def test_random_bytes_are_never_a_request(noise: bytes) -> None:
    with pytest.raises(WireError):
        decode_request(noise)
    with pytest.raises(WireError):
        decode_result(noise)


def test_every_cut_of_a_request_is_refused() -> None:
    file = file_of(SMALL)
    for stop in range(len(file)):
        with pytest.raises(WireError):
            decode_request(file[:stop])


def test_constants_are_views_of_the_buffer() -> None:
    buffer = bytearray(file_of(SMALL))
    constant = decode_request(buffer).constants["c"]
    buffer[-1] = 0
    assert bytes(constant.data) == b"1234567\0"


def test_an_official_reader_reads_a_request() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    assert safetensors.load(file_of(SMALL))["c"].tobytes() == b"12345678"


def test_a_huge_header_length_takes_no_memory() -> None:
    with pytest.raises(WireError, match="at most"):
        decode_request(struct.pack("<Q", 2**60) + b"{}")


def test_deep_nesting_is_refused() -> None:
    text = b"[" * 100_000
    with pytest.raises(WireError):
        decode_request(struct.pack("<Q", len(text)) + text)


def test_another_schema_version_is_named() -> None:
    with pytest.raises(WireError, match="version '1'; version 2 is spoken here"):
        decode_request(file_of(SMALL).replace(b'"polytrace":"2"', b'"polytrace":"1"'))


def test_too_many_nodes_are_refused_with_the_number() -> None:
    with pytest.raises(WireError, match="4 nodes; at most 3"):
        decode_request(file_of(SMALL), max_nodes=3)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (Op(name="softmux", args=(Ref(NodeId(0)),), where="a.py:9"), "no operation 'softmux'; did you mean softmax"),
        (Op(name="sum", args=(Ref(NodeId(0)),), kwargs={"dims": 1}, where="a.py:9"), "no argument dims.*mean dim"),
        (Op(name="sum", args=(Ref(NodeId(4)),), where="a.py:9"), "not before it"),
        (Op(name="sum", args=(Ref(NodeId(3)),), where="a.py:9"), "has no value"),
        (Op(name="item", args=(Ref(NodeId(0)), 0), where="a.py:9"), "returns several values"),
        (Op(name="to", args=(Ref(NodeId(0)), DType("float99")), where="a.py:9"), "no dtype 'float99'"),
        (Op(name="set_view", args=(Ref(NodeId(0)), (("exp", (), ()),), 1), where="a.py:9"), "'exp' is not an op"),
        (Read(site=Site(module="m", port=Port.INPUT), invoke=1, where="a.py:9"), "no invoke 1"),
        (Constant(name="d", where="a.py:9"), "no constant 'd'"),
        (Save(name="s", value=Ref(NodeId(0)), where="a.py:9"), "saved as 's'"),
    ],
)
def test_a_graph_that_is_not_well_formed_names_the_line(node: Node, message: str) -> None:
    graph = Graph(nodes=(*SMALL.graph.nodes, node))
    request = Request(graph=graph, invokes=SMALL.invokes, constants=SMALL.constants)
    with pytest.raises(GraphError, match=message) as caught:
        decode_request(file_of(request))
    assert caught.value.where == "a.py:9"


def sweep(num_layers: int, num_positions: int, *, prompts: int = 1) -> Request:
    """Every layer x position of a clean run patched into another: one invoke each."""
    nodes: list[Node] = [
        Read(site=Site(module=f"model.layers.{layer}", port=Port.OUTPUT), invoke=0, where="patch.py:4")
        for layer in range(num_layers)
    ]
    invokes = [Invoke(sequences=(tuple(range(100, 100 + num_positions)),))]
    for number in range(num_layers * num_positions):
        layer, position = divmod(number, num_positions)
        invokes.append(
            Invoke(sequences=(tuple(range(200 + number % prompts, 200 + number % prompts + num_positions)),))
        )
        site, first = Site(module=f"model.layers.{layer}", port=Port.OUTPUT), len(nodes)
        index = (slice(None), position)
        nodes += [
            Op(name="getitem", args=(Ref(NodeId(layer)), index), where="patch.py:8"),
            Read(site=site, invoke=number + 1, where="patch.py:8"),
            Op(name="setitem", args=(Ref(NodeId(first + 1)), index, Ref(NodeId(first))), where="patch.py:8"),
            Write(site=site, invoke=number + 1, value=Ref(NodeId(first + 2)), in_place=True, where="patch.py:8"),
            Read(site=Site(module="lm_head", port=Port.OUTPUT), invoke=number + 1, where="patch.py:9"),
            Op(name="getitem", args=(Ref(NodeId(first + 4)), (slice(None), -1)), where="patch.py:9"),
            Op(name="mul", args=(Ref(NodeId(first + 5)), 0.1 * (number % 7)), where="patch.py:10"),
            Save(name=str(number), value=Ref(NodeId(first + 6)), where="patch.py:10"),
        ]
    return Request(graph=Graph(nodes=tuple(nodes)), invokes=tuple(invokes), constants={})


def test_a_sweep_takes_the_room_of_its_body() -> None:
    small, large = sweep(4, 8), sweep(32, 64)
    assert len(file_of(small)) < 2_000
    assert len(file_of(large)) < 3_000  # 2,048 invokes
    assert decode_request(file_of(large)) == large


def test_a_sweep_over_chosen_positions_takes_a_few_bytes_an_invoke() -> None:
    whole = sweep(16, 64)
    nodes = list(whole.graph.nodes)
    for place in range(16, len(nodes), 8):
        index = (slice(None), place * 7919 % 61)
        for number, args in ((place, nodes[place].args[:1]), (place + 2, nodes[place + 2].args)):  # type: ignore[union-attr]
            name, where = nodes[number].name, nodes[number].where  # type: ignore[union-attr]
            nodes[number] = Op(name=name, args=(args[0], index, *args[2:]), where=where)
    request = Request(graph=Graph(nodes=tuple(nodes)), invokes=whole.invokes, constants={})
    assert decode_request(file_of(request)) == request
    assert len(file_of(request)) / 1024 < 8


def test_prompts_that_repeat_are_sent_once_and_come_back_as_one_object() -> None:
    request = sweep(8, 64, prompts=3)
    back = decode_request(file_of(request))
    assert back == request
    assert len({id(invoke) for invoke in back.invokes}) == 4
    assert len(file_of(request)) < 4_000


def body_of(file: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["request"])


def refusal_of(body: dict[str, Any], header: dict[str, Any], **limits: int) -> str:
    header["__metadata__"]["request"] = json.dumps(body)
    text = json.dumps(header).encode()
    with pytest.raises((WireError, GraphError)) as caught:
        decode_request(struct.pack("<Q", len(text)) + text, **limits)
    return caught.value.message


def test_a_few_bytes_do_not_unfold_into_more_than_the_limit() -> None:
    header, body = body_of(file_of(sweep(4, 8)))
    long = body | {"order": [[1 << 40, [1 << 40, 0]]]}
    assert "more than 4611686018427387904 values" in refusal_of(long, header)
    long = body | {"order": [[1 << 20, [1 << 20, 0]]]}
    assert f"{1 << 40} nodes; at most 1000000" in refusal_of(long, header)
    assert "more than 40 values" in refusal_of(body | {"invokes": [[[21, 1, 1]], 0]}, header, max_nodes=40)
    assert "80 prompts; at most 40" in refusal_of(body | {"invokes": [[[8, 10]], 0]}, header, max_nodes=40)
    many = [[["op", 0, "cat", [[{"ref": 0}] * 1000], {}], [{"back": [0, 1]}] * 1000]]
    assert "more than 320 operands" in refusal_of(body | {"templates": many, "order": [[2, 0]]}, header, max_nodes=40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": [[0, 0]]}, "a repeat is a count"),
        ({"order": [[3]]}, "a repeat is a count"),
        ({"order": [7]}, "7 does not belong"),
        ({"order": [[1, [1, [1, [1, [1, [1, 0]]]]]]]}, "repeats nest deeper"),
        ({"order": 0}, "a folded sequence is a list"),
        ({"order": []}, "template 0 has no node"),
        ({"templates": [[["mask", 0]]]}, "not a node with holes and its columns"),
        ({"templates": [[["mask", 0], []]]}, "more holes than columns"),
        ({"templates": [[["mask", 0], [0, 0]]]}, "more columns than holes"),
        ({"templates": [[["mask", 1], [0]]]}, "index 1 is beyond a table of 1"),
        ({"templates": [[["mask", 0], [[0, 0]]]]}, "more than 1 values"),
        ({"templates": [[["mask", 0], [[]]]]}, "0 values where 1 belong"),
        ({"templates": [[["mask", 0], [-1]]]}, "-1 stands in a column of integers from 0"),
        ({"templates": [[["mask", 0], [{"steps": [True]}]]]}, "True does not belong"),
        ({"templates": [[["mask", 0], [{"step": [0]}]]]}, "a folded sequence is a list"),
        ({"templates": [[["mask", 0], ["0"]]]}, "a folded sequence is a list"),
        ({"templates": [[["wait", 0], [0]]]}, "'wait' with 0 parts is not a node"),
        ({"templates": [[["mask"], [0]]]}, "a node is a list"),
        ({"templates": [[["constant", 0, ["c", "", ""]], [1, 1 << 30]]]}, "stands in a column of integers"),
        ({"templates": [[["constant", 0, []], []]]}, "a path or name is a list"),
        ({"templates": [[["constant", 0, ["c" * 5000]], []]]}, "more than 4096 characters"),
        ({"templates": [[["read", 0, [["m"], "side", [], 0]], [0]]]}, "is not a site"),
        ({"templates": [[["op", 0, "exp", [1], {}], [0]]]}, "1 is not an operand"),
        ({"templates": [[["op", 0, "exp", [0.0], {}], [["1"]]]]}, "'1' does not belong"),
        ({"templates": [[["op", 0, "exp", [{"slice": [0, 0.0, None]}], {}], [0, ["1.0"]]]]}, "a part of a slice"),
        ({"templates": [[["op", 0, "exp", [{"ref": 0}], {}], [{"back": 1}]]]}, "not before it"),
        ({"prompts": [[1, True]]}, "prompt 0 has a token"),
        ({"prompts": [[]]}, "prompt 0 has no tokens"),
        ({"invokes": [[0], 0]}, "0 does not belong"),
        ({"invokes": [[2], [0, 1]]}, "1 stands in a column of integers from 0 to 0"),
    ],
)
def test_what_is_no_template_or_column_is_refused(changes: dict[str, Any], message: str) -> None:
    header, body = body_of(file_of(Request(graph=Graph(nodes=(MASK,)), invokes=SMALL.invokes[:1], constants={})))
    body["prompts"], body["invokes"] = [[1, 2]], [[1], 0]
    assert re.search(message, refusal_of(body | changes, header))


MASK = Mask(invoke=0, where="a.py:1")


@dataclass(frozen=True)
class Shaped:
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Slot:
    name: str
    facts: Shaped
    offset: int


def receipt(**changes: Any) -> Receipt:
    fields: dict[str, Any] = {
        "request": "r1",
        "model": "m",
        "passes": (PassEntry(pass_id=1, requests=2, tokens=30, layer_rows=(30, 17), seconds=math.inf),),
        "tokens": 4,
        "token_layers": 8,
        "token_layers_alone": 16,
        "fired": (Fired(site="model.layers.5.output", invoke=0, kind="read", passes=1, where="a.py:1"),),
        "pad_rows_written": 0,
        "read_bytes": 10,
        "result_bytes": 8,
        "carried_bytes": 0,
        "gathered_bytes": 0,
        "queue_seconds": 0.5,
        "run_seconds": 0.25,
        "notes": (),
    }
    return Receipt(**fields | changes)


SLOTS = [Slot("a", Shaped((2,), "float32"), 0), Slot("b", Shaped((1, 3), "uint8"), 64)]


def test_a_result_survives_its_file() -> None:
    room = result_room(SLOTS, SMALL.graph)
    header = result_header(SLOTS, receipt(), room)
    assert len(header) == room and room % 64 == 0
    data = np.arange(2, dtype=np.float32).tobytes().ljust(64, b"\0") + b"xyz"
    values, back = decode_result(header + data)
    assert back == receipt()
    assert values["a"].shape == (2,) and bytes(values["b"].data) == b"xyz"


def events(count: int, *, seed: int = 0) -> tuple[Fired, ...]:
    """What nothing repeats in, as far as the few sites and lines of a graph let it."""
    chosen = random.Random(seed)
    return tuple(
        Fired(
            site=f"model.layers.{chosen.randrange(3)}.output",
            invoke=chosen.randrange(1_000_000),
            kind=chosen.choice(["read", "write", "write in place"]),
            passes=chosen.randrange(99_999),
            where=f"é.py:{chosen.randrange(2)}",
        )
        for _ in range(count)
    )


def test_a_receipt_that_does_not_fit_says_so() -> None:
    room = result_room(SLOTS, SMALL.graph)
    _, back = decode_result(result_header(SLOTS, receipt(fired=events(5000)), room) + bytes(67))
    assert back.fired == () and "did not fit" in back.notes[0]


def test_the_room_for_a_result_suffices_when_everything_fires() -> None:
    sites = [Site(module=f"model.layers.{layer}", port=Port.OUTPUT) for layer in range(3)]
    write = {"value": Ref(NodeId(0)), "invoke": 0}
    nodes: list[Node] = []
    for site in sites:
        for where in ("é.py:0", "é.py:1"):
            nodes += [Read(site=site, invoke=0, where=where)] * 167
            nodes += [Write(site=site, in_place=in_place, where=where, **write) for in_place in (True, False)] * 167
    room = result_room(SLOTS, Graph(nodes=tuple(nodes)))
    fired = events(len(nodes))
    _, back = decode_result(result_header(SLOTS, receipt(fired=fired), room) + bytes(67))
    assert back.fired == fired


def test_what_fired_in_a_sweep_takes_the_room_of_its_body() -> None:
    request = sweep(16, 64)
    fired = tuple(
        Fired(site=str(node.site), invoke=node.invoke, kind="read", passes=1, where=node.where)
        for node in request.graph.nodes
        if isinstance(node, (Read, Write))
    )
    header = result_header(SLOTS, receipt(fired=fired), result_room(SLOTS, request.graph))
    assert len(header.rstrip()) < 6_000
    assert decode_result(header + bytes(67))[1].fired == fired


@pytest.mark.parametrize(
    "fired",
    [
        None,
        [],
        {"forms": [], "order": [], "invokes": []},
        {"forms": [["s", "read"]], "order": [0], "invokes": 0, "passes": 1},
        {"forms": [["s", "read", 1]], "order": [0], "invokes": 0, "passes": 1},
        {"forms": [["s", "read", "w"]], "order": [1], "invokes": 0, "passes": 1},
        {"forms": [["s", "read", "w"]], "order": [[1 << 40, 0]], "invokes": 0, "passes": 1},
        {"forms": [["s", "read", "w"]], "order": [0], "invokes": [0, 0], "passes": 1},
        {"forms": [["s", "read", "w"]], "order": [0], "invokes": -1, "passes": 1},
    ],
)
def test_a_receipt_with_another_list_of_what_fired_is_refused(fired: Any) -> None:
    file = result_header(SLOTS, receipt(), result_room(SLOTS, SMALL.graph)) + bytes(67)
    (length,) = struct.unpack("<Q", file[:8])
    header = json.loads(file[8 : 8 + length])
    body = json.loads(header["__metadata__"]["result"]) | {"fired": fired}
    header["__metadata__"]["result"] = json.dumps(body)
    text = json.dumps(header).encode()
    with pytest.raises(WireError):
        decode_result(struct.pack("<Q", len(text)) + text + bytes(67))
