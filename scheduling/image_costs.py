"""What images in the prompts of a request cost beside their rows, which cost what rows of text do.

In each pass the first stage makes an image's rows once, however many prompts have it, one image after another. Rows
that a later pass takes from what an earlier one kept are counted all the same: a bound, as of other rows.
"""

from __future__ import annotations

from polytrace.description import ModelDescription
from polytrace.images import images_by_digest
from polytrace.tensors import num_bytes
from scheduling.plan import Program


def image_flops(program: Program, description: ModelDescription) -> int:
    """To make the rows of its images, in all of its passes over prompts."""
    info = description.images
    return 0 if info is None else info.flops * sum(len(images) for images in _of_passes(program))


def image_bytes(program: Program, description: ModelDescription) -> int:
    """Of the rows of all images of a pass, and of the pixels of one, on the first stage."""
    info = description.images
    most = max([len(images) for images in _of_passes(program)], default=0)
    if info is None or not most:
        return 0
    pixels = num_bytes("float64", info.shape)  # as they came, at most
    return most * info.rows * description.hidden_bytes + pixels


def _of_passes(program: Program) -> list[set[int]]:
    """The images that each pass has."""
    if all(invoke.inputs is None for invoke in program.invokes):
        return []
    return [set(images_by_digest([program.invokes[invoke] for invoke in wave.invokes])) for wave in program.waves]
