"""What a request brought: its constants on the device, the images in its prompts and where their rows stand.

Owns these of one request on one shard for as long as it is there. Constants that are contents of the store come from
the shard's own (`engine.constants`), others from the request's file, or from memory where there is none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from engine.copies import to_device
from engine.image_positions import PromptPositions, positions_of
from polytrace.images import images_by_digest
from polytrace.tensors import RawTensor
from scheduling.plan import Program

if TYPE_CHECKING:
    from engine.fragments import ShardContext


class Brought:
    """Of one request."""

    def __init__(self, program: Program, context: ShardContext) -> None:
        """`program`: the request's first."""
        self.images = images_by_digest(program.invokes)  # in its prompts
        self.loaded_bytes = 0  # of contents that were read in this pass
        self._context = context
        self._prompts = program.invokes if self.images else ()
        self._constants: dict[str, Tensor] = {}
        self._positions: dict[tuple[int, int], PromptPositions] = {}  # of prompts, by invoke and sequence

    def constant(self, program: Program, name: str) -> Tensor:
        """One that a program of the request names. The caller changes nothing in it."""
        if name not in self._constants:
            self._constants[name] = self._read(program, name)
        return self._constants[name]

    def image(self, program: Program, name: str) -> Tensor:
        """The pixels of an image in its prompts, which are not needed again."""
        pixels = self.constant(program, name)
        del self._constants[name]
        return pixels

    def positions(self, invoke: int, place: int) -> PromptPositions:
        """Of a sequence's tokens, where they follow from images."""
        if (invoke, place) not in self._positions:
            model = self._context.runner.model
            self._positions[invoke, place] = positions_of(model, self._prompts[invoke], place)
        return self._positions[invoke, place]

    def _read(self, program: Program, name: str) -> Tensor:
        if name in program.contents:
            constants = self._context.constants
            before = constants.read_bytes
            content = constants.get(program.contents[name])
            self.loaded_bytes += constants.read_bytes - before
            return content
        if program.request_file is None:
            constant = from_raw(program.constants[name])
        else:
            with safe_open(program.request_file, framework="pt") as stored:
                constant = stored.get_tensor(name)
        return to_device(constant, self._context.device)


def from_raw(raw: RawTensor) -> Tensor:
    """A tensor over the raw bytes, or over a copy where they are read-only. The caller changes nothing in it."""
    dtype = getattr(torch, raw.dtype)
    if len(raw.data) == 0:
        return torch.empty(raw.shape, dtype=dtype)
    data = bytearray(raw.data) if raw.data.readonly else raw.data
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(raw.shape)
