"""Models of a folder or hub that are called as they are: classes of transformers, and of diffusers where it is there.

Owns which sources these are: those whose configuration names a class that is no language model of transformers', nor
the body of one. They are loaded by their library, from safetensors alone, and stay as they are.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

from engine.loading import ShardConfig, quiet_transformers, resolve_dtype_of
from engine.offload_folder import OffloadFolder
from engine.whole_places import check_gpus, check_parts, on_host, quiet_accelerate, spread
from polytrace.device_maps import DeviceMap
from polytrace.errors import ServiceError


def whole_class(source: str) -> Any:
    """The class of a model that is called as it is; None of one that is served as a language model."""
    if (kind := _diffusion_class(source)) is not None:
        return kind
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        return None  # whoever reads it as a language model says what is wrong
    named = (config.architectures or [None])[0]
    kind = getattr(transformers, named, None) if named is not None else None
    if kind is None:
        return None
    mappings: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    languages = {mapping[type(config)].__name__ for mapping in mappings if type(config) in mapping}
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    is_body = type(config) in MODEL_MAPPING and named in _names(MODEL_MAPPING[type(config)])
    return None if named in languages or (is_decoder and is_body) else kind


def _names(kinds: Any) -> list[str]:
    """Of a class, or of several."""
    return [kind.__name__ for kind in (kinds if isinstance(kinds, (tuple, list)) else (kinds,))]


def load_whole(config: ShardConfig, kind: Any, folder: OffloadFolder) -> nn.Module:
    """The model, in eval mode, without gradients, on its device or spread over several. `folder` has what lies on disk
    of it, unless its own files do. ServiceError where its library cannot load it, UserError where a device map does not
    fit it.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    told = {} if config.device_map is None else _placing(config, config.device_map, kind, folder)
    try:
        if config.random_weights_seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.random_weights_seed)
                model = _from_config(config.source, kind, config.dtype)
            if told:
                with quiet_accelerate():
                    model = spread(model, **told)
        else:
            given = _dtype(config.source, config.dtype) | told
            with quiet_transformers(), quiet_accelerate():
                model = kind.from_pretrained(config.source, use_safetensors=True, **given)
    except (OSError, ValueError, RuntimeError) as error:
        raise ServiceError(f"{config.source} cannot be loaded as {kind.__name__}: {error}") from error
    if not told:
        model = model.to(config.device)
    made: nn.Module = model.eval().requires_grad_(False)
    return made


def _placing(config: ShardConfig, places: DeviceMap, kind: Any, folder: OffloadFolder) -> dict[str, Any]:
    """What a library is told of where the parts lie. Checked before it reads any weights."""
    check_parts(places, whole_meta(config.source, config.dtype, kind))
    check_gpus(places, torch.cuda.device_count())
    may_use_disk = isinstance(places, str) or "disk" in places.values()
    told: dict[str, Any] = {"device_map": places if isinstance(places, str) else dict(places)}
    told |= {"offload_folder": str(folder.path)} if may_use_disk else {}
    return told | (on_host(places) if config.device == "cpu" else {})


def whole_meta(source: str, dtype: str, kind: Any) -> nn.Module:
    """The same without weights, on the meta device."""
    with torch.device("meta"):
        model: nn.Module = _from_config(source, kind, dtype)
    return model.eval().requires_grad_(False)


def _from_config(source: str, kind: Any, dtype: str) -> nn.Module:
    if issubclass(kind, transformers.PreTrainedModel):
        config = transformers.AutoConfig.from_pretrained(source)
        made: nn.Module = kind._from_config(config, **_dtype(source, dtype))
        return made
    own: nn.Module = kind.from_config(kind.load_config(source))
    return own if dtype == "auto" else own.to(getattr(torch, dtype))


def _dtype(source: str, dtype: str) -> dict[str, Any]:
    """The keyword that says it: "auto" is the configuration's."""
    if dtype != "auto":
        return {"dtype": resolve_dtype_of(dtype)}
    config = transformers.AutoConfig.from_pretrained(source) if _diffusion_name(source) is None else None
    found = getattr(config, "dtype", None)
    return {} if found is None else {"dtype": found}


def _diffusion_name(source: str) -> str | None:
    file = Path(source) / "config.json"
    if not file.is_file():
        return None
    named = json.loads(file.read_text()).get("_class_name")
    return named if isinstance(named, str) else None


def _diffusion_class(source: str) -> Any:
    named = _diffusion_name(source)
    if named is None:
        return None
    try:
        diffusers: Any = import_module("diffusers")
    except ImportError:
        raise ServiceError(
            f"{source} is a {named} of diffusers, which is not installed: pip install 'polytrace[diffusion]'"
        ) from None
    kind = getattr(diffusers, named, None)
    if kind is None or not issubclass(kind, nn.Module):
        raise ServiceError(f"diffusers {diffusers.__version__} has no model {named}")
    return kind
