"""Packages that only some methods work with, asked for when they run: importing a method imports none of them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from polytrace.errors import GraphError
from polytrace.lines import user_line


def needs(package: str) -> Any:
    """A module of the extra `methods`: xarray, pandas, matplotlib. Raises GraphError where it is not installed."""
    try:
        return import_module(package)
    except ImportError as error:
        told = f"the field's methods need {error.name or package}: pip install 'polytrace[methods]'"
        raise GraphError(told, where=user_line()) from error


def needs_torch(method: str) -> Any:
    """The module torch. Raises GraphError where it cannot be imported: what the method works with here are tensors."""
    if find_spec("torch") is None:
        raise GraphError(f"{method} needs torch on this machine: pip install torch", where=user_line())
    import torch

    return torch
