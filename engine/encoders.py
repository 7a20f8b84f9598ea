"""Models that have an encoder: a prompt is what it reads, and the decoder begins with a token of its own.

Such a model runs in the padded layout, on one stage. In a pass of prompts the encoder has a row for each of their
tokens and the decoder one row a sequence; when a sequence goes on the encoder does not run again, and the decoder has
one row. Which of the two a tensor has rows of is found by probing, as all rows are (`engine.sites`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from polytrace.errors import ServiceError

_GIVEN = "decoder_input_ids"


def has_encoder(model: nn.Module) -> bool:
    """Whether a model takes a prompt and what its decoder has so far apart from each other."""
    return _GIVEN in inspect.signature(model.forward).parameters


def why_one_stage(model: nn.Module) -> str:
    """Why such a model is not cut."""
    return f"{type(model).__name__} has an encoder and a decoder, and every layer of one needs the other's output"


def first_token(model: nn.Module) -> int:
    """What its decoder begins with. ServiceError when its configuration does not say."""
    config: Any = model.config
    found = getattr(config, "decoder_start_token_id", None)
    if found is None:
        raise ServiceError(f"{type(model).__name__} does not say what its decoder begins with (decoder_start_token_id)")
    return int(found)


def of_decoder(model: nn.Module, ids_1L: Tensor) -> dict[str, Any]:
    """What the root's forward gets beside a prompt, when the decoder has these tokens; nothing without an encoder."""
    return {_GIVEN: ids_1L} if has_encoder(model) else {}


def beginning(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """What the root's forward gets beside a prompt."""
    if not has_encoder(model):
        return {}
    return of_decoder(model, torch.tensor([[first_token(model)]], device=device))
