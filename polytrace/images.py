"""Images in the prompts of a language model that sees them: which rows of a prompt are an image's.

In a prompt so many tokens of one kind stand for an image, as the model's processor writes them. Each becomes a token of
its own, which says the image's content and which of its rows it is. So whatever compares prompts by their tokens tells
different images apart, and finds equal ones equal. Shards put there what the model's own vision part makes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polytrace.contents import identity
from polytrace.description import ImageInfo
from polytrace.graph import Given, Inputs, Invoke
from polytrace.tensors import RawTensor

PIXELS, GRIDS = "pixel_values", "image_grid_thw"  # transformers' names of the arguments
_SIZE = 1 << 20  # no side of a grid is as long
_IMAGE = 1 << 300  # tokens from here on are rows of images
_ROW_BITS = 32


def image_row(digest: int, row: int) -> int:
    """The token of a row of an image."""
    return _IMAGE | digest << _ROW_BITS | row


def is_image_row(token: int) -> bool:
    """Whether a token stands for a row of an image."""
    return token >= _IMAGE


def image_of(token: int) -> tuple[int, int]:
    """The digest of the image that a row is of, and which of its rows."""
    return (token - _IMAGE) >> _ROW_BITS, token & ((1 << _ROW_BITS) - 1)


def plain_tokens(tokens: Sequence[int], info: ImageInfo | None) -> tuple[int, ...]:
    """Tokens as the model knows them."""
    return tuple(tokens if info is None else [info.token if is_image_row(token) else token for token in tokens])


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a prompt."""

    constant: str  # its pixels, or its patches one behind another
    grid: tuple[int, ...]  # of its patches: time, height, width; empty where all images are of one size

    def digest(self, raw: RawTensor) -> int:
        """What tells it from others: its content, with dtype, shape and grid."""
        own = identity(raw)
        return int(hashlib.sha256(f"{own} {self.grid}".encode()).hexdigest() if self.grid else own, 16)

    def num_rows(self, info: ImageInfo) -> int:
        """Of a prompt."""
        return math.prod(self.grid) // info.merge**2 if info.merge else info.rows


def inputs_of(images: Sequence[Image]) -> Inputs:
    """What an invoke with images is given."""
    kwargs: dict[str, Any] = {PIXELS: tuple([Given(image.constant) for image in images])}
    if any(image.grid for image in images):
        kwargs[GRIDS] = tuple([image.grid for image in images])
    return Inputs(args=(), kwargs=kwargs)


def images_of(inputs: Inputs | None) -> tuple[Image, ...] | None:
    """The images of an invoke's prompts, in the order of their rows; None where it is given anything else."""
    if inputs is None:
        return ()
    names, grids = inputs.kwargs.get(PIXELS), inputs.kwargs.get(GRIDS)
    if not isinstance(names, tuple) or not all(isinstance(name, Given) for name in names):
        return None
    if inputs.args or inputs.kwargs.keys() - {PIXELS, GRIDS}:
        return None
    if grids is None:
        return tuple([Image(name.name, ()) for name in names])
    if not isinstance(grids, tuple) or len(grids) != len(names) or not all(map(_is_grid, grids)):
        return None
    return tuple([Image(name.name, grid) for name, grid in zip(names, grids, strict=True)])


def _is_grid(value: Any) -> bool:
    return (
        isinstance(value, tuple) and len(value) == 3 and all(type(size) is int and 0 < size < _SIZE for size in value)
    )


def num_before_images(tokens: Sequence[int]) -> int:
    """How many tokens stand in front of the first image; all of them where there is none."""
    return next((place for place, token in enumerate(tokens) if is_image_row(token)), len(tokens))


def sampled_images(invoke: Invoke, samples: int) -> Inputs:
    """What an invoke is given whose sequences are there so many times each, side by side."""
    images = iter(images_of(invoke.inputs) or ())
    counts = [sum(is_image_row(token) and image_of(token)[1] == 0 for token in one) for one in invoke.sequences]
    each = [[next(images) for _ in range(count)] for count in counts]
    return inputs_of([image for own in each for image in own * samples])


def images_by_digest(invokes: Sequence[Invoke]) -> dict[int, Image]:
    """The images of prompts, by what tells these apart."""
    found: dict[int, Image] = {}
    for invoke in invokes:
        if invoke.inputs is not None and (images := images_of(invoke.inputs)):
            firsts = (image_of(token) for one in invoke.sequences for token in one if is_image_row(token))
            found.update(zip([digest for digest, row in firsts if row == 0], images, strict=True))
    return found
