"""Before a service takes images for a model, a tiny twin of it must give transformers' numbers with one.

What `engine.image_gate` asks of the served weights in one process, asked of the family where these are split: the twin
has the model's class and configuration, made small (`engine.twins`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoConfig

from engine.image_rows import CALLED
from engine.imaged import imaged_class
from engine.loading import meta_model
from engine.local import LocalBackend
from engine.twins import twin_of, write_twin
from polytrace.errors import ServiceError


def sees_images(source: str) -> bool:
    """Whether a model may run as the language model in it, with images in its prompts."""
    try:
        return imaged_class(AutoConfig.from_pretrained(source)) is not None
    except (OSError, ValueError):
        return False


def prove_images(source: str) -> None:
    """ServiceError unless prompts with images are right in shared passes. Nothing to do for a model without them."""
    if not sees_images(source):
        return
    config = meta_model(source).config
    with tempfile.TemporaryDirectory(prefix="polytrace-twin-") as folder:
        try:
            write_twin(twin_of(config, 1), Path(folder))
            LocalBackend(folder, device="cpu").close()
        except (ServiceError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            told = str(error).strip().split("\n")[0].replace(folder, source)
            way = "" if CALLED in told else f"; {CALLED}"
            raise ServiceError(f"{source} has no images in shared passes: {told}{way}") from error
