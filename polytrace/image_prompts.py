"""Images as users give them beside their prompts, put into the prompts' tokens (`polytrace.images`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

from polytrace.constants import Constants
from polytrace.description import ImageInfo, ModelDescription
from polytrace.errors import GraphError
from polytrace.graph import Given, Inputs, Invoke
from polytrace.images import PIXELS, image_row
from polytrace.tensors import RawTensor


def image_digests(raw: RawTensor) -> Iterator[int]:
    """What tells images apart: of each its content, with dtype and shape."""
    size = len(raw.data) // max(1, raw.shape[0])
    head = f"{raw.dtype} {raw.shape[1:]} ".encode()
    for place in range(raw.shape[0]):
        yield int.from_bytes(sha256(head + bytes(raw.data[place * size : (place + 1) * size])).digest())


def with_images(
    invoke: Invoke, pixel_values: Any, description: ModelDescription, constants: Constants, where: str
) -> Invoke:
    """The prompts with the images in them, `[images, channels, height, width]` in the order of their tokens.

    Raises GraphError where the model sees no images, and where the images are not those that the prompts have room for.
    """
    info = description.images
    if info is None:
        raise GraphError(f"{description.class_name} takes prompts without images here", where=where)
    shape = tuple(getattr(pixel_values, "shape", ()))
    if len(shape) != 4 or shape[1:] != info.shape or "float" not in str(getattr(pixel_values, "dtype", "")):
        told = f"{PIXELS} is a tensor of floats [images, {', '.join(map(str, info.shape))}]"
        raise GraphError(f"{told}; this is {list(shape) or type(pixel_values).__name__}", where=where)
    name = constants.add(pixel_values, where)
    raw = constants.tensors[name]
    if len(raw.data) > description.limits.max_value_bytes:
        limit = description.limits.max_value_bytes
        raise GraphError(f"{PIXELS} has {len(raw.data)} bytes; the limit is {limit}", where=where)
    if not raw.is_here:
        raise GraphError(f"{PIXELS} is given with its values: what is kept on the service cannot be", where=where)
    rows = iter([image_row(digest, row) for digest in image_digests(raw) for row in range(info.rows)])
    _check_room(invoke, shape[0], info, where)
    sequences = tuple(
        [tuple([next(rows) if token == info.token else token for token in one]) for one in invoke.sequences]
    )
    return replace(invoke, sequences=sequences, inputs=Inputs(args=(), kwargs={PIXELS: Given(name)}))


def _check_room(invoke: Invoke, images: int, info: ImageInfo, where: str) -> None:
    counts = [sequence.count(info.token) for sequence in invoke.sequences]
    odd = next((place for place, count in enumerate(counts) if count % info.rows), None)
    told = f"an image is {info.rows} tokens {info.token} in a prompt"
    if odd is not None:
        raise GraphError(f"{told}; prompt {odd} has {counts[odd]} of them", where=where)
    if sum(counts) != images * info.rows:
        raise GraphError(f"{told}; the prompts have room for {sum(counts) // info.rows}, not {images}", where=where)
