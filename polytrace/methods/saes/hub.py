"""The folder of an SAE's files in the hub's cache: they are downloaded where that is allowed and they are not there."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from polytrace.errors import GraphError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def from_hub(
    source: str,
    folder: str,
    layouts: Sequence[Sequence[str]],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    where: str,
) -> Path:
    """Where the files of one of the layouts are. Raises GraphError where there are none, with the reason."""
    if not _REPOSITORY.fullmatch(source):
        raise GraphError(f"there is no folder {Path(source) / folder}, and a hub's id is owner/name", where=where)
    try:
        from huggingface_hub import hf_hub_download, is_offline_mode
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        told = f"there is no folder {Path(source) / folder}, and reading from the hub needs huggingface_hub"
        raise GraphError(f"{told}: pip install huggingface_hub", where=where) from None
    cache = None if cache_dir is None else Path(cache_dir)
    for layout in layouts:
        try:
            found = [
                hf_hub_download(source, f"{folder}/{name}" if folder else name, revision=revision, cache_dir=cache)
                for name in layout
            ]
        except EntryNotFoundError:  # not in the repository, or not in the cache where the hub cannot be asked
            continue
        except (OSError, ValueError) as error:
            raise GraphError(f"{source} cannot be read from the hub: {error}", where=where) from None
        return Path(found[-1]).parent
    told = ", ".join(" with ".join(layout) for layout in layouts)
    told = f"{source} has in {folder or 'its root'} no files of an SAE that are known ({told})"
    if is_offline_mode():
        told += ", as far as the hub's cache on this machine knows: the hub is not asked (HF_HUB_OFFLINE)"
    raise GraphError(told, where=where)
