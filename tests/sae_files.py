"""Small random SAEs of every kind, written in the layouts of Gemma Scope and SAELens, and their formulas by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

FEATURES, K = 24, 5
KINDS = ("standard", "gated", "jumprelu", "topk", "batchtopk")


def weights_of(kind: str, size: int = 32, out: int | None = None, features: int = FEATURES) -> dict[str, Tensor]:
    """As SAELens names them."""
    draw = torch.Generator().manual_seed(len(kind))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    found = {"W_enc": normal(size, features) / size**0.5, "W_dec": normal(features, out or size) / 3}
    found |= {"b_enc": 0.3 * normal(features), "b_dec": 0.5 * normal(out or size)}
    if kind.startswith("jumprelu"):
        found["threshold"] = 0.05 + 0.1 * normal(features).abs()
    elif kind == "batchtopk":
        found["topk_threshold"] = torch.tensor(0.15, dtype=torch.float64)
    elif kind == "gated":
        found["b_gate"] = found.pop("b_enc")
        found |= {"r_mag": 0.3 * normal(features), "b_mag": 0.4 * normal(features)}
    if "skip" in kind:
        found["W_skip"] = normal(out or size, size) / size**0.5
    return found


def config_of(kind: str, weights: dict[str, Tensor], hook: str, **more: Any) -> dict[str, Any]:
    """As SAELens from version 6 on writes it."""
    size, features = weights["W_enc"].shape
    found = {"d_in": size, "d_sae": features, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False}
    found |= {"normalize_activations": "none", "reshape_activations": "none", "architecture": kind}
    found["metadata"] = {"sae_lens_version": "6.54.12", "hook_name": hook, "model_name": "tiny"}
    if kind == "topk":
        found |= {"k": K, "rescale_acts_by_decoder_norm": False}
    return found | more


def write_lens(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "sae_weights.safetensors")
    return folder


def write_gemma_scope(folder: Path, weights: dict[str, Tensor], *, compressed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save: Any = np.savez_compressed if compressed else np.savez
    save(folder / "params.npz", **{name: value.numpy() for name, value in weights.items()})
    return folder


def by_hand(kind: str, weights: dict[str, Tensor], x: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Features and reconstruction of `x` `[..., D]`, written out."""
    w = {name: value.float() for name, value in weights.items()}
    norm = config.get("normalize_activations", "none")
    shift, scale = torch.zeros(1), torch.ones(1)
    if norm == "layer_norm":
        shift = x.mean(-1, keepdim=True)
        scale = (((x - shift) ** 2).sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()
        inner = (x - shift) / (scale + 1e-5)
    elif norm == "constant_norm_rescale":
        scale = (x**2).sum(-1, keepdim=True).sqrt() / x.shape[-1] ** 0.5
        inner = x / scale
    else:
        inner = x
    if config.get("apply_b_dec_to_input"):
        inner = inner - w["b_dec"]
    before = torch.einsum("...d,df->...f", inner, w["W_enc"]) + w["b_gate" if kind == "gated" else "b_enc"]
    lengths = torch.ones(w["W_dec"].shape[0])
    if config.get("rescale_acts_by_decoder_norm"):
        lengths = (w["W_dec"] ** 2).sum(1).sqrt()
    before = before * lengths
    if kind == "gated":
        own = torch.einsum("...d,df->...f", inner, w["W_enc"]) * w["r_mag"].exp() + w["b_mag"]
        features = torch.where(before > 0, own.clamp_min(0), torch.zeros(()))
    elif kind in ("batchtopk", *(one for one in [kind] if one.startswith("jumprelu"))):
        threshold = w["threshold"] if "threshold" in w else w["topk_threshold"]
        features = torch.where(before > threshold, before.clamp_min(0), torch.zeros(()))
    elif kind == "topk":
        kept = before >= before.sort(-1, descending=True).values[..., K - 1 : K]
        features = torch.where(kept, before.clamp_min(0), torch.zeros(()))
    else:
        features = before.clamp_min(0)
    scaled = features * w["scaling_factor"] if "scaling_factor" in w else features
    out = torch.einsum("...f,fe->...e", scaled / lengths, w["W_dec"]) + w["b_dec"]
    out = out * scale + shift if kind in KINDS else out
    if "W_skip" in w:
        out = out + torch.einsum("...d,ed->...e", x, w["W_skip"])
    return features, out
