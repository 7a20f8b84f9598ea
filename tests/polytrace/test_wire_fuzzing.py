"""Files that somebody has broken or made to break: what comes out of the decoders is a request, or our own words on why
not, and it takes no more memory than the limits say.

POLYTRACE_FUZZ=100000 before pytest looks far longer, each time at other examples.
"""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from fuzzing import JSON, broken_files, with_header
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytrace.edits.sets import decode_edits
from polytrace.errors import GraphError, WireError
from polytrace.graph import (
    Backward,
    Constant,
    DType,
    Generation,
    Grad,
    Graph,
    Invoke,
    KeptSave,
    Mask,
    Node,
    NodeId,
    Op,
    Parameter,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Site,
    Stop,
    Write,
)
from polytrace.tensors import RawTensor
from polytrace.wire import MAX_HEADER_BYTES, decode_content, decode_request, decode_result, encode_request

EXAMPLES = int(os.environ.get("POLYTRACE_FUZZ", "0"))
MAX_NODES = 1000
search = settings(
    max_examples=EXAMPLES or 150,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def ref(place: int) -> Ref:
    return Ref(NodeId(place))


def site(layer: int, port: Port = Port.OUTPUT) -> Site:
    return Site(module=f"model.layers.{layer}", port=port)


def seed(*nodes: Node, **of_request: Any) -> bytes:
    prompts = Invoke(sequences=((1, 2, 3), (4, 5)))
    constants = {"c": RawTensor(dtype="float32", shape=(2,), data=memoryview(b"12345678"))}
    fields = {"invokes": (prompts,), "constants": constants} | of_request
    return b"".join(encode_request(Request(graph=Graph(nodes=nodes), **fields), stored=fields.pop("stored", ())))


STORED = RawTensor(dtype="int64", shape=(3,), data=memoryview(b""), digest="a" * 64)
STATE = RawTensor(dtype="int64", shape=(3,), data=memoryview(b""), state="mine")
SEEDS = [
    seed(
        *(Read(site=site(layer), invoke=0, where="a.py:1") for layer in range(12)),
        Constant(name="c", where="a.py:2"),
        Parameter(path="lm_head.weight", where="a.py:2"),
        Mask(invoke=0, where="a.py:2"),
        *(Op(name="mul", args=(ref(layer), 0.5 * layer), where="a.py:3") for layer in range(12)),
        Op(name="getitem", args=(ref(0), (slice(None), -1, Ellipsis)), where="a.py:4"),
        Op(name="to", args=(ref(0), DType("float64")), where="a.py:4"),
        Write(site=site(3), invoke=0, value=ref(15), in_place=True, where="a.py:5"),
        Save(name="out", value=ref(15), where="a.py:6"),
    ),
    seed(
        Read(site=site(0), invoke=0, where="a.py:1"),
        Op(name="sum", args=(ref(0),), kwargs={"dim": -1}, where="a.py:2"),
        Op(name="sum", args=(ref(1),), where="a.py:2"),
        Backward(loss=ref(2), gradient=None, where="a.py:3"),
        Grad(of=ref(0), backward=ref(3), where="a.py:4"),
        Save(name="grad", value=ref(4), where="a.py:5"),
        keeps=(KeptSave(save="grad", name="mean", is_state=False, ttl_s=60.0),),
    ),
    seed(
        Read(site=site(1), invoke=0, where="a.py:1", num_steps=4),
        Op(name="sum", args=(ref(0),), where="a.py:2"),
        Stop(value=ref(1), invoke=0, where="a.py:3", num_steps=4),
        Save(name="steps", value=ref(0), where="a.py:4", step=0, num_steps=4),
        invokes=(Invoke(sequences=((1, 2),), generation=Generation(max_new_tokens=4, eos=(2,), stop=("a",))),),
    ),
    seed(
        Constant(name="s", where="a.py:1"),
        Constant(name="t", where="a.py:1"),
        Save(name="out", value=ref(0), where="a.py:2"),
        constants={"s": STORED, "t": STATE},
    ),
]


def told_or_taken(decode: Callable[[], Any]) -> Any:
    """What is decoded; None when it is refused, in words that a person reads."""
    try:
        return decode()
    except (WireError, GraphError) as refused:
        error = refused
    assert 5 < len(error.message) < 2_000 and error.message.isprintable(), error.message
    assert json.dumps(error.to_fields()).encode()
    return None


def test_what_the_search_begins_with_is_taken() -> None:
    for file in SEEDS:
        assert decode_request(file, max_nodes=MAX_NODES).graph.nodes


@search
@given(st.sampled_from(SEEDS).flatmap(broken_files))
def test_of_a_broken_request_nothing_else_comes_out(file: bytes) -> None:
    request = told_or_taken(lambda: decode_request(file, max_nodes=MAX_NODES))
    if request is not None:
        assert len(request.graph.nodes) <= MAX_NODES
        again = b"".join(encode_request(request))
        assert decode_request(again, max_nodes=MAX_NODES).graph == request.graph, "what is taken means one thing"


@search
@given(st.sampled_from(SEEDS).flatmap(broken_files), st.sampled_from(["result", "content", "edits", "request"]))
def test_of_a_file_of_another_kind_nothing_else_comes_out(file: bytes, kind: str) -> None:
    length, rest = file[:8], file[8:].replace(b'"request":', b'"' + kind.encode() + b'":', 1)
    if len(length) == 8:
        grown = (int.from_bytes(length, "little") + 8 + len(rest) - len(file)) % (1 << 64)
        file = struct.pack("<Q", grown) + rest
    told_or_taken(lambda: decode_result(file))
    told_or_taken(lambda: decode_content(file))
    told_or_taken(lambda: decode_edits(file, "name", max_nodes=MAX_NODES))


@search
@given(st.dictionaries(st.sampled_from(["templates", "order", "wheres", "prompts", "invokes", "stored"]), JSON))
def test_of_any_json_in_the_place_of_parts_nothing_else_comes_out(parts: dict[str, Any]) -> None:
    header = json.loads(SEEDS[0][8 : 8 + struct.unpack("<Q", SEEDS[0][:8])[0]])
    header["__metadata__"]["request"] = json.dumps(json.loads(header["__metadata__"]["request"]) | parts)
    told_or_taken(lambda: decode_request(with_header(SEEDS[0], header), max_nodes=MAX_NODES))


# --- bombs


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header_with(**tensors: Any) -> bytes:
    """The first of the seeds with these among its tensors, and 8 bytes of data."""
    header = json.loads(SEEDS[0][8 : 8 + struct.unpack("<Q", SEEDS[0][:8])[0]])
    return with_header(SEEDS[0], header | tensors)


BOMBS = {
    "a length of 2**64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length beyond the file": struct.pack("<Q", MAX_HEADER_BYTES) + b"{}",
    "a length beyond the limit": struct.pack("<Q", MAX_HEADER_BYTES + 1) + b" " * 1000,
    "a length of nothing": struct.pack("<Q", 0) + b"{}",
    "a shape of 2**200 elements": header_with(d=entry(shape=[1 << 40] * 5, offsets=[0, 8])),
    "a shape beyond 64 bits": header_with(d=entry(shape=[1 << 64])),
    "a shape that overflows to 8 bytes": header_with(d=entry(shape=[(1 << 62) + 2])),
    "a negative shape": header_with(d=entry(shape=[-2])),
    "a shape of a thousand dimensions": header_with(d=entry(shape=[1] * 1000 + [2])),
    "a shape of truth": header_with(d=entry(shape=[True, 2])),
    "a shape of fractions": header_with(d=entry(shape=[2.0])),
    "offsets beyond the data": header_with(d=entry(shape=[4], offsets=[0, 16])),
    "offsets far beyond the data": header_with(d=entry(shape=[1 << 47], offsets=[0, 1 << 49])),
    "offsets in the wrong order": header_with(d=entry(offsets=[8, 0])),
    "negative offsets": header_with(d=entry(offsets=[-8, 0])),
    "one offset": header_with(d=entry(offsets=[8])),
    "offsets as text": header_with(d=entry(offsets=["0", "8"])),
    "no dtype of ours": header_with(d=entry(dtype="F4_E2M1")),
    "a dtype that is a list": header_with(d=entry(dtype=["F32"])),
    "an entry that is a list": header_with(d=[1, 2]),
    "something more in an entry": header_with(d=entry() | {"pickle": "x"}),
    "a name twice": SEEDS[0].replace(b'"__metadata__":', b'"c": {}, "__metadata__":', 1),
    "infinity": SEEDS[0].replace(b'"dtype"', b'"x": Infinity, "dtype"', 1),
    "deep lists": with_header(SEEDS[0], "[" * 100_000),
    "deep objects": with_header(SEEDS[0], '{"a":' * 100_000),
    "a number of a million digits": with_header(SEEDS[0], '{"__metadata__": ' + "9" * 1_000_000 + "}"),
    "no text": struct.pack("<Q", 4) + b"\xff\xfe{}",
}


@pytest.mark.parametrize("file", [*BOMBS.values()], ids=[*BOMBS])
def test_a_bomb_is_refused_and_takes_no_memory(file: bytes) -> None:
    tracemalloc.start()
    try:
        for decode in (decode_request, decode_result, decode_content):
            with pytest.raises((WireError, GraphError)) as refused:
                decode(file)
            assert len(refused.value.message) < 500
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_tensors_that_overlap_are_refused() -> None:
    """Safetensors' own reader refuses them, and holes between them too."""
    with pytest.raises(WireError, match="overlap"):
        decode_request(header_with(d=entry()))


def test_numbers_that_are_none_are_data_where_a_tensor_may_have_them() -> None:
    data = struct.pack("<2f", float("nan"), float("-inf"))
    constants = {"c": RawTensor(dtype="float32", shape=(2,), data=memoryview(data))}
    op = Op(name="mul", args=(ref(0), float("nan")), where="a.py:1")
    file = seed(
        Constant(name="c", where="a.py:1"), op, Save(name="o", value=ref(1), where="a.py:1"), constants=constants
    )
    request = decode_request(file)
    assert bytes(request.constants["c"].data) == data
    assert str(request.graph.nodes[1].args[1]) == "nan"  # type: ignore[union-attr]
    assert b"NaN" not in file, "strict JSON"
