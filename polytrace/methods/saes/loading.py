"""Sparse autoencoders from files: Gemma Scope's layouts and SAELens's, in a folder or in the hub's cache.

Owns what the files' configurations mean. What is in them is data: no pickle is read and nothing is evaluated; shapes
are checked against each other and against the configuration before numbers are read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.imports import needs_torch
from polytrace.methods.saes.autoencoder import SparseAutoencoder
from polytrace.methods.saes.hub import from_hub
from polytrace.methods.saes.places import LayerPoint, layer_of_folder, place_of_folder, place_of_hook
from polytrace.methods.saes.sae_lens import Meaning, meaning_of
from polytrace.methods.saes.tensor_files import NpzFile, SafetensorsFile, TensorFile

LAYOUTS = (("cfg.json", "sae_weights.safetensors"), ("params.npz",), ("config.json", "params.safetensors"))
_MAX_BYTES = 64 << 30
_CONFIG_BYTES = 1 << 20
_IGNORED = ("scaling_factor", "finetuning_scaling_factor", "topk_threshold", "log_sparsity", "sparsity")


def load_sae(
    source: str | os.PathLike[str],
    folder: str = "",
    *,
    point: str | None = None,
    layer: int | None = None,
    dtype: str = "float32",
    norm_scaling_factor: float | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_bytes: int = _MAX_BYTES,
) -> SparseAutoencoder:
    """A sparse autoencoder or transcoder of `source`: a local folder, or a repository of the hub, and a folder in it.

    `load_sae("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")`. Read are

    - Gemma Scope's `params.npz`, JumpReLU (Lieberum et al. 2024, arXiv:2408.05147), with the place from the names of
      repository and folder, and Gemma Scope 2's `config.json` with `params.safetensors`;
    - SAELens's `cfg.json` with `sae_weights.safetensors`: standard, gated, jumprelu, topk, batch-top-k with its
      threshold, and transcoders.

    `point`, `layer`: where it belongs, if its names do not say it, or say it otherwise. `dtype`: of the weights, in
    which it computes. `norm_scaling_factor`: of an SAE whose cfg says "expected_average_only_in", what its inputs were
    multiplied with in training; it is folded in. `cache_dir`: of the hub, by default its own. Raises GraphError for
    files that are none of these, TooLargeError for more than `max_bytes`.
    """
    torch, where = needs_torch("load_sae"), user_line()
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise GraphError(f"dtype is float32, bfloat16, float16 or float64, not {dtype!r}", where=where)
    path = Path(source) / folder
    if not path.is_dir():
        path = from_hub(os.fspath(source), folder, LAYOUTS, revision, cache_dir, where)
    layout = next((own for own in LAYOUTS if all((path / name).is_file() for name in own)), None)
    if layout is None:
        told = ", ".join(" with ".join(own) for own in LAYOUTS)
        raise GraphError(f"{path} has no files of an SAE that are known: {told}", where=where)
    name = f"{os.fspath(source)}/{folder}".replace(os.sep, "/").rstrip("/")
    file: TensorFile
    if layout[-1].endswith(".npz"):
        file = NpzFile(path / layout[-1], max_bytes, where)
        meaning = _of_gemma_scope(name, {}, where)
    else:
        file = SafetensorsFile(path / layout[-1], max_bytes, where)
        config = _config(path / layout[0], where)
        is_lens = layout[0] == "cfg.json"
        meaning = meaning_of(config, where) if is_lens else _of_gemma_scope(name, config, where)
    if point is not None or layer is not None:
        number = layer if layer is not None else (meaning.site.layer if meaning.site else layer_of_folder(name))
        own = point or (meaning.site.point if meaning.site else None)
        if number is None or own is None:
            told = "which layer it is of: give layer=" if number is None else "which point it is of: give point="
            raise GraphError(f"its files do not say {told} too", where=where)
        meaning.site = LayerPoint(own, number)
    return _built(file, meaning, norm_scaling_factor, kind, where)


def _of_gemma_scope(name: str, config: dict[str, Any], where: str) -> Meaning:
    if "embedding" in name.split("/"):
        told = "Gemma Scope's SAEs of the embedding are of its output times the square root of its size"
        raise GraphError(f"{told}, which is no named point", where=where)
    if config.get("architecture", "jump_relu") != "jump_relu":
        told = f"config.json says {config['architecture']!r}"
        raise GraphError(f"{told}; Gemma Scope's are 'jump_relu'", where=where)
    hook, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    layer = layer_of_folder(name) if "-transcoders/" in name else None  # what those of Gemma Scope take is not said
    return Meaning(
        architecture="jumprelu",
        site=place_of_hook(hook) or place_of_folder(name),
        is_transcoder=hook_out is not None or layer is not None,
        gives=LayerPoint("mlp_added", layer) if layer is not None else place_of_hook(hook_out),
        config={**config, "hook_name": hook, "hook_name_out": hook_out},
    )


def _built(
    file: TensorFile, meaning: Meaning, norm_scaling_factor: float | None, dtype: Any, where: str
) -> SparseAutoencoder:
    shapes = dict(file.shapes)
    skip = next((name for name in ("W_skip", "affine_skip_connection") if name in shapes), None)
    names = ["W_enc", "W_dec", "b_dec", *meaning.vectors]
    _check_shapes(file, names, meaning, where)
    known = {*names, *_IGNORED, *([skip] if skip else [])}
    if unknown := sorted(shapes.keys() - known):
        told = f"{file.path} has {', '.join(unknown[:5])}"
        raise GraphError(f"{told}, which an SAE of kind {meaning.architecture!r} has not", where=where)
    if skip is not None and not meaning.is_transcoder:
        raise GraphError(f"{file.path} has {skip}, and nothing says that it is a transcoder", where=where)
    found = {name: file.read(name, dtype) for name in names}
    if skip is not None:
        own = file.read(skip, dtype)
        found["W_skip"] = own if skip == "W_skip" else own.T.contiguous()  # Gemma Scope's is [in, out]
    if meaning.has_one_threshold:
        found["threshold"] = found.pop("topk_threshold").expand(found["b_enc"].shape[0]).contiguous()
    if meaning.architecture == "gated":
        found["b_enc"] = found.pop("b_gate")
    scaling = _scaling(file, shapes, meaning, dtype, where)
    _fold(found, meaning, norm_scaling_factor, where)
    return SparseAutoencoder(
        **found,
        architecture=meaning.architecture,
        k=meaning.k,
        scaling=scaling,
        apply_b_dec_to_input=meaning.apply_b_dec_to_input,
        rescale_by_decoder_norm=meaning.rescale_by_decoder_norm,
        normalize=meaning.normalize,
        site=meaning.site,
        is_transcoder=meaning.is_transcoder,
        gives=meaning.gives,
        config=meaning.config,
    )


def _check_shapes(file: TensorFile, names: list[str], meaning: Meaning, where: str) -> None:
    """All shapes follow from W_enc's and W_dec's, and these from the configuration's numbers."""
    shapes = file.shapes
    for name in names:
        if name not in shapes:
            told = f"{file.path} has no {name}; it has {', '.join(sorted(shapes)) or 'nothing'}"
            raise GraphError(told, where=where)
    for name in ("W_enc", "W_dec"):
        if len(shapes[name]) != 2 or 0 in shapes[name]:
            raise GraphError(f"{name} in {file.path} has the shape {list(shapes[name])}, not two sizes", where=where)
    size, features = shapes["W_enc"]
    out = shapes["W_dec"][1]
    wanted: dict[str, tuple[int, ...]] = {}
    wanted |= {"W_enc": (meaning.d_in or size, meaning.d_sae or features), "W_dec": (features, meaning.d_out or out)}
    wanted |= {"b_dec": (out,)}
    wanted |= {name: () if name == "topk_threshold" else (features,) for name in meaning.vectors}
    wanted |= {"W_skip": (out, size)} if "W_skip" in shapes else {}
    wanted |= {"affine_skip_connection": (size, out)} if "affine_skip_connection" in shapes else {}
    for name, shape in wanted.items():
        if tuple(shapes[name]) != shape:
            told = f"{name} in {file.path} has the shape {list(shapes[name])}, not {list(shape)}"
            raise GraphError(told, where=where)
    if not meaning.is_transcoder and out != size:
        raise GraphError(f"{file.path} takes {size} numbers and gives {out}: it is no autoencoder", where=where)


