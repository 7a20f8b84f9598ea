"""Contents by their hash, and what a request says of those that it does not bring along."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polytrace.constants import Constants
from polytrace.contents import LARGE_BYTES, digest_of, is_digest, is_name
from polytrace.errors import WireError
from polytrace.graph import Constant, Graph, Invoke, KeptSave, NodeId, Ref, Request, Save
from polytrace.tensors import RawTensor, num_bytes
from polytrace.wire import content_header, decode_content, decode_request, encode_request

DIGEST = "ab" * 32
WHERE = "experiment.py:1"


def raw(shape: tuple[int, ...] = (2, 3), **more: Any) -> RawTensor:
    data = bytes(num_bytes("float32", shape))
    return RawTensor(dtype="float32", shape=shape, data=memoryview(data), **more)


def elsewhere(**more: Any) -> RawTensor:
    return RawTensor(dtype="float32", shape=(2, 3), data=memoryview(b""), **more)


def request(constant: RawTensor, *keeps: KeptSave) -> Request:
    nodes = (Constant(name="c", where=WHERE), Save(name="out", value=Ref(NodeId(0)), where=WHERE))
    return Request(
        graph=Graph(nodes=nodes), invokes=(Invoke(sequences=((1, 2),)),), constants={"c": constant}, keeps=keeps
    )


def sent(request: Request, **more: Any) -> bytes:
    return b"".join(encode_request(request, **more))


@given(st.binary(max_size=64), st.integers(0, 63))
def test_a_hash_tells_contents_apart_by_dtype_shape_and_every_byte(data: bytes, place: int) -> None:
    digest = digest_of("uint8", [len(data)], data)
    assert is_digest(digest) and digest == digest_of("uint8", (len(data),), memoryview(bytearray(data)))
    assert digest != digest_of("int8", [len(data)], data)
    assert digest != digest_of("uint8", [1, len(data)], data)
    if place < len(data):
        changed = bytearray(data)
        changed[place] ^= 1
        assert digest != digest_of("uint8", [len(data)], changed)


def test_a_large_content_is_hashed_in_parts_of_8_mib() -> None:
    data = bytes(20 << 20)
    parts = [hashlib.sha256(bytes(size << 20)).digest() for size in (8, 8, 4)]
    whole = hashlib.sha256(json.dumps(["uint8", [len(data)]]).encode() + b"".join(parts)).hexdigest()
    assert digest_of("uint8", [len(data)], data) == whole


def test_a_tensor_that_changed_has_another_hash_however_it_was_changed() -> None:
    """Also where torch does not count the change: by `.data`, or through numpy's view of the memory."""
    tensor = torch.zeros(LARGE_BYTES // 4)
    digests = set()
    for change in (
        lambda: None,
        lambda: tensor.add_(1),
        lambda: tensor.data.add_(1),
        lambda: tensor.numpy().__setitem__(3, 9.0),
    ):
        change()
        constants = Constants()
        digests.add(constants.tensors[constants.add(tensor, WHERE)].digest)
    assert len(digests) == 4 and None not in digests


def test_small_constants_have_no_hash_and_equal_large_ones_are_one() -> None:
    constants = Constants()
    assert constants.tensors[constants.add(np.zeros(LARGE_BYTES // 4 - 1, np.float32), WHERE)].digest is None
    first = constants.add(np.ones((4, LARGE_BYTES), np.float32), WHERE)
    assert first == constants.add(torch.ones(4, LARGE_BYTES), WHERE)
    assert first != constants.add(torch.ones(LARGE_BYTES, 4), WHERE)


def test_what_is_stored_is_named_and_not_sent() -> None:
    large = raw((100, 100), digest=DIGEST)
    inline, named = sent(request(large)), sent(request(large), stored={"c"})
    assert len(inline) - len(named) > 39_000
    assert decode_request(inline).constants["c"].is_here
    found = decode_request(named).constants["c"]
    assert (found.dtype, found.shape, found.digest, found.is_here) == ("float32", (100, 100), DIGEST, False)


@pytest.mark.parametrize("constant", [elsewhere(digest=DIGEST), elsewhere(state="count")])
def test_what_has_no_bytes_here_and_what_is_kept_come_over(constant: RawTensor) -> None:
    keeps = (KeptSave(save="out", name="mean", is_state=False, ttl_s=2.5),)
    found = decode_request(sent(request(constant, *keeps)))
    assert found.keeps == keeps
    assert (found.constants["c"].digest, found.constants["c"].state) == (constant.digest, constant.state)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stored", []),
        ("stored", {"c": ["float32", [2, 3], "../../etc/passwd", None]}),
        ("stored", {"c": ["float32", [2, 3], None, "../up"]}),
        ("stored", {"c": ["float32", [2, 3], None, None]}),
        ("stored", {"c": ["float32", [2, 3], DIGEST, "count"]}),
        ("stored", {"c": ["float32", [2, -3], DIGEST, None]}),
        ("stored", {"c": ["float32", [0], DIGEST, None]}),
        ("stored", {"c": ["float9", [2, 3], DIGEST, None]}),
        ("stored", {"c": ["float32", [2, 3], DIGEST]}),
        ("keeps", {}),
        ("keeps", [["other", "mean", False, None]]),
        ("keeps", [["out", "../up", False, None]]),
        ("keeps", [["out", "mean", 0, None]]),
        ("keeps", [["out", "mean", False, -1]]),
        ("keeps", [["out", "mean", False, None], ["out", "other", False, None]]),
    ],
)
def test_nonsense_about_contents_is_refused(field: str, value: Any) -> None:
    file = sent(request(elsewhere(digest=DIGEST), KeptSave(save="out", name="mean", is_state=False)))
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    body = json.loads(header["__metadata__"]["request"]) | {field: value}
    header["__metadata__"]["request"] = json.dumps(body)
    text = json.dumps(header).encode()
    with pytest.raises(WireError):
        decode_request(len(text).to_bytes(8, "little") + text)


def test_a_content_is_a_file_with_one_tensor() -> None:
    file = content_header("float32", (2, 3)) + bytes(range(24))
    assert len(content_header("float32", (2, 3))) % 64 == 0
    found = decode_content(file)
    assert (found.dtype, found.shape, bytes(found.data)) == ("float32", (2, 3), bytes(range(24)))
    with pytest.raises(WireError, match="cut off"):
        decode_content(file[:-1])
    with pytest.raises(WireError, match="no content"):
        decode_content(sent(request(raw())))


def test_names_are_safe_as_files() -> None:
    assert is_name("mean-resid.5") and not any(is_name(name) for name in ("", ".", "..", "a/b", "a" * 101, "ü", 3))
    assert not any(is_digest(digest) for digest in ("", "AB" * 32, "ab" * 31, f"{'ab' * 31}/.", None))
