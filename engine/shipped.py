"""Configurations of large models that ship with polytrace, facts only: for plans and random weights without any hub."""

from __future__ import annotations

from pathlib import Path

_MODELS = Path(__file__).parent / "models"


def known_source(name: str) -> str:
    """The folder with the facts of a model that ships, also by the last part of its name; any other source as it is."""
    if not Path(name).is_dir():
        for shipped in shipped_models():
            if name.lower() in (shipped.lower(), shipped.rpartition("/")[2].lower()):
                return str(_MODELS / shipped.replace("/", "--"))
    return name


def shipped_models() -> tuple[str, ...]:
    """The models whose configurations ship with polytrace."""
    return tuple(sorted(folder.name.replace("--", "/") for folder in _MODELS.iterdir() if folder.is_dir()))
