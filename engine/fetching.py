"""Models at a URL (`s3://bucket/models/llama`, or another of fsspec's): each file comes once to a node that needs it.

A node has a folder for each content of a URL, which begins with the small files (configuration, tokenizer). Files of
weights come when a shard opens them: the first of the node's processes gets a file, the others wait for its lock, and a
file is there whole or not at all. How large it is is known, and that the disk has room for it, before a byte is got. A
content that changes at its URL is another folder; what is there already stays in use, and serves while the URL does not
answer.

    POLYTRACE_WEIGHTS (default ~/.cache/polytrace/weights)
        <hash of the URL>-<hash of its names, sizes and versions>/
            manifest.json      the URL, and each file's bytes
            config.json, model-00001-of-00004.safetensors, ...
            .<name>.lock, .<name>.part

Nothing that could be run when it is read is got: no pickles, no programs. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
from fsspec.callbacks import Callback  # type: ignore[import-untyped]

from polytrace.errors import ServiceError

Report = Callable[[str], None]

MANIFEST = "manifest.json"
SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken")
WEIGHTS = ".safetensors"
RESERVE_BYTES = 256 << 20  # of the disk, that stay free
MAX_FILES = 10_000
_MAX_SMALL_BYTES = 1 << 30  # all of them together
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_LOOK_S = 0.1  # between two tries for a lock
_TELL_S = 1.0
_VERSIONS = ("ETag", "etag", "md5", "md5Hash", "sha256", "LastModified", "last_modified", "mtime", "created")


def is_url(source: str) -> bool:
    """Whether a model lies at a URL, and not in a folder or the hub."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://", source) is not None


def here(source: str, report: Report = lambda _: None) -> str:
    """The folder of a model on this node, with its small files; what is no URL stays as it is.

    ServiceError when nothing of it is here and its URL does not answer, or has no model.
    """
    if not is_url(source):
        return source
    try:
        folder = _folder(source, _listed(source))
    except ServiceError as error:
        known = _known(source)
        if known is None:
            raise
        report(f"{error.message}; the copy on this node is taken")
        folder = known
    for name in _manifest(folder):
        if not name.endswith(WEIGHTS):
            fetch(str(folder), name, report)
    return str(folder)


def fetch(folder: str, name: str, report: Report = lambda _: None) -> None:
    """Gets a file of a model that has a URL, unless it is here. Does nothing for other folders, and names that the URL
    does not have.
    """
    place = Path(folder)
    if (place / name).exists() or not (place / MANIFEST).is_file():
        return
    size = _manifest(place).get(name)
    if size is None:
        return
    with _turn(place / f".{name}.lock", f"{name} is being got by another process of this node", report):
        if not (place / name).exists():
            _get(place, name, size, report)


def fetch_all(folder: str, report: Report = lambda _: None) -> None:
    """All files, for libraries that open them by themselves."""
    if (Path(folder) / MANIFEST).is_file():
        for name in _manifest(Path(folder)):
            fetch(folder, name, report)


def _get(place: Path, name: str, size: int, report: Report) -> None:
    url = json.loads((place / MANIFEST).read_text())["url"]
    part = place / f".{name}.part"
    _promise(place, part, name, size)
    try:
        system, root = _system(url)
        system.get_file(f"{root}/{name}", str(part), callback=_Telling(name, size, report))
        if (found := part.stat().st_size) != size:
            raise ServiceError(f"{name} of {url} has {found:,} bytes, and was to have {size:,}")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(place / name)
    except ServiceError:
        raise
    except Exception as error:  # every kind of place has its own
        raise ServiceError(f"cannot get {name} of {url}: {type(error).__name__}: {str(error)[:300]}") from error
    finally:
        part.unlink(missing_ok=True)


def _promise(place: Path, part: Path, name: str, size: int) -> None:
    """Begins a file, if the disk has room for it beside the others that are on their way."""
    sizes = _manifest(place)
    with _turn(place / ".space.lock", "", lambda _: None):
        part.unlink(missing_ok=True)  # of a process that ended
        coming = 0
        for other in place.glob(".*.part"):
            with contextlib.suppress(OSError):
                coming += max(0, sizes.get(other.name[1:-5], 0) - other.stat().st_size)
        free = shutil.disk_usage(place).free - coming - RESERVE_BYTES
        if size > free:
            told = f"{name} has {size:,} bytes, and {place} has room for {max(0, free):,}"
            raise ServiceError(f"{told}: make room, or set POLYTRACE_WEIGHTS to a folder on a larger disk")
        part.touch(mode=0o600)


