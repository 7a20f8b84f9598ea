"""Images as users give them beside their prompts, put into the prompts' tokens (`polytrace.images`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from polytrace.constants import Constants, requires_gradients
from polytrace.description import ImageInfo, ModelDescription
from polytrace.errors import GraphError
from polytrace.graph import Invoke
from polytrace.image_checks import APART, are_apart, told_rows, why_none
from polytrace.images import GRIDS, PIXELS, Image, image_row, inputs_of
from polytrace.lines import user_line


def images_among(prompts: Any) -> Mapping[str, Any]:
    """What a processor has made of images, where its whole batch stands in the place of prompts.

    Raises GraphError for what it has made of anything else, such as videos.
    """
    if not isinstance(prompts, Mapping):
        return {}
    given = {str(name): value for name, value in prompts.items() if value is not None}
    others = [name for name in given if name not in (PIXELS, GRIDS) and any(word in name for word in _MEDIA)]
    if others:
        told = f"prompts have images beside them ({PIXELS}, {GRIDS}), and no {others[0]}"
        raise GraphError(f"{told}: a model that is called as it is (whole=True) takes all arguments", where=user_line())
    return {name: given[name] for name in (PIXELS, GRIDS) if name in given}


_MEDIA = ("pixel", "image", "video", "audio", "features", "grid")  # in the names of arguments that are no text


def with_images(
    invoke: Invoke, given: Mapping[str, Any], description: ModelDescription, constants: Constants, where: str
) -> Invoke:
    """The prompts with the images in them, in the order of their tokens.

    `given`: transformers' `pixel_values`, `[images, channels, height, width]`; of a model whose images have grids the
    patches of all images one behind another, `[patches, features]`, and `image_grid_thw`, `[images, 3]`.
    Raises GraphError where the model sees no images, and where the images are not those that the prompts have room for.
    """
    info, pixels = description.images, given[PIXELS]
    if info is None:
        raise GraphError(f"{description.class_name} takes prompts without images here", where=where)
    shape = tuple(getattr(pixels, "shape", ()))
    wanted = "patches" if info.merge else "images"
    dtype = str(getattr(pixels, "dtype", "")).removeprefix("torch.")
    if len(shape) != 1 + len(info.shape) or shape[1:] != info.shape or "float" not in dtype:
        told = f"{PIXELS} is a tensor of floats [{wanted}, {', '.join(map(str, info.shape))}]"
        raise GraphError(f"{told}; this is {f'{dtype} {list(shape)}' if shape else type(pixels).__name__}", where=where)
    if getattr(pixels, "kept_tensor", None) is not None:
        raise GraphError(f"{PIXELS} is given with its values: what is kept on the service cannot be", where=where)
    if requires_gradients(pixels):
        told = f"{PIXELS} requires gradients, and rows of images are made without any in shared passes"
        raise GraphError(f"{told}: give {PIXELS}.detach(), or load the model with whole=True", where=where)
    images, limit = [], description.limits.max_value_bytes
    for grid, own in _parts(pixels, given.get(GRIDS), info, where):
        image = Image(constants.add(own, where), grid)
        raw = constants.tensors[image.constant]
        if len(raw.data) > limit:
            told = f"an image of {PIXELS} has {len(raw.data)} bytes; the limit is {limit}"
            raise GraphError(told, where=where)
        if (why := why_none(image, raw, info)) is not None:
            raise GraphError(why, where=where)
        images.append((image, image.digest(raw)))
    _check_room(invoke, [image for image, _ in images], info, where)
    rows = iter([image_row(digest, row) for image, digest in images for row in range(image.num_rows(info))])
    sequences = tuple(
        [tuple([next(rows) if token == info.token else token for token in one]) for one in invoke.sequences]
    )
    if info.merge and not all(map(are_apart, sequences)):
        raise GraphError(APART, where=where)
    return replace(invoke, sequences=sequences, inputs=inputs_of([image for image, _ in images]))


def _parts(pixels: Any, grids: Any, info: ImageInfo, where: str) -> list[tuple[tuple[int, ...], Any]]:
    """Each image's grid and its part of the tensor."""
    if not info.merge:
        if grids is not None:
            raise GraphError(f"images of this model are of one size: it takes no {GRIDS}", where=where)
        return [((), pixels[place]) for place in range(pixels.shape[0])]
    plain = getattr(grids, "tolist", lambda: grids)()
    if not isinstance(plain, list) or not all(isinstance(one, list) and len(one) == 3 for one in plain):
        told = f"images of this model have grids: give the processor's whole batch, which has {GRIDS} [images, 3]"
        raise GraphError(told, where=where)
    found: list[tuple[tuple[int, ...], Any]] = []
    first = 0
    for one in plain:
        if not all(type(size) is int and size > 0 for size in one):
            raise GraphError(f"{GRIDS} has whole numbers of patches, not {one}", where=where)
        stop = first + math.prod(one)
        found.append((tuple(one), pixels[first:stop]))
        first = stop
    if first != pixels.shape[0]:
        raise GraphError(f"the grids of {GRIDS} have {first} patches, {PIXELS} {pixels.shape[0]}", where=where)
    return found


def _check_room(invoke: Invoke, images: list[Image], info: ImageInfo, where: str) -> None:
    counts = [sequence.count(info.token) for sequence in invoke.sequences]
    told = f"an image is {told_rows(info)} tokens {info.token} in a prompt"
    if not info.merge:
        odd = next((place for place, count in enumerate(counts) if count % info.rows), None)
        if odd is not None:
            raise GraphError(f"{told}; prompt {odd} has {counts[odd]} of them", where=where)
        if sum(counts) != len(images) * info.rows:
            room = sum(counts) // info.rows
            raise GraphError(f"{told}; the prompts have room for {room}, not {len(images)}", where=where)
    needed = [image.num_rows(info) for image in images]
    if sum(counts) != sum(needed):
        raise GraphError(f"{told}: {needed} of these images; the prompts have {counts}", where=where)
