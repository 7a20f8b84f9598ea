"""Whether prompts with images are right in shared passes, on the served weights.

A prompt with an image runs in a pass, and as transformers runs the model. They differ where a family lets the rows of
an image see each other, or does more with an image than to put its features into the prompt. The request is made here,
as data: nothing is recorded, so whoever only serves models has no client.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from engine.image_rows import CALLED
from engine.manners import attention_of, use_attention
from engine.relations import largest_gap
from polytrace.backend import Backend
from polytrace.constants import Constants
from polytrace.description import ImageInfo, ModelDescription
from polytrace.errors import PolytraceError, ServiceError
from polytrace.graph import Graph, Invoke, NodeId, Port, Read, Ref, Request, Save, Site
from polytrace.image_prompts import with_images
from polytrace.images import GRIDS, PIXELS

_WHERE = "the gate of images"


def check_images(backend: Backend, model: nn.Module, info: ImageInfo) -> None:
    """ServiceError unless the logits of a prompt with an image are those of the model as transformers runs it."""
    root: Any = model
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    given, rows = _some_image(info, generator)
    size = root.config.get_text_config().vocab_size
    texts = [token for token in torch.randint(0, size, (12,), generator=generator).tolist() if token != info.token]
    prompt = [*texts[:3], *[info.token] * rows, *texts[3:]]
    try:
        found = backend.run(_reading_logits(prompt, given, backend.describe())).values["logits"]
    except PolytraceError as error:
        raise ServiceError(f"{name} does not take images in shared passes: {error}; {CALLED}") from error
    before = attention_of(root)
    use_attention(root, "sdpa" if root._supports_sdpa else "eager")
    try:
        with torch.no_grad():
            ids = torch.tensor([prompt], device=root.device)
            own = {name: value.to(root.device) for name, value in given.items()}
            own[PIXELS] = own[PIXELS].to(root.dtype)
            if info.merge:
                own["mm_token_type_ids"] = (ids == info.token).int()
            expected = root(input_ids=ids, use_cache=False, **own).logits.float()
    finally:
        use_attention(root, before)
    far = float((found.float() - expected.cpu()).abs().max()) / max(1.0, float(expected.abs().max()))
    if not far <= largest_gap(root.dtype):
        raise ServiceError(
            f"{name} has other logits in shared passes than alone when a prompt has an image: they differ by {far:.2g} "
            f"of the largest; {CALLED}"
        )


def _reading_logits(prompt: list[int], given: dict[str, Tensor], description: ModelDescription) -> Request:
    """What asks for the logits of a prompt with an image."""
    constants = Constants()
    invoke = with_images(Invoke(sequences=(tuple(prompt),)), given, description, constants, _WHERE)
    site = Site(module="", port=Port.OUTPUT, selector=("logits",))
    graph = Graph(
        nodes=(Read(site=site, invoke=0, where=_WHERE), Save(name="logits", value=Ref(NodeId(0)), where=_WHERE))
    )
    return Request(graph=graph, invokes=(invoke,), constants=constants.tensors)


def _some_image(info: ImageInfo, generator: torch.Generator) -> tuple[dict[str, Tensor], int]:
    """What a processor would give for an image, and how many rows it is."""
    if not info.merge:
        return {PIXELS: torch.randn(1, *info.shape, generator=generator)}, info.rows
    grid = (1, 2 * info.merge, 3 * info.merge)
    patches = torch.randn(math.prod(grid), *info.shape, generator=generator)
    return {PIXELS: patches, GRIDS: torch.tensor([grid])}, 6
