"""Where a model keeps what every decoder has: embedding, list of layers, final norm, head. Found by structure."""

from __future__ import annotations

from transformers import PreTrainedModel

from engine.anatomy import Anatomy


def find_standard_modules(model: PreTrainedModel, layers: str, anatomy: Anatomy) -> dict[str, str]:
    """Standard names and the paths that they lead to; a name is missing where the model has no such module."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = {
        "embed_tokens": paths.get(id(model.get_input_embeddings())),
        "layers": layers,
        "ln_final": anatomy.final_norm,
        "lm_head": paths.get(id(model.get_output_embeddings())),
    }
    return {name: path for name, path in found.items() if path is not None}
