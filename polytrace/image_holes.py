"""Rows of images on the wire: a prompt has holes there, and the request the images that they are filled with.

So nobody can say that an image is another one: what tells images apart is the hash of what came, or of a content that
the service has, which it hashed when it took it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from polytrace.errors import WireError
from polytrace.graph import Invoke
from polytrace.images import PIXELS, Image, image_row, images_of, is_image_row
from polytrace.tensors import RawTensor

IMAGE_HOLE = -1  # in the place of a token
_MAX_TOKENS = 1 << 20  # of all prompts with images; each of their rows is told anew


def with_holes(invoke: Invoke) -> tuple[tuple[int, ...], ...]:
    """Its prompts as they are written."""
    if invoke.inputs is None:
        return invoke.sequences
    return tuple([tuple([IMAGE_HOLE if is_image_row(token) else token for token in one]) for one in invoke.sequences])


def with_rows(invokes: tuple[Invoke, ...], constants: Mapping[str, RawTensor]) -> tuple[Invoke, ...]:
    """The prompts as they were, from images in the order of their rows. Raises WireError where they do not fit."""
    each = {id(invoke): invoke for invoke in invokes}  # many may be one object
    seeing = {key for key, one in each.items() if any(IMAGE_HOLE in sequence for sequence in one.sequences)}
    if not seeing:
        return invokes
    num_tokens = sum(invoke.num_tokens for invoke in invokes if id(invoke) in seeing)
    if num_tokens > _MAX_TOKENS:
        raise WireError(f"prompts with images have {num_tokens} tokens together; at most {_MAX_TOKENS} are taken")
    filler = _Filler(constants)
    return tuple([filler.filled(number, one) if id(one) in seeing else one for number, one in enumerate(invokes)])


class _Filler:
    """Puts rows into prompts; of each image they are made once."""

    def __init__(self, constants: Mapping[str, RawTensor]) -> None:
        self._constants = constants
        self._rows: dict[tuple[Image, int], list[int]] = {}

    def filled(self, number: int, invoke: Invoke) -> Invoke:
        images = images_of(invoke.inputs)
        if not images:
            raise WireError(f"invoke {number} has rows of images, and no images in {PIXELS}")
        holes = sum(sequence.count(IMAGE_HOLE) for sequence in invoke.sequences)
        patches = sum(math.prod(image.grid) for image in images)  # 1 each where there are no grids
        counts = [math.prod(image.grid) * holes // patches for image in images]
        if sum(counts) != holes or any(math.prod(image.grid) * holes % patches for image in images):
            raise WireError(f"invoke {number} has {holes} rows of {len(images)} images, whose shares are none")
        rows = iter([row for one, count in zip(images, counts, strict=True) for row in self._of(one, count)])
        sequences = [tuple([next(rows) if token == IMAGE_HOLE else token for token in one]) for one in invoke.sequences]
        return replace(invoke, sequences=tuple(sequences))

    def _of(self, image: Image, count: int) -> list[int]:
        if (image, count) not in self._rows:
            raw = self._constants[image.constant]
            if not raw.is_here and raw.digest is None:
                raise WireError(f"{PIXELS} is given with its values or as a content, not as a state")
            digest = image.digest(raw)
            self._rows[image, count] = [image_row(digest, row) for row in range(count)]
        return self._rows[image, count]
