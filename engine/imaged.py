"""Which vision-language models are served as the language models in them, and which part of them reads text.

Either all images of a model are of one size, or each has a grid of patches and positions follow from these.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from polytrace.images import is_image_row


def imaged_class(config: Any) -> Any:
    """The class of a vision-language model whose text part is a language model; None of every other one."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    is_known = hasattr(kind, "get_image_features") and hasattr(config, "image_token_id")
    return kind if is_known and (has_grids(kind) or image_shape(config) is not None) else None


def has_grids(kind: Any) -> bool:
    """Whether images of a class have each its own grid of patches, from which positions follow."""
    return "image_grid_thw" in inspect.signature(kind.get_image_features).parameters


def image_shape(config: Any) -> tuple[int, int, int] | None:
    """Channels, height and width of the images that a model takes; None where it takes others too."""
    vision: Any = getattr(config, "vision_config", None)
    size = getattr(vision, "image_size", None)
    sizes = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    return (vision.num_channels, *sizes) if len(sizes) == 2 else None


def language_class(config: Any) -> Any:
    """The class of a model that runs as a language model, or as the one in it."""
    return imaged_class(config) or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def is_of_text(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module lies in the part of a model that reads text; in a language model all do."""
    root: Any = model
    return imaged_class(root.config) is None or any(part is module for part in root.get_decoder().modules())


def image_parts(model: nn.Module) -> tuple[str, ...]:
    """The topmost modules with weights that neither read text nor are the head; none in a language model."""
    root: Any = model
    return () if imaged_class(root.config) is None else tuple(_beside_text(root, "", root))


def _beside_text(root: Any, path: str, module: nn.Module) -> Iterator[str]:
    text = (root.get_decoder(), root.get_output_embeddings())
    if any(module is one for one in text):
        return
    if any(part is one for part in module.modules() for one in text):
        for name, child in module.named_children():
            yield from _beside_text(root, f"{path}.{name}" if path else name, child)
    elif next(module.parameters(), None) is not None:
        yield path


def copied_embeddings(model: nn.Module) -> RemovableHandle:
    """The text model is given a copy of what its tokens are turned into, until the handle is removed.

    As where images stand in it: a tensor of its own, which no row of theirs hands a gradient back through.
    """
    root: Any = model

    def copy(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("inputs_embeds")
        return None if given is None else (args, {**kwargs, "inputs_embeds": given.clone()})

    handle: RemovableHandle = root.get_decoder().register_forward_pre_hook(copy, with_kwargs=True)
    return handle


def plain_tokens(model: nn.Module, tokens: Sequence[int]) -> list[int]:
    """The tokens as the model knows them."""
    config: Any = model.config
    return [config.image_token_id if is_image_row(token) else token for token in tokens]
