"""What can be said of a source without reading the model: which folder was meant, and whether it can be split so.

Light: it is asked before anything is started, in processes that never import torch. It refuses only what loading would
refuse too (`engine.splits`, `engine.windows`), and lets pass whatever it does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polytrace.errors import ServiceError
from polytrace.grammar import nearest

# families whose layers are all alike, and whose ranks share the heads of every layer's attention
PLAIN = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")


def no_folder(source: str) -> str | None:
    """That a folder was meant and is not there, with the nearest; None where it is there, or may be a hub's id."""
    folder = Path(source)
    if _may_be_there(folder) or not (source.count("/") > 1 or source.startswith((".", "/", "~"))) or "://" in source:
        return None
    close = nearest(str(folder), _folders_in(folder.parent))
    return f"there is no folder {source}, and a hub's id is owner/name{close}"


def check_source(source: str, *, stages: int, ranks: int) -> None:
    """Raises ServiceError for a folder that is not there, or a model in one that cannot be split so."""
    if (told := no_folder(source)) is not None:
        raise ServiceError(told)
    config = _config(Path(source))
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    if config.get("model_type") not in PLAIN or not isinstance(layers, int) or not isinstance(heads, int):
        return
    if stages > layers:
        told = f"{source} has {layers} layers, which {stages} stages cannot share"
        raise ServiceError(f"{told}: use stages 1 to {layers}")
    if heads % ranks:
        shared = config.get("num_key_value_heads") or heads
        may = [n for n in range(1, heads + 1) if heads % n == 0 and (shared % n == 0 or n % shared == 0)]
        told = f"{source} has {heads} attention heads, which {ranks} ranks cannot share"
        raise ServiceError(f"{told}: use ranks {', '.join(map(str, may))}")


def _may_be_there(path: Path) -> bool:
    """Whether something is there, or this user cannot look: the service may be another one."""
    try:
        return path.exists()
    except OSError:
        return True


def _folders_in(folder: Path) -> list[str]:
    """Those beside each other in a folder; none where they cannot be listed."""
    try:
        return [str(one) for one in folder.iterdir() if one.is_dir() and one.name != "__pycache__"]
    except OSError:
        return []


def _config(folder: Path) -> dict[str, Any]:
    """Of a model's folder; empty where it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
