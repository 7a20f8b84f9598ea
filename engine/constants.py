"""Contents of requests that were uploaded once and stay on the shard: on its device, under a budget of bytes.

A content is known by its file, whose name is its hash in a folder of its owner: it never changes, and one owner's is
nobody else's. What is used least recently goes first; a tensor that a request still holds lives as long as that.
"""

from __future__ import annotations

from collections import OrderedDict
from mmap import ACCESS_READ, mmap

import torch
from torch import Tensor

from engine.copies import to_device
from engine.known import tensor_of_raw
from polytrace.errors import ServiceError, WireError
from polytrace.wire import decode_content


class Constants:
    """One a shard. A content that is larger than the budget is read again by every request."""

    def __init__(self, device: torch.device, budget_bytes: int) -> None:
        self._device = device
        self._budget_bytes = budget_bytes
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()  # by file, the one used last at the end
        self.held_bytes = 0
        self.read_bytes = 0  # of files, so far

    def get(self, path: str) -> Tensor:
        """The tensor in a content's file, which nobody may change. Reads the file when it is not here."""
        held = self._tensors.get(path)
        if held is not None:
            self._tensors.move_to_end(path)
            return held
        tensor = to_device(_read(path), self._device)
        self.read_bytes += tensor.nbytes
        if tensor.nbytes <= self._budget_bytes:
            self._tensors[path] = tensor
            self.held_bytes += tensor.nbytes
            while self.held_bytes > self._budget_bytes:
                _, oldest = self._tensors.popitem(last=False)
                self.held_bytes -= oldest.nbytes
        return tensor

    def clear(self) -> None:
        """Gives the memory back."""
        self._tensors.clear()
        self.held_bytes = 0


def _read(path: str) -> Tensor:
    try:
        with open(path, "rb") as file:
            return tensor_of_raw(decode_content(memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))))
    except OSError as error:
        raise ServiceError(f"a content of the request cannot be read: {error.strerror}") from error
    except (WireError, ValueError) as error:  # no mapping of an empty file either
        raise ServiceError(f"a stored content is broken: {error}") from error
