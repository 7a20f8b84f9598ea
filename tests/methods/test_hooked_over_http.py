"""TransformerLens's habits over HTTP, on two stages of two ranks: the same numbers as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from services import PROMPT, Service, make_model, wait_until

import polytrace
from polytrace.methods.transformer_lens import HookedModel

TOLERANCE = 1e-5  # of max(1, max|in one process|), float32


def test_a_cut_model_over_http_gives_what_one_process_gives(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    service = Service(folder, tmp_path, "--stages", "2", "--ranks", "2")
    try:
        with polytrace.load(str(folder), threads=1) as model:
            expected = _results(HookedModel(model))
        wait_until(service.is_ready, 240, service)
        with polytrace.connect(str(service.http.base_url), "tiny", key="sesame") as model:
            found = _results(HookedModel(model))
    finally:
        service.kill_all()
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
