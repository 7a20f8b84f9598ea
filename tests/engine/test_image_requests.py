"""Requests with images as files: what tells images apart is what came, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from seeing import IMAGE, PROMPT, ROWS, Imaged
from torch import Tensor

from polytrace.contents import digest_of
from polytrace.errors import GraphError, TooLargeError, WireError
from polytrace.graph import Request
from polytrace.image_checks import check_image_rows
from polytrace.tensors import RawTensor
from polytrace.wire import decode_request, encode_request


@pytest.fixture(scope="module")
def imaged(tmp_path_factory: pytest.TempPathFactory) -> Imaged:
    return Imaged(tmp_path_factory.mktemp("llava"))


def _recorded(imaged: Imaged, photos: Tensor, prompts: Any = PROMPT) -> Any:
    with imaged.model.trace(prompts, pixel_values=photos, run=False) as tracer:
        imaged.model.lm_head.output[:, -1].save()
    return tracer.built_request()


def test_images_travel_and_what_tells_them_apart_is_made_of_what_came(imaged: Imaged) -> None:
    prompts = [PROMPT, [6, *[IMAGE] * ROWS, 8, *[IMAGE] * ROWS]]
    sent = _recorded(imaged, imaged.photos, prompts)
    written = b"".join(encode_request(sent))
    came = decode_request(written)
    assert came.invokes == sent.invokes and len({*sent.invokes[0].sequences[1]}) == 2 + 2 * ROWS
    # nothing in the file says what an image is but the image: other pixels are another one
    start = written.index(imaged.photos[0].numpy().tobytes())
    other = decode_request(written[:start] + imaged.photos[0].neg().numpy().tobytes() + written[start + 4 * 3 * 64 :])
    assert other.invokes[0].sequences[0][2] != sent.invokes[0].sequences[0][2]
    assert other.invokes[0].sequences[1] == sent.invokes[0].sequences[1]
    # one that the service has is known by the hash that it was taken in with
    stored = {
        name: replace(raw, digest=digest_of(raw.dtype, raw.shape, raw.data)) for name, raw in sent.constants.items()
    }
    parts = encode_request(replace(sent, constants=stored), stored=stored)
    assert decode_request(b"".join(parts)).invokes == sent.invokes


def _tampered(sent: Request, change: Callable[[dict[str, Any]], None]) -> bytes:
    written = b"".join(encode_request(sent))
    size = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + size])
    body = json.loads(header["__metadata__"]["request"])
    change(body)
    header["__metadata__"]["request"] = json.dumps(body)
    told = json.dumps(header).encode()
    return len(told).to_bytes(8, "little") + told + written[8 + size :]


def test_a_file_whose_images_do_not_fit_its_prompts_is_refused(imaged: Imaged) -> None:
    sent = _recorded(imaged, imaged.photos[:1])

    def lack_one(body: dict[str, Any]) -> None:
        body["prompts"][0].remove(-1)

    def have_none(body: dict[str, Any]) -> None:
        del body["inputs"]

    def have_two(body: dict[str, Any]) -> None:
        (images,) = body["inputs"][0][1]["pixel_values"].values()
        images *= 3

    def claim(body: dict[str, Any]) -> None:
        body["prompts"][0][2] = sent.invokes[0].sequences[0][2]

    for change, told in ((have_none, "no images"), (have_two, "4 rows of 3 images"), (claim, "not an integer")):
        with pytest.raises(WireError, match=told):
            decode_request(_tampered(sent, change))
    backend = imaged.model.backend
    with pytest.raises(GraphError, match=r"4 tokens 63 in a prompt, and these have \[3\] for 1"):
        backend.work_out(decode_request(_tampered(sent, lack_one)))
    for pixels in (torch.zeros(3, 8, 9), torch.zeros(3, 8, 8, dtype=torch.int32)):
        (name,) = sent.constants
        raw = RawTensor(
            dtype=str(pixels.dtype)[6:], shape=tuple(pixels.shape), data=memoryview(pixels.numpy().tobytes())
        )
        with pytest.raises(GraphError, match=r"floats \[images, 3, 8, 8\]"):
            backend.work_out(decode_request(b"".join(encode_request(replace(sent, constants={name: raw})))))


def test_a_certificate_has_what_images_cost_and_equal_ones_once(imaged: Imaged) -> None:
    info = imaged.model.description.images
    one, other = (
        imaged.model.backend.validate(_recorded(imaged, photos, [PROMPT] * len(photos)))
        for photos in (imaged.photos[:1], imaged.photos[:2])
    )
    twice = imaged.model.backend.validate(_recorded(imaged, imaged.photos[[0, 0]], [PROMPT] * 2))
    assert info.flops > 2 * ROWS * 3 * 16 * 16  # the patches' own
    assert one.op_flops - info.flops == other.op_flops - 2 * info.flops == twice.op_flops - info.flops
    assert other.row_bytes - twice.row_bytes >= info.rows * imaged.model.description.hidden_bytes


def test_an_image_beyond_the_limit_of_a_value_is_refused_before_it_is_read(imaged: Imaged) -> None:
    sent, description = _recorded(imaged, imaged.photos[:1]), imaged.model.description
    size = 3 * 8 * 8 * 4
    small = replace(description, limits=replace(description.limits, max_value_bytes=size - 1))
    check_image_rows(0, sent.invokes[0], description, sent.constants)
    with pytest.raises(TooLargeError, match=f"has {size} bytes; the limit is {size - 1}"):
        check_image_rows(0, sent.invokes[0], small, sent.constants)
