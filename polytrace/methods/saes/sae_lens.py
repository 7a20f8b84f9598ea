"""What a `cfg.json` of SAELens means, of its versions before 6 too.

https://github.com/decoderesearch/SAELens (read as of 6.54). Raises GraphError for what is not known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from polytrace.errors import GraphError
from polytrace.methods.saes.places import LayerPoint, place_of_hook

_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_BATCHED = ("batchtopk", "matryoshka_batchtopk")  # of training; what is encoded later is above its threshold
_VECTORS = {
    "standard": ("b_enc",),
    "gated": ("b_gate", "r_mag", "b_mag"),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
}
_RUN_TIME_NORMS = ("none", "layer_norm", "constant_norm_rescale")


@dataclass(kw_only=True)
class Meaning:
    """What a configuration says of an SAE, in the words of `SparseAutoencoder`."""

    architecture: str
    d_in: int | None = None
    d_sae: int | None = None
    d_out: int | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = False
    rescale_by_decoder_norm: bool = False
    normalize: str = "none"
    needs_factor: bool = False  # inputs were multiplied by a number that is not in the files
    is_finetuned: bool = False
    is_transcoder: bool = False
    has_one_threshold: bool = False
    site: LayerPoint | None = None
    gives: LayerPoint | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names in the file of what has a number for each feature, or one for all."""
        return ("b_enc", "topk_threshold") if self.has_one_threshold else _VECTORS[self.architecture]


def meaning_of(config: dict[str, Any], where: str) -> Meaning:
    """Checks and reads a configuration."""
    told = {_OLD_NAMES.get(name, name): value for name, value in config.items()}
    metadata = told.get("metadata")
    told = {**(metadata if isinstance(metadata, dict) else {}), **told}
    kind = str(told.get("architecture", "standard"))
    activation, settings = told.get("activation_fn", "relu"), told.get("activation_fn_kwargs") or {}
    if kind == "standard" and activation == "topk":
        kind, told["k"] = "topk", settings.get("k") if isinstance(settings, dict) else None
    elif activation not in ("relu", "topk"):
        raise GraphError(f"cfg.json says the activation {activation!r}; known are relu and topk", where=where)
    is_transcoder, is_batched = kind in _TRANSCODERS, kind in _BATCHED
    architecture = "jumprelu" if is_batched else _TRANSCODERS.get(kind, kind)
    if architecture not in _VECTORS:
        known = ", ".join([*_VECTORS, *_BATCHED, *_TRANSCODERS])
        raise GraphError(f"cfg.json says the architecture {kind!r}; known are {known}", where=where)
    normalize = told.get("normalize_activations")
    if isinstance(normalize, bool) or normalize is None:
        normalize = "expected_average_only_in" if normalize else "none"
    needs_factor = normalize == "expected_average_only_in"
    if not needs_factor and normalize not in _RUN_TIME_NORMS:
        raise GraphError(
            f"cfg.json says normalize_activations {normalize!r}; known are {', '.join(_RUN_TIME_NORMS)} and "
            "expected_average_only_in, and others have to be folded into the weights before they are saved",
            where=where,
        )
    if told.get("hook_head_index") is not None:
        raise GraphError("cfg.json says that it is of one head (hook_head_index), which is not read", where=where)
    if told.get("reshape_activations", "none") not in ("none", "hook_z"):
        told_of = told["reshape_activations"]
        raise GraphError(f"cfg.json says reshape_activations {told_of!r}; known are none and hook_z", where=where)
    site = place_of_hook(told.get("hf_hook_name")) or place_of_hook(told.get("hook_name"))
    gives = place_of_hook(told.get("hf_hook_name_out")) or place_of_hook(told.get("hook_name_out"))
    return Meaning(
        architecture=architecture,
        d_in=_size(told, "d_in", where),
        d_sae=_size(told, "d_sae", where),
        d_out=_size(told, "d_out", where) if is_transcoder else None,
        k=_size(told, "k", where) if architecture == "topk" else None,
        apply_b_dec_to_input=bool(told.get("apply_b_dec_to_input", not is_transcoder)),
        rescale_by_decoder_norm=(architecture == "topk" or is_batched)
        and bool(told.get("rescale_acts_by_decoder_norm", False)),
        normalize="none" if needs_factor else normalize,
        needs_factor=needs_factor,
        is_finetuned=bool(told.get("finetuning_scaling_factor", False)),
        is_transcoder=is_transcoder,
        has_one_threshold=is_batched,
        site=site,
        gives=gives if is_transcoder else None,
        config=told,
    )


def _size(told: dict[str, Any], name: str, where: str) -> int:
    found = told.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise GraphError(f"cfg.json has no {name} that is a size; it says {found!r}", where=where)
    return found
