"""Whether the images of a request fit its prompts and the model, and what is said where they are not to be had."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from polytrace.description import ImageInfo, ModelDescription
from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import Invoke
from polytrace.images import GRIDS, PIXELS, Image, image_of, images_of, is_image_row
from polytrace.tensors import RawTensor, num_bytes


def check_image_rows(
    index: int, invoke: Invoke, description: ModelDescription, constants: Mapping[str, RawTensor]
) -> None:
    """GraphError for an invoke with images that is not as `polytrace.image_prompts` makes it."""
    info, images = description.images, images_of(invoke.inputs)
    assert info is not None
    if images is None or any(bool(image.grid) != bool(info.merge) for image in images):
        told = f"{PIXELS} and {GRIDS}" if info.merge else PIXELS
        raise GraphError(f"invoke {index}: prompts are given with {told} and nothing else")
    limit = description.limits.max_value_bytes
    for image in images:
        raw = constants[image.constant]
        if (why := why_none(image, raw, info)) is not None:
            raise GraphError(f"invoke {index}: {why}")
        if (size := num_bytes(raw.dtype, raw.shape)) > limit:
            raise TooLargeError(f"invoke {index}: an image of {PIXELS} has {size} bytes; the limit is {limit}")
    found = [list(map(image_of, filter(is_image_row, sequence))) for sequence in invoke.sequences]
    wanted = [row for image in images for row in range(image.num_rows(info))]
    is_cut = any(rows and rows[0][1] != 0 for rows in found)
    if is_cut or [row for rows in found for _, row in rows] != wanted:
        told = f"an image is {told_rows(info)} tokens {info.token} in a prompt"
        raise GraphError(f"invoke {index}: {told}, and these have {[len(rows) for rows in found]} for {len(images)}")
    if info.merge and not all(map(are_apart, invoke.sequences)):
        raise GraphError(f"invoke {index}: {APART}")


APART = "the tokens of an image stand together, and others between two images: positions follow from them"


def why_none(image: Image, raw: RawTensor, info: ImageInfo) -> str | None:
    """Why a tensor is not this image; None: it is."""
    if not info.merge:
        if raw.shape == info.shape and "float" in raw.dtype:
            return None
        told = f"{PIXELS} is a tensor of floats [images, {', '.join(map(str, info.shape))}]"
        return f"{told}; an image of it is {raw.dtype} {list(raw.shape)}"
    if image.grid[1] % info.merge or image.grid[2] % info.merge:
        return f"the grid {list(image.grid)} of an image has {info.merge} x {info.merge} patches to a row"
    if raw.shape == (math.prod(image.grid), *info.shape) and "float" in raw.dtype:
        return None
    told = f"an image of the grid {list(image.grid)} is floats [{math.prod(image.grid)}, {info.shape[0]}]"
    return f"{told}, not {raw.dtype} {list(raw.shape)}"


def told_rows(info: ImageInfo) -> str:
    """How many tokens an image is, for people."""
    return f"as many as its grid has patches, by {info.merge**2}," if info.merge else str(info.rows)


def are_apart(sequence: tuple[int, ...]) -> bool:
    """Whether the rows of each image stand together, and no image right behind another."""
    for token, after in pairwise(sequence):
        if is_image_row(after) and image_of(after)[1] != (image_of(token)[1] + 1 if is_image_row(token) else 0):
            return False
        if is_image_row(token) and is_image_row(after) and image_of(token)[0] != image_of(after)[0]:
            return False
    return True


def hint_at_images(path: str, description: ModelDescription) -> str:
    """How the sites of what sees images are had, where a path lies there; else nothing."""
    parts = () if description.images is None else description.images.modules
    if not any(path == part or path.startswith(f"{part}.") for part in parts):
        return ""
    return "; what sees images has no sites in shared passes: whole=True has the model as it is, with all of them"
