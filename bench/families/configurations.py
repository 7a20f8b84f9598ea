"""A tiny model of a class of transformers: its own default configuration made small, with random weights.

What the defaults leave out (a number of experts that is None) or what does not follow from a rule is data, in
`overrides.json`: by model type, what the configuration is made `with`, and what is set `then`, when it is small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.shrinking import shrink
from engine.twin_weights import draw_weights


@cache
def classes() -> Mapping[str, tuple[Any, ...]]:
    """Name of a causal language model class -> the classes of configurations that lead to it, by transformers' map."""
    found: dict[str, list[Any]] = {}
    for config in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        if not kind.__module__.startswith("transformers."):  # somebody has registered a class of their own
            continue
        kinds = found.setdefault(kind.__name__, [])
        if config not in kinds:
            kinds.append(config)
    return {name: tuple(found[name]) for name in sorted(found, key=str.lower)}


def tiny_config(name: str) -> Any:
    """Of the class, such that `engine.loading` finds the class by it."""
    kinds = classes()[name]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kinds[0]]
    own = model.config_class
    kind = own if own in kinds else kinds[0]
    told: Mapping[str, Any] = _overrides().get(kind.model_type, {})
    config = kind(**told.get("with", {}))
    shrink(config, 1)
    for path, value in told.get("then", {}).items():
        *way, last = path.split(".")
        holder: Any = config
        for step in way:
            holder = getattr(holder, step)
        setattr(holder, last, value)
    return config


def tiny_model(name: str, config: Any) -> Any:
    """In float32, attending and running experts as transformers' eager code does, with weights that make edits show."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    own = config.get_text_config() if kind.config_class is config.sub_configs.get("text_config") else config
    torch.manual_seed(0)
    model: Any = kind._from_config(own, dtype=torch.float32, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    draw_weights(model)
    return model


@cache
def _overrides() -> Mapping[str, Any]:
    told: Mapping[str, Any] = json.loads(Path(__file__).with_name("overrides.json").read_text())
    return told
