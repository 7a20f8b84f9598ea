"""Weights that nobody trained, for trials of size and speed: drawn from a seed, the same ones whatever the split.

A value depends on (seed, the parameter's path, its place in the whole parameter) and on nothing else: it is hashed from
them (splitmix64), so a shard draws its own slices alone, in any order, with the same bits. Matrices are uniform with
the standard deviation that the model's configuration names for its initialisation. What has one dimension (norms,
biases, sinks) and buffers are as the model's own initialisation makes them.
"""

from __future__ import annotations

import math
import zlib
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.reading import Index, Reader, bounds_of

_BLOCK = 1 << 18  # values made at a time
_DEFAULT_STD = 0.02


def random_state(windowed: PreTrainedModel, seed: int, reader: Reader) -> dict[str, Any]:
    """Path -> tensor, or tensor to be drawn, of everything that this (meta) model has. Changes the model."""
    config: Any = windowed.config
    std = getattr(config.get_text_config(decoder=True), "initializer_range", None) or _DEFAULT_STD
    tied: dict[str, str] = windowed.all_tied_weights_keys  # its source may be on another stage
    state: dict[str, Any] = {}
    for path, module in windowed.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        drawn = {name: p for name, p in module._parameters.items() if p is not None and p.dim() >= 2}
        if len(drawn) < len(module._parameters) + len(module._buffers):
            _initialise_small(windowed, module, f"{seed} {path}")
        for name, tensor in module.state_dict().items():
            if name in drawn:
                key = f"{seed} {tied.get(prefix + name, prefix + name)}"
                state[prefix + name] = DrawnTensor(key, tuple(tensor.shape), tensor.dtype, std, reader)
            elif "." not in name:
                state[prefix + name] = tensor.detach()
    return state


class DrawnTensor:
    """A tensor of hashed values, of which an index makes its own alone; with the interface of safetensors' slices."""

    def __init__(self, key: str, shape: tuple[int, ...], dtype: torch.dtype, std: float, reader: Reader) -> None:
        self._key = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
        self._shape = shape
        self._scale = std * math.sqrt(3) / (1 << 23)
        self._reader = reader
        self.dtype = dtype
        self.num_bytes = math.prod(shape) * dtype.itemsize

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}.get(self.dtype, "F64")

    def __getitem__(self, index: Index) -> Tensor:
        bounds = bounds_of(index, self._shape)
        *leading, (first, last) = bounds
        width = self._shape[-1]
        # 1) where each row begins in the whole parameter
        starts = torch.zeros(1, dtype=torch.int64)
        for (start, stop), size in zip(leading, self._shape[:-1], strict=True):
            starts = (starts[:, None] * size + torch.arange(start, stop)).flatten()
        starts *= width
        # 2) the values, a block of rows at a time
        columns = torch.arange(first, last)
        out = torch.empty(len(starts), len(columns), dtype=self.dtype)
        step = max(1, _BLOCK // max(1, len(columns)))
        for row in range(0, len(starts), step):
            block = out[row : row + step]
            block.copy_(self._values(starts[row : row + step, None] + columns))
            self._reader.count(block.nbytes)
        return out.reshape([stop - start for start, stop in bounds])

    def _values(self, places: Tensor) -> Tensor:
        """Uniform floats of the places: the 24 highest bits of splitmix64 (Steele, Lea, Flood 2014)."""
        mixed = places.mul_(-7046029254386353131).add_(self._key)
        mixed ^= (mixed >> 30) & 0x3_FFFF_FFFF
        mixed *= -4658895280553007687
        mixed ^= (mixed >> 27) & 0x1F_FFFF_FFFF
        mixed *= -7723592293110705685
        return (mixed >> 40).float().add_(0.5).mul_(self._scale)


def _initialise_small(model: PreTrainedModel, module: nn.Module, key: str) -> None:
    """Gives a module's vectors and buffers their values by the model's own initialisation; matrices stay without."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() < 2:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(key.encode()))  # the generator takes 32 bits
        model._init_weights(module)
