"""Rows of images in the stream of a pass: made by the model's own vision part, one image at a time.

So they do not depend on what else is in the pass. They are put into the text model's `inputs_embeds`, where the
family's own forward scatters them; what runs behind is the text model, as of any language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from engine.copies import to_device
from engine.imaged import image_parts, image_shape, imaged_class
from engine.memory import told_out_of_memory
from polytrace.description import ImageInfo
from polytrace.errors import ServiceError
from polytrace.images import image_of, is_image_row

if TYPE_CHECKING:
    from engine.fragments import RequestState

# T = rows of the root, R = rows of an image, D = hidden


def image_info(model: nn.Module) -> ImageInfo | None:
    """How images stand in prompts, by running the vision part of a meta model once; None of a model without one.

    Raises ServiceError where it does not run with pixels alone.
    """
    root: Any = model
    shape = image_shape(root.config)
    if imaged_class(root.config) is None or shape is None:
        return None
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            rows = _features(model, torch.zeros(1, *shape)).shape[0]
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        told = (
            f"{type(model).__name__} does not make rows of an image {list(shape)} alone: {str(error).splitlines()[0]}"
        )
        raise ServiceError(f"{told}; {CALLED}") from error
    return ImageInfo(
        token=root.config.image_token_id,
        rows=rows,
        shape=shape,
        flops=counter.get_total_flops(),
        modules=image_parts(model),
    )


CALLED = "called as it is (whole=True, the default) it runs"


class SeenImages:
    """The images in the prompts of a pass."""

    def __init__(self, states: Sequence[RequestState]) -> None:
        self._states = states

    def features(self, model: nn.Module, tokens: Sequence[int]) -> ImageRows | None:
        """What stands in the rows of images; None where no row is one. `tokens` are the root's.

        A request whose image cannot be read fails, and its rows are zeros.
        """
        rows = [row for row, token in enumerate(tokens) if is_image_row(token)]
        if not rows:
            return None
        wanted = [image_of(tokens[row]) for row in rows]
        made = {digest: _features(model, self._pixels(model, digest)) for digest in dict(wanted)}
        features_RD = torch.stack([made[digest][row] for digest, row in wanted])
        return ImageRows(rows=to_device(rows, features_RD.device), features_RD=features_RD)

    def _pixels(self, model: nn.Module, digest: int) -> Tensor:
        """From the first request that has the image and can read it; zeros where none can, who have failed then."""
        root: Any = model
        owners = [state for state in self._states if digest in state.images]
        assert owners, "rows of an image run in a pass of a request that has it"
        for state in owners:
            try:
                return state.image(state.images[digest])[None]
            except Exception as error:  # the edge between a user's tensor and the shared pass
                if told_out_of_memory(error) is not None:
                    raise
                state.fail(None, f"its image cannot be read: {error}")
        return torch.zeros(1, *image_shape(root.config))


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Features on their way into the stream."""

    rows: Tensor  # of the root
    features_RD: Tensor

    def scattered(self, model: nn.Module) -> RemovableHandle:
        """Puts them into what the text model is given, until the handle is removed."""
        root: Any = model

        def put(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            embeds_1TD = kwargs["inputs_embeds"]
            features = self.features_RD.to(embeds_1TD.dtype)
            return args, {**kwargs, "inputs_embeds": embeds_1TD.index_copy(1, self.rows, features[None])}

        handle: RemovableHandle = root.get_decoder().register_forward_pre_hook(put, with_kwargs=True)
        return handle


def _features(model: nn.Module, pixels: Tensor) -> Tensor:
    """Of one image `[1, channels, height, width]`: `[R, D]`."""
    root: Any = model
    with torch.no_grad(), _own_attention(model):
        pixels = pixels.to(root.device, root.dtype)
        found = root.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        features: Tensor = torch.cat(list(found)) if isinstance(found, (list, tuple)) else found.flatten(0, -2)
    return features


@contextmanager
def _own_attention(model: nn.Module) -> Iterator[None]:
    """The vision part attends as transformers lets it, whatever the text part does."""
    root: Any = model
    text = {id(part.config) for part in root.get_decoder().modules() if hasattr(part, "config")}
    configs = {id(part.config): part.config for part in root.modules() if hasattr(part, "config")}
    kept = [(one, one._attn_implementation_internal) for key, one in configs.items() if key not in text]
    try:
        for one, _ in kept:
            one._attn_implementation_internal = "sdpa" if root._supports_sdpa else "eager"
        yield
    finally:
        for one, own in kept:
            one._attn_implementation_internal = own
