"""Whether prompts with images are right in shared passes, on the served weights.

A prompt with an image runs in a pass, and as transformers runs the model. They differ where a family lets the rows of
an image see each other, or does more with an image than to put its features into the prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.image_rows import CALLED
from engine.manners import attention_of, use_attention
from polytrace.backend import Backend
from polytrace.description import ImageInfo
from polytrace.errors import PolytraceError, ServiceError
from polytrace.model import Model

_TOLERANCE = 1e-3  # of the largest logit, as for models that run each sequence alone


def check_images(backend: Backend, model: nn.Module, info: ImageInfo) -> None:
    """ServiceError unless the logits of a prompt with an image are those of the model as transformers runs it."""
    root: Any = model
    name = type(model).__name__
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, *info.shape, generator=generator)
    size = root.config.get_text_config().vocab_size
    texts = [token for token in torch.randint(0, size, (12,), generator=generator).tolist() if token != info.token]
    prompt = [*texts[:3], *[info.token] * info.rows, *texts[3:]]
    served: Any = Model(backend)
    try:
        with served.trace(prompt, pixel_values=pixels):
            found = served.output.logits.save()
    except PolytraceError as error:
        raise ServiceError(f"{name} does not take images in shared passes: {error}; {CALLED}") from error
    own = attention_of(root)
    use_attention(root, "sdpa" if root._supports_sdpa else "eager")
    try:
        with torch.no_grad():
            ids = torch.tensor([prompt], device=root.device)
            given = pixels.to(root.device, root.dtype)
            expected = root(input_ids=ids, pixel_values=given, use_cache=False).logits.float()
    finally:
        use_attention(root, own)
    far = float((found.float() - expected.cpu()).abs().max()) / max(1.0, float(expected.abs().max()))
    if not far <= max(_TOLERANCE, 8 * torch.finfo(root.dtype).eps):
        raise ServiceError(
            f"{name} has other logits in shared passes than alone when a prompt has an image: they differ by {far:.2g} "
            f"of the largest; {CALLED}"
        )
