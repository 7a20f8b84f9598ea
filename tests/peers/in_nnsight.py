"""Runs patterns with the Python of nnsight's own environment, and writes their values where the command line says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peers.material import FOLDER
from safetensors.torch import save_file


def write_values(patterns: Mapping[str, Callable[[Any], Any]]) -> None:
    """Of each pattern `name/0`, `name/1`, ... in one safetensors file."""
    transformers = importlib.import_module("nnsight.modeling.transformers")
    model = transformers.TransformersModel(
        str(FOLDER), task="text-generation", dtype=torch.float32, dispatch=True, attn_implementation="eager"
    )
    model.tokenizer.padding_side = "left"
    values = {}
    for name, pattern in patterns.items():
        made = pattern(model)
        many = made if isinstance(made, (tuple, list)) else [made]
        values |= {f"{name}/{number}": value.detach().contiguous().clone() for number, value in enumerate(many)}
    save_file(values, sys.argv[1])
