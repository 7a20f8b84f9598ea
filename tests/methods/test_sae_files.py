"""Files of SAEs: what Gemma Scope and SAELens write is read; what is malformed is a clear error, and unrun."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hooked import close
from numpy.lib import format as npy
from sae_files import KINDS, by_hand, config_of, weights_of, write_gemma_scope, write_lens
from safetensors.torch import save_file

from polytrace.errors import GraphError, TooLargeError
from polytrace.methods import LayerPoint, load_sae

X = torch.randn(5, 32, generator=torch.Generator().manual_seed(7))
HOOK = "blocks.3.hook_resid_post"


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("repository", "point"),
    [("gemma-scope-2b-pt-res", "resid_post"), ("gemma-scope-9b-pt-mlp", "mlp_added"), ("gemma-scope-9b-it-att", "z")],
)
def test_gemma_scopes_folders_say_where_an_sae_belongs(
    tmp_path: Path, repository: str, point: str, compressed: bool
) -> None:
    weights = weights_of("jumprelu")
    folder = "layer_20/width_16k/average_l0_71"
    write_gemma_scope(tmp_path / repository / folder, weights, compressed=compressed)
    for sae in (load_sae(tmp_path / repository, folder), load_sae(tmp_path / repository / folder)):
        assert sae.architecture == "jumprelu" and sae.site == LayerPoint(point, 20)
        features, own = by_hand("jumprelu", weights, X, {})
        close(sae.encode(X), features)
        close(sae(X), own)
        assert (features > 0).any()


def test_a_folder_without_a_name_says_its_layer_alone(tmp_path: Path) -> None:
    write_gemma_scope(tmp_path / "layer_7/width_16k", weights_of("jumprelu"))
    assert load_sae(tmp_path / "layer_7/width_16k").site is None
    assert load_sae(tmp_path, "layer_7/width_16k", point="resid_pre").site == LayerPoint("resid_pre", 7)
    assert load_sae(tmp_path, "layer_7/width_16k", point="z", layer=2).site == LayerPoint("z", 2)
    with pytest.raises(GraphError, match="which point it is of: give point= too"):
        load_sae(tmp_path, "layer_7/width_16k", layer=3)
    with pytest.raises(GraphError, match="which layer it is of: give layer= too"):
        load_sae(write_gemma_scope(tmp_path / "nowhere", weights_of("jumprelu")), point="z")
    folder = write_gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders/layer_4/width_16k", weights_of("jumprelu"))
    sae = load_sae(folder)
    assert sae.is_transcoder and sae.site is None and sae.gives == LayerPoint("mlp_added", 4)
    assert sae.at("mlp_input", 4).gives == LayerPoint("mlp_added", 4)
    write_gemma_scope(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k", weights_of("jumprelu"))
    with pytest.raises(GraphError, match="square root"):
        load_sae(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k")


def test_gemma_scope_2_is_read(tmp_path: Path) -> None:
    weights = weights_of("jumprelu_skip_transcoder", out=48)
    folder = tmp_path / "transcoder/layer_9_width_16k_l0_small_affine"
    folder.mkdir(parents=True)
    named = {name.lower().replace("w_skip", "affine_skip_connection"): value for name, value in weights.items()}
    named["affine_skip_connection"] = weights["W_skip"].T.contiguous()
    save_file(named, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output"}
    config["hf_hook_point_out"] = "model.layers.9.post_feedforward_layernorm.output"
    (folder / "config.json").write_text(json.dumps(config))
    sae = load_sae(folder)
    assert (sae.site, sae.gives) == (LayerPoint("mlp_input", 9), LayerPoint("mlp_added", 9))
    close(sae(X), by_hand("jumprelu_skip_transcoder", weights, X, {})[1])


@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_files_before_version_6_mean_what_they_meant(tmp_path: Path, kind: str) -> None:
    """Flat, with other names; b_dec is taken from the input unless it is said; topk is an activation."""
    weights = weights_of(kind)
    config: dict[str, Any] = {"d_in": 32, "d_sae": 24, "dtype": "float32", "hook_point": HOOK, "architecture": kind}
    config |= {"normalize_activations": False, "hook_point_head_index": None, "activation_fn_str": "relu"}
    if kind == "topk":
        config |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}
    elif kind == "standard":
        del config["architecture"]
        weights["scaling_factor"] = torch.ones(24)
    sae = load_sae(write_lens(tmp_path, config, weights))
    assert sae.site == LayerPoint("resid_post", 3) and sae.scaling is None
    features, own = by_hand(kind, weights, X, {"apply_b_dec_to_input": True})
    close(sae.encode(X), features)
    close(sae(X), own)


def test_finetuned_and_normed_weights_are_scaled(tmp_path: Path) -> None:
    weights = weights_of("standard") | {"scaling_factor": 1 + torch.rand(24)}
    config = config_of("standard", weights, HOOK, finetuning_scaling_factor=True)
    sae = load_sae(write_lens(tmp_path / "a", config, weights))
    close(sae(X), by_hand("standard", weights, X, config)[1])
    assert (sae(X) - by_hand("standard", weights_of("standard"), X, config)[1]).abs().max() > 0.1
    with pytest.raises(GraphError, match="says that it was not finetuned"):
        load_sae(write_lens(tmp_path / "b", config_of("standard", weights, HOOK), weights))

    for kind in ("jumprelu", "batchtopk"):
        weights = weights_of(kind)
        told = {"normalize_activations": "expected_average_only_in"}
        told |= {"rescale_acts_by_decoder_norm": True} if kind == "batchtopk" else {}
        folder = write_lens(tmp_path / kind, config_of(kind, weights, HOOK, **told), weights)
        with pytest.raises(GraphError, match="give norm_scaling_factor="):
            load_sae(folder)
        features, own = by_hand(kind, weights, X * 1.7, {"rescale_acts_by_decoder_norm": kind == "batchtopk"})
        sae = load_sae(folder, norm_scaling_factor=1.7)
        close(sae(X), own / 1.7)
        assert torch.equal(sae.encode(X) > 0, features > 0) and 0 < int((features > 0).sum()) < features.numel()


def test_features_in_units_of_their_decoder_are_scaled(tmp_path: Path) -> None:
    weights = weights_of("topk")
    config = config_of("topk", weights, HOOK, rescale_acts_by_decoder_norm=True)
    sae = load_sae(write_lens(tmp_path, config, weights))
    features, own = by_hand("topk", weights, X, config)
    close(sae.encode(X), features)
    close(sae(X), own)
    assert not torch.equal(features > 0, by_hand("topk", weights, X, {})[0] > 0)


def test_weights_may_be_of_half_precision(tmp_path: Path) -> None:
    weights = {name: value.bfloat16() for name, value in weights_of("standard").items()}
    folder = write_lens(tmp_path, config_of("standard", weights, HOOK), weights)
    close(load_sae(folder).encode(X), by_hand("standard", weights, X, {})[0])
    assert load_sae(folder, dtype="bfloat16").W_enc.dtype is torch.bfloat16
    with pytest.raises(GraphError, match="dtype is float32"):
        load_sae(folder, dtype="int8")


# --- malformed


class _Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def archive(path: Path, **entries: bytes) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path / "params.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(f"{name}.npy", data)
    return path


def header(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    written = io.BytesIO()
    npy.write_array_header_1_0(written, {"descr": kind, "fortran_order": False, "shape": shape})
    return written.getvalue()


def test_a_pickle_in_an_archive_is_refused_unrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "layer_1"
    folder.mkdir()
    np.savez(folder / "params.npz", W_enc=np.array([_Trap()], dtype=object))
    with pytest.raises(GraphError, match="no npz file of numbers: it holds object"):
        load_sae(folder)
    assert not (tmp_path / "trapped").exists()


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="bytes for 4,000,000,000,000 of numbers"):
        load_sae(archive(tmp_path / "a", W_enc=header((1_000_000, 1_000_000))))
    with pytest.raises(TooLargeError, match=r"bytes of numbers; at most 1,000,000 are read"):
        zeros = header((2048, 2048)) + bytes(2048 * 2048 * 4)
        load_sae(archive(tmp_path / "b", W_enc=zeros), max_bytes=1_000_000)
    with pytest.raises(GraphError, match="no npz file of numbers"):
        load_sae(archive(tmp_path / "c", W_enc=b"\x93NUMPY\x02\x00\xff\xff\xff\x7f"))
    with pytest.raises(GraphError, match="no npz file of numbers"):
        long = b"{" + b" " * 200_000 + b"}\n"
        load_sae(archive(tmp_path / "d", W_enc=b"\x93NUMPY\x02\x00" + len(long).to_bytes(4, "little") + long))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "params.npz").write_bytes(b"PK no archive")
    with pytest.raises(GraphError, match="no npz file of numbers"):
        load_sae(tmp_path / "e")
    weights = weights_of("standard")
    folder = write_lens(tmp_path / "f", config_of("standard", weights, HOOK), weights)
    with pytest.raises(TooLargeError, match="at most 1,000 are read"):
        load_sae(folder, max_bytes=1000)
    (folder / "sae_weights.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(GraphError, match="no safetensors file"):
        load_sae(folder)


def test_shapes_and_names_are_checked(tmp_path: Path) -> None:
    weights = weights_of("jumprelu")
    short = {name: value for name, value in weights.items() if name != "threshold"}
    with pytest.raises(GraphError, match=r"has no threshold; it has W_dec, W_enc, b_dec, b_enc"):
        load_sae(write_gemma_scope(tmp_path / "a", short))
    with pytest.raises(GraphError, match=r"b_enc in .* has the shape \[23\], not \[24\]"):
        load_sae(write_gemma_scope(tmp_path / "b", weights | {"b_enc": weights["b_enc"][:23]}))
    with pytest.raises(GraphError, match=r"W_dec in .* has the shape \[32, 24\], not \[24, 24\]"):
        load_sae(write_gemma_scope(tmp_path / "c", weights | {"W_dec": weights["W_dec"].T}))
    with pytest.raises(GraphError, match=r"has W_other, which an SAE of kind 'jumprelu' has not"):
        load_sae(write_gemma_scope(tmp_path / "d", weights | {"W_other": weights["b_enc"]}))
    with pytest.raises(GraphError, match=r"W_enc in .* has the shape \[24\], not two sizes"):
        load_sae(write_gemma_scope(tmp_path / "e", weights | {"W_enc": weights["b_enc"]}))
    config = config_of("jumprelu", weights, HOOK)
    with pytest.raises(GraphError, match=r"W_enc in .* has the shape \[32, 24\], not \[32, 25\]"):
        load_sae(write_lens(tmp_path / "f", config | {"d_sae": 25}, weights))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal'; known are standard"),
        ({"activation_fn": "tanh-relu"}, "activation 'tanh-relu'"),
        ({"normalize_activations": "covariance_whitening"}, "'covariance_whitening'; known are none"),
        ({"d_in": "many"}, "no d_in that is a size; it says 'many'"),
        ({"d_sae": -1}, "no d_sae that is a size; it says -1"),
        ({"hook_head_index": 3}, "of one head"),
        ({"reshape_activations": "backwards"}, "'backwards'"),
        ({"architecture": "topk", "k": None}, "no k that is a size"),
    ],
)
def test_a_configuration_that_is_not_known_is_told(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    weights = weights_of("standard")
    with pytest.raises(GraphError, match=message):
        load_sae(write_lens(tmp_path, config_of("standard", weights, HOOK) | said, weights))


def test_no_files_and_no_json_are_told(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="no files of an SAE that are known"):
        load_sae(tmp_path)
    weights = weights_of("standard")
    folder = write_lens(tmp_path / "a", {}, weights)
    for text, message in (("[]", "it is a list"), ("{", "no configuration of an SAE"), ("[" * 100_000, "no config")):
        (folder / "cfg.json").write_text(text)
        with pytest.raises(GraphError, match=message) as caught:
            load_sae(folder)
        assert "test_sae_files.py" in str(caught.value.where)


# --- the hub's cache


def cached(cache: Path, repository: str, folder: str, made: Path) -> None:
    """As huggingface_hub lays it out."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    target = root / "snapshots" / "0123456789abcdef0123456789abcdef01234567" / folder
    target.mkdir(parents=True)
    for file in made.iterdir():
        file.rename(target / file.name)


def test_a_hubs_repository_is_read_from_its_cache(tmp_path: Path) -> None:
    weights = weights_of("jumprelu")
    made = write_gemma_scope(tmp_path / "made", weights)
    cached(tmp_path / "cache", "google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_59", made)
    sae = load_sae("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_59", cache_dir=tmp_path / "cache")
    assert sae.site == LayerPoint("resid_post", 3)
    close(sae(X), by_hand("jumprelu", weights, X, {})[1])
    made = write_lens(tmp_path / "lens", config_of("jumprelu", weights, "blocks.5.hook_mlp_out"), weights)
    cached(tmp_path / "cache", "someone/saes", "", made)
    assert load_sae("someone/saes", cache_dir=tmp_path / "cache").site == LayerPoint("mlp_added", 5)


def test_what_the_cache_has_not_is_told_offline(tmp_path: Path) -> None:
    """Tests run with HF_HUB_OFFLINE=1: `conftest.py`."""
    with pytest.raises(GraphError, match=r"HF_HUB_OFFLINE"):
        load_sae("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_59", cache_dir=tmp_path)
    with pytest.raises(GraphError, match=r"there is no folder .*nowhere, and a hub's id is owner/name"):
        load_sae("nowhere")