def _scaling(file: TensorFile, shapes: dict[str, Any], meaning: Meaning, dtype: Any, where: str) -> Any:
    """Of finetuning. All ones, which SAELens wrote for a time, is none."""
    name = next((own for own in ("finetuning_scaling_factor", "scaling_factor") if own in shapes), None)
    if name is None:
        return None
    if tuple(shapes[name]) != (shapes["W_enc"][1],):
        told = f"{name} in {file.path} has the shape {list(shapes[name])}, not {[shapes['W_enc'][1]]}"
        raise GraphError(told, where=where)
    found = file.read(name, dtype)
    if bool((found == 1).all()):
        return None
    if not meaning.is_finetuned:
        told = f"{file.path} has a {name} that is not 1, and its cfg says that it was not finetuned"
        raise GraphError(f"{told} (finetuning_scaling_factor)", where=where)
    return found


def _fold(found: dict[str, Any], meaning: Meaning, factor: float | None, where: str) -> None:
    if meaning.needs_factor:
        if factor is None or not factor > 0:
            raise GraphError(
                "this SAE was trained on activations of a mean length of its own (normalize_activations: "
                "'expected_average_only_in'), and its files do not say by what they were multiplied: give "
                "norm_scaling_factor= (1.0 where it is folded in already)",
                where=where,
            )
        found["W_enc"] = found["W_enc"] * factor
        found["W_dec"] = found["W_dec"] / factor
        found["b_dec"] = found["b_dec"] / factor
        if meaning.rescale_by_decoder_norm and "threshold" in found:  # it is in units of the decoder's rows
            found["threshold"] = found["threshold"] / factor
    elif factor is not None:
        told = "norm_scaling_factor is for an SAE whose cfg says 'expected_average_only_in'"
        raise GraphError(f"{told}, and this one says {meaning.normalize!r}", where=where)


def _config(path: Path, where: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > _CONFIG_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise GraphError(f"{path} is no configuration of an SAE: {error}", where=where) from None
    if not isinstance(found, dict):
        raise GraphError(f"{path} is no configuration of an SAE: it is a {type(found).__name__}", where=where)
    return found
