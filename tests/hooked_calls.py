"""TransformerLens's habits, called once on a served model and once in this process."""

from __future__ import annotations

from typing import Any

import torch

from polytrace.methods import HookedModel

PROMPT = [3, 14, 15, 92, 65, 35]
TOLERANCE = 1e-5  # of max(1, max|in one process|), float32


def check_habits(served: Any, world: Any) -> None:
    """Runs, caches, hooks and weights are the same."""
    found, expected = _results(HookedModel(served)), _results(HookedModel(world))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        ours = found[name].masked_fill(found[name].isneginf(), 0.0)
        value = value.masked_fill(value.isneginf(), 0.0)
        assert ours.shape == value.shape, name
        assert (ours - value).abs().max() <= TOLERANCE * max(1.0, float(value.abs().max())), name


def _results(hooked: HookedModel) -> dict[str, Any]:
    prompts = [list(PROMPT), list(PROMPT[::-1])]
    (logits, loss), cache = hooked.run_with_cache(prompts, return_type="both")
    assert hooked.receipt is not None
    assert hooked.receipt.result_bytes == cache.nbytes + logits.numel() * 4 + 4  # what was chosen moved, and no more

    def without_head(value: Any, hook: Any) -> None:
        value[:, :, 3] = 0.0

    def halved(value: Any, hook: Any) -> Any:
        return value * 0.5

    changed = hooked.run_with_hooks(prompts, fwd_hooks=[("blocks.1.attn.hook_z", without_head)])
    assert (changed - logits).abs().max() > 1000 * TOLERANCE
    scaled = hooked.run_with_hooks(prompts, fwd_hooks=[("blocks.2.ln1.hook_scale", halved)], return_type="loss")
    assert abs(scaled - loss) > 1000 * TOLERANCE
    return {
        **dict(cache.items()),
        "logits": logits,
        "loss": loss,
        "without a head": changed,
        "with a halved scale": scaled,
        "heads": cache.stack_head_results(apply_ln=True),
        "parts": cache.get_full_resid_decomposition(pos_slice=-1),
        "attributions": cache.logit_attrs(cache.decompose_resid(), torch.tensor(prompts)),
        "unembedded": hooked.unembed(cache.accumulated_resid(apply_ln=True)),
        "W_U": hooked.W_U,
        "W_K": hooked.W_K,
        "b_O": hooked.b_O,
        "W_gate": hooked.W_gate,
        "OV": hooked.OV.AB,
        "norm": hooked.blocks[3].ln2.w,
    }
