"""What SAELens makes of its files, polytrace makes of them.

SAELens runs in an environment of its own (`bench.environments`). Where nobody made it these tests are skipped; make it
with `python -c "from bench.environments import SAE_LENS; SAE_LENS.make()"`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hooked import close
from sae_files import config_of, weights_of, write_lens
from safetensors.torch import load_file, save_file

from bench.environments import SAE_LENS
from polytrace.methods import load_sae

TESTS = Path(__file__).resolve().parents[1]
POST, HEADS = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
NORMS: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": True},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": True},
]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{kind} {number}": (kind, more)
    for kind in ("standard", "gated", "jumprelu", "topk")
    for number, more in enumerate(NORMS)
}
CASES |= {kind: (kind, {"d_out": 20}) for kind in ("transcoder", "skip_transcoder", "jumprelu_transcoder")}
CASES |= {
    "topk by decoder": ("topk", {"rescale_acts_by_decoder_norm": True}),
    "heads": ("standard", {"reshape_activations": "hook_z"}),
    "old": ("standard", {"metadata": None, "hook_point": POST, "normalize_activations": False}),
    "old topk": ("topk", {"metadata": None, "hook_point": POST, "activation_fn_str": "topk"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SAEs, and beside each what SAELens made of some activations."""
    python = SAE_LENS.made()
    if python is None:
        pytest.skip("SAELens has no environment here")
    root, made = tmp_path_factory.mktemp("saes"), {}
    draw = torch.Generator().manual_seed(0)
    for name, (kind, more) in CASES.items():
        weights = weights_of(kind, out=more.get("d_out"))
        config = config_of(kind, weights, HEADS if name == "heads" else POST) | more
        if name.startswith("old"):
            del config["metadata"], config["apply_b_dec_to_input"]
        if name == "old topk":
            config |= {"architecture": "standard", "activation_fn_kwargs": {"k": config.pop("k")}}
        made[name] = write_lens(root / name.replace(" ", "_"), config, weights)
        x = torch.randn(3, 7, 32, generator=draw)
        save_file({"x": x.unflatten(-1, (4, 8)).contiguous() if name == "heads" else x}, made[name] / "x.safetensors")
    variables = os.environ | {"PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "peers.autoencoders", *map(str, made.values())]
    ran = subprocess.run(command, cwd=TESTS, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", CASES)
def test_features_and_reconstructions_are_those_of_sae_lens(folders: dict[str, Path], name: str) -> None:
    sae = load_sae(folders[name])
    x, theirs = load_file(folders[name] / "x.safetensors")["x"], load_file(folders[name] / "theirs.safetensors")
    assert 0.02 < float((theirs["features"] > 0).float().mean()) < 0.98
    close(sae.encode(x), theirs["features"])
    close(sae(x), theirs["out"])
