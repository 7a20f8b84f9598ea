"""Images as users give them beside their prompts, put into the prompts' tokens (`polytrace.images`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from polytrace.constants import Constants
from polytrace.description import ImageInfo, ModelDescription
from polytrace.errors import GraphError
from polytrace.graph import Given, Inputs, Invoke
from polytrace.images import PIXELS, image_row, own_digest


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
    if getattr(pixel_values, "kept_tensor", None) is not None:
        raise GraphError(f"{PIXELS} is given with its values: what is kept on the service cannot be", where=where)
    names = [constants.add(pixel_values[place], where) for place in range(shape[0])]
    limit = description.limits.max_value_bytes
    raws = [constants.tensors[name] for name in names]
    if (size := max([len(raw.data) for raw in raws], default=0)) > limit:
        raise GraphError(f"an image of {PIXELS} has {size} bytes; the limit is {limit}", where=where)
    _check_room(invoke, shape[0], info, where)
    rows = iter([image_row(digest, row) for digest in map(own_digest, raws) for row in range(info.rows)])
    sequences = tuple(
        [tuple([next(rows) if token == info.token else token for token in one]) for one in invoke.sequences]
    )
    return replace(invoke, sequences=sequences, inputs=Inputs(args=(), kwargs={PIXELS: tuple(map(Given, names))}))


def _check_room(invoke: Invoke, images: int, info: ImageInfo, where: str) -> None:
    counts = [sequence.count(info.token) for sequence in invoke.sequences]
    odd = next((place for place, count in enumerate(counts) if count % info.rows), None)
    told = f"an image is {info.rows} tokens {info.token} in a prompt"
    if odd is not None:
        raise GraphError(f"{told}; prompt {odd} has {counts[odd]} of them", where=where)
    if sum(counts) != images * info.rows:
        raise GraphError(f"{told}; the prompts have room for {sum(counts) // info.rows}, not {images}", where=where)
