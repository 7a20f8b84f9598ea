"""Arguments of calls as data: they travel whole, and what is malformed is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytrace.errors import WireError
from polytrace.given import given_names, structure_of
from polytrace.given_json import asked, decode_inputs, encode_inputs, inputs_from_json, inputs_to_json, question
from polytrace.graph import Device, DType, Given, Graph, Inputs, Invoke, Request
from polytrace.tensors import RawTensor
from polytrace.wire import decode_request, encode_request

NAMES = ("c0", "c1")
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 40), 1 << 40)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from([Given("c0"), Given("c1"), DType("float16"), Device("cuda:1"), Device("cpu")])
    | st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none() | st.integers())
    | st.builds(range, st.integers(), st.integers(), st.integers(1))
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
CALLS = st.builds(
    lambda args, kwargs: Inputs(args=tuple(args), kwargs=kwargs),
    st.lists(VALUES, max_size=3),
    st.dictionaries(st.text(min_size=1, max_size=4), VALUES, max_size=3),
)


def raw(dtype: str = "float32", shape: tuple[int, ...] = (2,), data: bytes = bytes(8)) -> RawTensor:
    return RawTensor(dtype=dtype, shape=shape, data=memoryview(data))


@given(CALLS)
def test_arguments_travel_whole(call: Inputs) -> None:
    plain = json.loads(json.dumps(inputs_to_json(call), allow_nan=False))
    assert inputs_from_json(plain, NAMES) == call
    assert repr(inputs_from_json(plain, NAMES)) == repr(call), "1 is not 1.0, and a tuple is no list"


def test_a_request_brings_the_arguments_of_its_calls() -> None:
    call = Inputs(args=(Given("c0"), math.inf), kwargs={"sizes": [1, (2, None)], "more": {"mask": Given("c0")}})
    invokes = (Invoke(sequences=((0,),), inputs=call), Invoke(sequences=((3, 4),)))
    request = Request(graph=Graph(nodes=()), invokes=invokes, constants={"c0": raw()})
    found = decode_request(b"".join(bytes(part) for part in encode_request(request)))
    assert found.invokes == invokes
    assert list(given_names(call)) == ["c0", "c0"]
    assert encode_inputs(invokes[1:]) == []


def test_the_structure_of_a_call_is_of_shapes_and_of_all_that_is_no_tensor() -> None:
    def structure(tensor: RawTensor, scale: Any) -> str:
        return repr(structure_of(Inputs(args=(Given("c0"),), kwargs={"scale": scale}), {"c0": tensor}))

    base = structure(raw(), 1)
    assert structure(raw(data=bytes(range(8))), 1) == base
    assert structure(raw(), 1.0) != base
    assert structure(raw("int32"), 1) != base
    assert structure(raw(shape=(1, 2)), 1) != base


def test_a_question_tells_values_of_few_integers_and_no_others() -> None:
    constants = {"c0": raw(data=bytes(range(8))), "c1": raw("int64", (1,), bytes([7, *bytes(7)]))}
    call = Inputs(args=(Given("c0"),), kwargs={"where": Given("c1")})
    plain = json.loads(json.dumps(question(call, constants, NAMES)))
    inputs, tensors = asked(plain)
    assert inputs == call
    assert (tensors["c0"].is_here, bytes(tensors["c1"].data)) == (False, bytes(constants["c1"].data))


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [[], []],
        [[{"t": "c9"}], {}],
        [[{"d": "float3"}], {}],
        [[{"x": 1}], {}],
        [[{"l": 3}], {}],
        [[{"s": [1, 2]}], {}],
        [[{"s": [1, 2, "3"]}], {}],
        [[{"s": [1, True, None]}], {}],
        [[{"r": [1, 2, 0]}], {}],
        [[{"r": [None, 2, 1]}], {}],
        [[{"v": "../cpu"}], {}],
        [[{"v": 0}], {}],
        [[[1]], {}],
        [["x" * (1 << 17)], {}],
        [[0] * 5000, {}],
        [[json.loads('{"l":[' * 12 + "0" + "]}" * 12)], {}],
    ],
)
def test_what_is_no_call_is_refused(plain: Any) -> None:
    with pytest.raises(WireError):
        inputs_from_json(plain, NAMES)


def test_a_question_is_checked_field_by_field() -> None:
    good = {"inputs": [[{"t": "a"}], {}], "tensors": {"a": ["int64", [1], None]}}
    asked(good)
    for entry in (["int65", [1], None], ["int64", [-1], None], ["int64", [1], "AA=="], ["int64", [1], 3], [1]):
        with pytest.raises(WireError):
            asked(good | {"tensors": {"a": entry}})
    with pytest.raises(WireError):
        decode_inputs([None], 2, NAMES)
