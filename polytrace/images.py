"""Images in the prompts of a language model that sees them: which rows of a prompt are an image's.

In a prompt so many tokens of one kind stand for an image, as the model's processor writes them. Each becomes a token of
its own, which says the image's content and which of its rows it is. So whatever compares prompts by their tokens tells
different images apart, and finds equal ones equal. Shards put there what the model's own vision part makes.
"""

from __future__ import annotations

from typing import Any

from polytrace.description import ModelDescription
from polytrace.errors import GraphError
from polytrace.graph import Invoke
from polytrace.lines import user_line

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


def check_image_rows(index: int, invoke: Invoke, description: ModelDescription) -> None:
    """GraphError for an invoke with images that is not as `with_images` makes it."""
    inputs, info = invoke.inputs, description.images
    assert inputs is not None and info is not None
    if inputs.args or inputs.kwargs.keys() != {PIXELS}:
        raise GraphError(f"invoke {index}: prompts are given with {PIXELS} and nothing else")
    if invoke.generation is not None:
        raise GraphError(
            f"invoke {index}: prompts with images do not go on here: model.trace gives their next tokens, and a model "
            "loaded as it is (polytrace.load(source)) runs each call with tokens of your own"
        )
    for sequence in invoke.sequences:
        if any(is_image_row(token) and image_of(token)[1] >= info.rows for token in sequence):
            raise GraphError(f"invoke {index} has rows of an image beyond its {info.rows}")


def check_no_images(pixel_values: Any, what: str) -> None:
    """GraphError where images are given to what takes none."""
    if pixel_values is not None:
        raise GraphError(f"{what} take no images: write a trace of its own", where=user_line())
