"""Images in the prompts of a language model that sees them: which rows of a prompt are an image's.

In a prompt so many tokens of one kind stand for an image, as the model's processor writes them. Each becomes a token of
its own, which says the image's content and which of its rows it is. So whatever compares prompts by their tokens tells
different images apart, and finds equal ones equal. Shards put there what the model's own vision part makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polytrace.contents import identity
from polytrace.description import ImageInfo, ModelDescription
from polytrace.errors import GraphError
from polytrace.graph import Given, Inputs, Invoke
from polytrace.lines import user_line
from polytrace.tensors import RawTensor

PIXELS = "pixel_values"  # transformers' name of the argument
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


def own_digest(raw: RawTensor) -> int:
    """What tells an image from others: its content, with dtype and shape."""
    return int(identity(raw), 16)


def images_of(invoke: Invoke) -> tuple[Given, ...]:
    """The images of an invoke's prompts, in the order of their rows."""
    return () if invoke.inputs is None else invoke.inputs.kwargs.get(PIXELS, ())


def num_before_images(tokens: Sequence[int]) -> int:
    """How many tokens stand in front of the first image; all of them where there is none."""
    return next((place for place, token in enumerate(tokens) if is_image_row(token)), len(tokens))


def sampled_images(invoke: Invoke, samples: int) -> Inputs:
    """What an invoke is given whose sequences are there so many times each, side by side."""
    images = iter(images_of(invoke))
    counts = [sum(is_image_row(token) and image_of(token)[1] == 0 for token in one) for one in invoke.sequences]
    each = [tuple([next(images) for _ in range(count)]) for count in counts]
    return Inputs(args=(), kwargs={PIXELS: tuple([image for own in each for image in own * samples])})


def images_by_digest(invokes: Sequence[Invoke]) -> dict[int, str]:
    """The constants that are images of prompts, by what tells these apart."""
    found: dict[int, str] = {}
    for invoke in invokes:
        if invoke.inputs is not None:
            firsts = (image_of(token) for one in invoke.sequences for token in one if is_image_row(token))
            digests = [digest for digest, row in firsts if row == 0]
            found |= {digest: image.name for digest, image in zip(digests, images_of(invoke), strict=True)}
    return found


def check_image_rows(
    index: int, invoke: Invoke, description: ModelDescription, constants: Mapping[str, RawTensor]
) -> None:
    """GraphError for an invoke with images that is not as `with_images` makes it."""
    inputs, info = invoke.inputs, description.images
    assert inputs is not None and info is not None
    images = inputs.kwargs.get(PIXELS)
    is_listed = isinstance(images, tuple) and all(isinstance(image, Given) for image in images)
    if inputs.args or len(inputs.kwargs) != 1 or not is_listed:
        raise GraphError(f"invoke {index}: prompts are given with {PIXELS} and nothing else")
    for image in images_of(invoke):
        raw = constants[image.name]
        if raw.shape != info.shape or "float" not in raw.dtype:
            told = f"{PIXELS} is a tensor of floats [images, {', '.join(map(str, info.shape))}]"
            raise GraphError(f"invoke {index}: {told}; an image of it is {raw.dtype} {list(raw.shape)}")
    found = [list(map(image_of, filter(is_image_row, sequence))) for sequence in invoke.sequences]
    wanted = [row for _ in images_of(invoke) for row in range(info.rows)]
    if [row for rows in found for _, row in rows] != wanted or any(len(rows) % info.rows for rows in found):
        told = f"an image is {info.rows} tokens {info.token} in a prompt"
        raise GraphError(f"invoke {index}: {told}, and these have {[len(rows) for rows in found]} for {len(images)}")


def hint_at_images(path: str, description: ModelDescription) -> str:
    """How the sites of what sees images are had, where a path lies there; else nothing."""
    parts = () if description.images is None else description.images.modules
    if not any(path == part or path.startswith(f"{part}.") for part in parts):
        return ""
    return "; what sees images has no sites in shared passes: whole=True has the model as it is, with all of them"


def check_no_images(pixel_values: Any, what: str) -> None:
    """GraphError where images are given to what takes none."""
    if pixel_values is not None:
        raise GraphError(f"{what} take no images: write a trace of its own", where=user_line())