@contextlib.contextmanager
def _turn(lock: Path, told: str, report: Report) -> Iterator[None]:
    """One process of the node at a time; the lock goes with the process that holds it."""
    with lock.open("a") as file:
        is_told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_told:
                    report(told)
                    is_told = True
                time.sleep(_LOOK_S)
        yield


def _system(url: str) -> tuple[Any, str]:
    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ServiceError(f"{url}: {error}") from error
    return system, str(root).rstrip("/")


def _listed(url: str) -> dict[str, tuple[int, str]]:
    """Name -> bytes and version, of the files that are of use."""
    system, root = _system(url)
    try:
        system.invalidate_cache()
        entries = system.ls(root, detail=True)
    except Exception as error:  # every kind of place has its own
        raise ServiceError(f"cannot list {url}: {type(error).__name__}: {str(error)[:300]}") from error
    if len(entries) > MAX_FILES:
        raise ServiceError(f"{url} has {len(entries):,} files; a model has at most {MAX_FILES:,}")
    found: dict[str, tuple[int, str]] = {}
    for entry in entries:
        name = str(entry["name"]).rstrip("/").rpartition("/")[2]
        is_meant = entry.get("type") == "file" and name.endswith((*SMALL, WEIGHTS)) and name != MANIFEST
        if is_meant and _NAME.fullmatch(name):
            version = next((str(entry[key]) for key in _VERSIONS if entry.get(key) is not None), "")
            found[name] = (int(entry["size"]), version)
    if not any(name.endswith("config.json") for name in found):
        raise ServiceError(f"{url} has no config.json: it is no folder of a Hugging Face model")
    small = sum(size for name, (size, _) in found.items() if not name.endswith(WEIGHTS))
    if small > _MAX_SMALL_BYTES:
        raise ServiceError(f"{url} has {small:,} bytes beside its weights; at most {_MAX_SMALL_BYTES:,} are taken")
    return found


def _folder(url: str, found: Mapping[str, tuple[int, str]]) -> Path:
    """The folder of what is at a URL now."""
    version = hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]
    folder = _root() / f"{_mark(url)}-{version}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = {"url": url, "files": {name: size for name, (size, _) in sorted(found.items())}}
        if not (folder / MANIFEST).exists():
            own = folder / f".{MANIFEST}.{os.getpid()}"
            own.write_text(json.dumps(written, indent=1))
            own.replace(folder / MANIFEST)
    except OSError as error:
        raise ServiceError(f"{folder} cannot be written: {error.strerror}; set POLYTRACE_WEIGHTS") from error
    return folder


def _known(url: str) -> Path | None:
    """The latest copy of a URL on this node, None without any."""
    found = [path.parent for path in _root().glob(f"{_mark(url)}-*/{MANIFEST}")]
    return max(found, key=lambda folder: (folder / MANIFEST).stat().st_mtime, default=None)


def _mark(url: str) -> str:
    return hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def _manifest(folder: Path) -> dict[str, int]:
    files: dict[str, int] = json.loads((folder / MANIFEST).read_text())["files"]
    return files


def _root() -> Path:
    return Path(os.environ.get("POLYTRACE_WEIGHTS") or "~/.cache/polytrace/weights").expanduser()


class _Telling(Callback):  # type: ignore[misc]  # fsspec has no types
    """Hears how far a file is, and ends it when it becomes longer than it was to be."""

    def __init__(self, name: str, size: int, report: Report) -> None:
        super().__init__(size=size)
        self._name, self._most, self._report = name, size, report
        self._told = time.monotonic()

    def call(self, hook_name: str | None = None, **more: Any) -> None:
        if self.value > self._most:
            raise ServiceError(f"{self._name} is longer than the {self._most:,} bytes that it was to have")
        if time.monotonic() - self._told >= _TELL_S:
            self._told = time.monotonic()
            self._report(f"getting {self._name}: {self.value / 1e9:.2f} of {self._most / 1e9:.2f} GB")
