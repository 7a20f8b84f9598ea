"""Methods of sparse autoencoders, called once on a served tinyworld and once in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hooked import close
from sae_files import config_of, weights_of, write_gemma_scope, write_lens

from polytrace.methods import (
    ablate_features,
    load_sae,
    sae_features,
    sae_quality,
    splice_sae,
    steer_features,
    top_activations,
)

FEATURES = 4096
PROMPTS = ["The Eiffel Tower is in the city of", "The capital city of the Netherlands is", "The Colosseum stands in"]


def check_saes(there: Any, here: Any, folder: Path) -> None:
    """The same numbers; weights are uploaded once, and little comes back."""
    weights = weights_of("jumprelu", size=256, features=FEATURES)
    wide = load_sae(write_gemma_scope(folder / "gemma-scope-tiny-pt-res/layer_5/width_4k", weights))
    small = weights_of("topk", size=256)
    heads = config_of("topk", small, "blocks.2.attn.hook_z", reshape_activations="hook_z")
    of_heads = load_sae(write_lens(folder / "heads", heads, small))
    found: dict[str, dict[str, Any]] = {}
    for name, model in (("here", here), ("there", there)):
        own = found[name] = {}
        one, two = sae_features(model, PROMPTS, wide, top_k=8), sae_features(model, PROMPTS[::-1], wide, top_k=8)
        own["strongest"], own["numbers"] = one.activation.fillna(-1.0), one.feature
        own["chosen"] = sae_features(model, PROMPTS, wide, features=[3, 4001], positions=[-1, 2]).activation
        own["heads"] = sae_features(model, PROMPTS, of_heads, features=range(24), positions=-1).activation
        own["examples"] = top_activations(model, PROMPTS, wide, [3, 4001], 4).activation
        own["quality"] = sae_quality(model, PROMPTS, wide, start=1)
        edits = {
            "spliced": splice_sae(model, of_heads, positions=-1),
            "steered": steer_features(model, wide, [3, 4001], [30.0, 20.0], positions=-1, name="louder"),
            "ablated": ablate_features(model, wide, one.feature.values[0, -1].tolist()),
        }
        for edit, edited in edits.items():
            with edited.trace(PROMPTS):
                own[edit] = edited.lm_head.output[:, -1, :200].save()
        with model.trace(PROMPTS, edits=["louder"]):
            own["by name"] = model.lm_head.output[:, -1, :200].save()
        with model.trace(PROMPTS):
            plain = model.lm_head.output[:, -1, :200].save()
        for edit in edits:
            assert float((own[edit] - plain).abs().max()) > 0.1, edit
        tokens = one.receipt.tokens
        assert one.receipt.result_bytes == tokens * 8 * 8, "8 bytes a token and rank"
        assert two.receipt.loaded_bytes == 0, "the weights are where they were"
        if name == "there":
            assert one.receipt.loaded_bytes >= weights["W_enc"].nbytes
            moved = one.receipt.carried_bytes + one.receipt.gathered_bytes
            assert moved < tokens * FEATURES * 4, "no token's features go from shard to shard"
    for name, mine in found["there"].items():
        theirs = found["here"][name]
        close(mine, theirs if isinstance(theirs, torch.Tensor) else torch.tensor(theirs.values))
