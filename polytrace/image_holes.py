"""Rows of images on the wire: a prompt has holes there, and the request the images that they are filled with.

So nobody can say that an image is another one: what tells images apart is the hash of what came, or of a content that
the service has, which it hashed when it took it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from polytrace.errors import WireError
from polytrace.graph import Given, Invoke
from polytrace.images import PIXELS, image_row, is_image_row, own_digest
from polytrace.tensors import RawTensor

IMAGE_HOLE = -1  # in the place of a token


def with_holes(invoke: Invoke) -> tuple[tuple[int, ...], ...]:
    """Its prompts as they are written."""
    if invoke.inputs is None:
        return invoke.sequences
    return tuple([tuple([IMAGE_HOLE if is_image_row(token) else token for token in one]) for one in invoke.sequences])


def with_rows(invokes: tuple[Invoke, ...], constants: Mapping[str, RawTensor]) -> tuple[Invoke, ...]:
    """The prompts as they were, from images in the order of their rows. Raises WireError where they do not fit."""
    each = {id(invoke): invoke for invoke in invokes}.values()  # many may be one object
    if not any(IMAGE_HOLE in sequence for invoke in each for sequence in invoke.sequences):
        return invokes
    digests: dict[str, int] = {}  # by constant: many invokes may name one

    def digest(given: Given) -> int:
        if given.name not in digests:
            raw = constants[given.name]
            if not raw.is_here and raw.digest is None:
                raise WireError(f"{PIXELS} is given with its values or as a content, not as a state")
            digests[given.name] = own_digest(raw)
        return digests[given.name]

    return tuple([_filled(number, invoke, digest) for number, invoke in enumerate(invokes)])


def _filled(number: int, invoke: Invoke, digest: Callable[[Given], int]) -> Invoke:
    holes = sum(sequence.count(IMAGE_HOLE) for sequence in invoke.sequences)
    if not holes:
        return invoke
    images = None if invoke.inputs is None else invoke.inputs.kwargs.get(PIXELS)
    if not isinstance(images, tuple) or not images or not all(isinstance(one, Given) for one in images):
        raise WireError(f"invoke {number} has rows of images, and no images in {PIXELS}")
    size, rest = divmod(holes, len(images))
    if rest:
        raise WireError(f"invoke {number} has {holes} rows of {len(images)} images, which are as many for each")
    rows = iter([image_row(digest(image), row) for image in images for row in range(size)])
    sequences = [tuple([next(rows) if token == IMAGE_HOLE else token for token in one]) for one in invoke.sequences]
    return replace(invoke, sequences=tuple(sequences))
