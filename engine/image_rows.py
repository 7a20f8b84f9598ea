"""Rows of images in the stream of a pass: made by the model's own vision part, one image at a time.

So they do not depend on what else is in the pass. They are put into the text model's `inputs_embeds`, where the
family's own forward scatters them; what runs behind is the text model, as of any language model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from engine.copies import to_device
from engine.image_positions import positions_of_pass, takes_grids
from engine.imaged import has_grids, image_parts, image_shape, imaged_class
from engine.memory import told_out_of_memory
from engine.streams import Streams
from engine.windows import token_flops
from polytrace.description import ImageInfo
from polytrace.errors import ServiceError
from polytrace.images import image_of, is_image_row

if TYPE_CHECKING:
    from engine.fragments import RequestState

# T = rows of the root, R = rows of an image, D = hidden


def image_info(model: nn.Module) -> ImageInfo | None:
    """How images stand in prompts, of a meta model; None of a model without one.

    By running the vision part once, where all images are of one size. Raises ServiceError where it does not run with
    pixels alone, and where it is not known how positions follow from grids.
    """
    root: Any = model
    kind = imaged_class(root.config)
    if kind is None:
        return None
    known: dict[str, Any] = {"token": root.config.image_token_id, "modules": image_parts(model)}
    if has_grids(kind):
        return _info_of_grids(model, known)
    shape = image_shape(root.config)
    assert shape is not None, "its class says so"
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            rows = _features(model, torch.zeros(1, *shape), ()).shape[0]
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        told = f"{type(model).__name__} does not make rows of an image {list(shape)} alone"
        raise ServiceError(f"{told}: {str(error).splitlines()[0]}; {CALLED}") from error
    return ImageInfo(rows=rows, shape=shape, flops=counter.get_total_flops(), **known)


def _info_of_grids(model: nn.Module, known: dict[str, Any]) -> ImageInfo:
    root: Any = model
    merge = getattr(root.config.vision_config, "spatial_merge_size", None)
    parts = [model.get_submodule(path) for path in known["modules"]]
    matrices = [weight for part in parts for weight in part.parameters() if weight.ndim >= 2]
    if not isinstance(merge, int) or not matrices or not takes_grids(model):
        told = f"{type(model).__name__} does not tell how positions follow from an image's grid"
        raise ServiceError(f"{told}; {CALLED}")
    # what patches attend to is not in it: that grows with the grid
    flops = merge**2 * sum(token_flops(module, root.config) for part in parts for module in part.modules())
    size = math.prod(matrices[0].shape[1:])  # what a patch is turned into features from
    return ImageInfo(rows=0, shape=(size,), flops=flops, merge=merge, **known)


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
        made = {digest: _features(model, *self._pixels(digest)) for digest in dict(wanted)}
        features_RD = torch.stack([made[digest][row] for digest, row in wanted])
        return ImageRows(rows=to_device(rows, features_RD.device), features_RD=features_RD)

    def positions(self, model: nn.Module, streams: Streams) -> Tensor | None:
        """`[3, 1, T]`, where positions follow from images."""
        return positions_of_pass(model, streams, self._states)

    def _pixels(self, digest: int) -> tuple[Tensor, tuple[int, ...]]:
        """Pixels and grid, from the first request that can read them; zeros where none can, who have failed then."""
        owners = [state for state in self._states if digest in state.brought.images]
        assert owners, "rows of an image run in a pass of a request that has it"
        image, info = owners[0].brought.images[digest], owners[0].context.table.description.images
        assert info is not None
        for state in owners:
            try:
                pixels = state.brought.image(state.program, state.brought.images[digest].constant)
            except Exception as error:  # the edge between a user's tensor and the shared pass
                if told_out_of_memory(error) is not None:
                    raise
                state.fail(None, f"its image cannot be read: {error}")
            else:
                break
        else:
            pixels = torch.zeros(math.prod(image.grid), *info.shape) if image.grid else torch.zeros(info.shape)
        return (pixels if image.grid else pixels[None]), image.grid


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


def _features(model: nn.Module, pixels: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Of one image `[1, channels, height, width]`, or of patches `[patches, features]` and their grid: `[R, D]`."""
    root: Any = model
    with torch.no_grad(), _own_attention(model):
        pixels = pixels.to(root.device, root.dtype)
        given = {"image_grid_thw": torch.tensor([grid], device=root.device)} if grid else {}
        found = root.get_image_features(pixel_values=pixels, return_dict=True, **given).pooler_output
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
