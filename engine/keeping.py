"""Kept values and states of a model in this process: in its memory, for as long as the model is there.

Requests that touch states take turns, so each sees what the one before it left. A kept value is an ordinary constant:
its handle has the tensor's own memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from engine.links import as_bytes
from polytrace.contents import digest_of
from polytrace.errors import GraphError
from polytrace.graph import KeptSave, Request
from polytrace.keepers import KeptEntry, not_found
from polytrace.tensors import RawTensor

Key = tuple[bool, str]  # whether it is a state, and its name


class LocalKeeper:
    """`polytrace.keepers.Keeper` in memory. Threads may share it."""

    def __init__(self) -> None:
        self._entries: dict[Key, KeptEntry] = {}
        self._tensors: dict[str, RawTensor] = {}  # by digest
        self._lock = threading.RLock()
        self._turn = threading.RLock()  # of requests that touch states

    @contextlib.contextmanager
    def begun(self, request: Request) -> Iterator[Request]:
        """The request with what its states are now, which stays so until the block ends."""
        for raw in request.constants.values():
            if raw.state is None and not raw.is_here:
                raise GraphError(f"a kept value of {raw.dtype} {list(raw.shape)} is on a service, not here: fetch() it")
        uses_state = any(raw.state is not None for raw in request.constants.values())
        if not uses_state and not any(keep.is_state for keep in request.keeps):
            yield request
            return
        with self._turn:
            yield replace(request, constants={name: self._now(raw) for name, raw in request.constants.items()})

    def publish(self, request: str, keeps: tuple[KeptSave, ...], values: Mapping[str, Tensor]) -> None:
        """A request has ended well, and leaves these of its saves."""
        contents = {keep.save: _raw(values[keep.save]) for keep in keeps}
        with self._lock:
            for keep in keeps:
                raw, known = contents[keep.save], self._entries.get((keep.is_state, keep.name))
                if keep.is_state and (known is None or (known.dtype, known.shape) != (raw.dtype, raw.shape)):
                    raise not_found(keep.name, True)
            for keep in keeps:
                expires = None if keep.ttl_s is None else time.time() + keep.ttl_s
                self._put(keep.name, keep.is_state, contents[keep.save], request, expires)

    # --- polytrace.keepers.Keeper

    def entries(self, *, is_state: bool, request: str | None = None) -> list[KeptEntry]:
        with self._lock:
            self._purge()
            found = [entry for key, entry in sorted(self._entries.items()) if key[0] is is_state]
        return [entry for entry in found if request is None or entry.request == request]

    def entry(self, name: str, *, is_state: bool) -> KeptEntry:
        with self._lock:
            self._purge()
            if (is_state, name) not in self._entries:
                raise not_found(name, is_state)
            return self._entries[is_state, name]

    def tensor(self, entry: KeptEntry) -> RawTensor:
        return self._content(entry.name, entry.digest, is_state=False)

    def fetch(self, name: str, digest: str, *, is_state: bool) -> RawTensor:
        raw = self._content(name, digest, is_state=is_state)
        return replace(raw, data=memoryview(bytearray(raw.data)))  # the caller may change it

    def delete(self, name: str, *, is_state: bool) -> None:
        with self._lock:
            self._purge()
            if self._entries.pop((is_state, name), None) is None:
                raise not_found(name, is_state)
            self._purge()

    def begin_state(self, name: str, init: RawTensor) -> KeptEntry:
        with self._lock:
            if (True, name) not in self._entries:
                self._put(name, True, init, None, None)
            return self._entries[True, name]

    # --- inside

    def _content(self, name: str, digest: str, *, is_state: bool) -> RawTensor:
        with self._lock:
            self._purge()
            raw = self._tensors.get(self.entry(name, is_state=True).digest if is_state else digest)
        if raw is None:
            raise not_found(name, is_state)
        return raw

    def _now(self, raw: RawTensor) -> RawTensor:
        if raw.state is None:
            return raw
        found = self._content(raw.state, "", is_state=True)
        if (found.dtype, found.shape) != (raw.dtype, raw.shape):
            raise GraphError(f"the state {raw.state!r} is another one now, {found.dtype} {list(found.shape)}")
        return found

    def _put(self, name: str, is_state: bool, raw: RawTensor, request: str | None, expires: float | None) -> None:
        known = self._entries.get((is_state, name))
        assert raw.digest is not None
        self._tensors[raw.digest] = raw
        self._entries[is_state, name] = KeptEntry(
            name=name,
            is_state=is_state,
            dtype=raw.dtype,
            shape=raw.shape,
            digest=raw.digest,
            version=1 if known is None else known.version + 1,
            request=request,
            expires=expires,
        )
        self._purge()

    def _purge(self) -> None:
        """Drops what has expired, and contents that nothing has any more."""
        now = time.time()
        self._entries = {key: e for key, e in self._entries.items() if e.expires is None or e.expires > now}
        held = {entry.digest for entry in self._entries.values()}
        self._tensors = {digest: raw for digest, raw in self._tensors.items() if digest in held}


def _raw(tensor: Tensor) -> RawTensor:
    """A content over the tensor's memory, or a copy of it where it is on a GPU."""
    own = tensor.cpu()
    data = as_bytes(own).numpy().data if own.numel() else memoryview(b"")
    dtype, shape = str(own.dtype).removeprefix("torch."), tuple(own.shape)
    return RawTensor(dtype=dtype, shape=shape, data=data, digest=digest_of(dtype, shape, data))
