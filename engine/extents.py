"""A result that lies in an object store: extents, each an object named by its offset.

    <place of the result>/<offset, 20 digits>    the bytes from there on

A shard writes what it saved as objects of its own, so nobody gathers a result before it is sent. Objects cannot be
written in parts later, as files can; they can be small, many, and come from anywhere.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

EXTENT_BYTES = 64 << 20  # of one object, at most: what a shard holds twice while it is sent
DIGITS = 20


def is_object_place(place: str) -> bool:
    """Whether it is a place of objects, and no file's path."""
    return "://" in place


@lru_cache(maxsize=16)
def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path there. What it lists is never remembered: others write too."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    options = {"auto_mkdir": True} if url.startswith(("file:", "local:")) else {"use_listings_cache": False}
    found: tuple[Any, str] = url_to_fs(url, **options)
    return found


def name_of(offset: int) -> str:
    """The name of an extent."""
    return f"{offset:0{DIGITS}d}"


def write_extents(place: str, offset: int, data: memoryview) -> None:
    """Puts bytes at their offset of a result. Raises what the store's own library raises."""
    system, path = filesystem(place)
    for start in range(0, len(data), EXTENT_BYTES):
        piece = bytes(data[start : start + EXTENT_BYTES])
        system.pipe_file(f"{path}/{name_of(offset + start)}", piece)
