"""What images in the prompts of a request cost beside their rows, which cost what rows of text do.

In each pass the first stage makes an image's rows once, however many prompts have it, one image after another. Rows
that a later pass takes from what an earlier one kept are counted all the same: a bound, as of other rows.
"""

from __future__ import annotations

import math

from polytrace.description import ModelDescription
from polytrace.images import Image, images_by_digest
from polytrace.tensors import num_bytes
from scheduling.plan import Program


def image_flops(program: Program, description: ModelDescription) -> int:
    """To make the rows of its images, in all of its passes over prompts."""
    info = description.images
    if info is None:
        return 0
    images = [image for own in _of_passes(program) for image in own]
    return info.flops * sum(image.num_rows(info) if info.merge else 1 for image in images)


def image_bytes(program: Program, description: ModelDescription) -> int:
    """Of the rows of all images of a pass, and of the pixels of one, on the first stage."""
    info = description.images
    passes = [] if info is None else _of_passes(program)
    if info is None or not any(passes):
        return 0
    rows = max(sum(image.num_rows(info) for image in images) for images in passes)
    patches = max(math.prod(image.grid) for images in passes for image in images)  # 1 where there are no grids
    return rows * description.hidden_bytes + patches * num_bytes("float64", info.shape)  # as they came, at most


def _of_passes(program: Program) -> list[list[Image]]:
    """The images that each pass has, equal ones once."""
    if all(invoke.inputs is None for invoke in program.invokes):
        return []
    return [
        list(images_by_digest([program.invokes[invoke] for invoke in wave.invokes]).values()) for wave in program.waves
    ]
