"""Which vision-language models are served as the language models in them, and which part of them reads text.

Families whose positions follow from images are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from polytrace.images import is_image_row


def imaged_class(config: Any) -> Any:
    """The class of a vision-language model whose text part is a language model; None of every other one."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    has_own_size = isinstance(getattr(getattr(config, "vision_config", None), "image_size", None), int)
    is_known = hasattr(kind, "get_image_features") and hasattr(config, "image_token_id") and has_own_size
    return kind if is_known else None


def is_of_text(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module lies in the part of a model that reads text; in a language model all do."""
    root: Any = model
    return imaged_class(root.config) is None or any(part is module for part in root.get_decoder().modules())


def plain_tokens(model: nn.Module, tokens: Sequence[int]) -> list[int]:
    """The tokens as the model knows them."""
    config: Any = model.config
    return [config.image_token_id if is_image_row(token) else token for token in tokens]
