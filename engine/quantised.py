"""Quantised checkpoints: fp8 in blocks, MXFP4, and bitsandbytes' 4 bits, as tensors of the model's own dtype.

A quantised weight and its scales are put together here, before transformers' loader sees them, so what follows is as
for any checkpoint: stages, slices of ranks, merged experts, sites, the gate. A slice reads the quantised bytes it needs
and is widened a block at a time. Shards hold what was widened: quantised files are quick to read, not small to serve.

transformers widens too (`dequantize=True`), but takes the size of an fp8 block to be rows over scales, which refuses or
gets wrong a matrix, or a rank's slice, that ends inside a block. Elsewhere the values are the same.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.reading import FileTensor, Index, bounds_of
from polytrace.errors import ServiceError

_BLOCK = 1 << 20  # values widened at a time
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # of MXFP4's codes

State = dict[str, Any]  # checkpoint key -> tensor not read yet


def quantisation_of(config: Any) -> Mapping[str, Any]:
    """A configuration's quantisation, empty for a model that has none."""
    return getattr(config, "quantization_config", None) or {}


def told_quantisation(config: Any) -> str:
    """For people, what there is to say of it; empty for a model that is not quantised."""
    found = quantisation_of(config)
    if not found:
        return ""
    is_read = _method(found) in _WIDEN
    return f"its files are {_method(found)}" + (": shards hold it widened" if is_read else ", which is not read here")


def check_quantisation(config: Any) -> None:
    """ServiceError when the checkpoint is quantised in a way that is not read here."""
    found = quantisation_of(config)
    if found and _method(found) not in _WIDEN:
        raise ServiceError(
            f"the checkpoint is quantised by {_method(found)}, which polytrace does not read; it reads "
            f"{', '.join(_WIDEN)}. Save it without quantisation (transformers' model.dequantize()), or take another"
        )


def widened(config: Any, state: State, dtype: torch.dtype) -> State:
    """The state with each quantised weight as one tensor of `dtype`, and without its scales."""
    found = quantisation_of(config)
    return _WIDEN[_method(found)](found, state, dtype) if found else state


class Widened:
    """A quantised tensor that is not read yet, with the interface of safetensors' slices. It seems to be of `dtype`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, num_bytes: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.num_bytes = num_bytes  # in the file

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}.get(self.dtype, "F64")


class _Blocks(Widened):
    """fp8 values, and one factor for each block of rows and columns; leading dimensions, if any, are experts'."""

    def __init__(self, values: FileTensor, scales: FileTensor, block: tuple[int, int], dtype: torch.dtype) -> None:
        shape = tuple(values.get_shape())
        super().__init__(shape, dtype, values.num_bytes + scales.num_bytes)
        self._values, self._scales = values, scales
        has_one = math.prod(scales.get_shape()) == 1
        self._block = (shape[-2], shape[-1]) if has_one else block
        grid = [*shape[:-2], *(-(-size // each) for size, each in zip(shape[-2:], self._block, strict=True))]
        if not has_one and scales.get_shape() != grid:
            raise ServiceError(
                f"an fp8 weight {shape} in blocks of {block} needs scales {grid}, not {scales.get_shape()}"
            )
        self._has_one = has_one

    def __getitem__(self, index: Index) -> Tensor:
        *leading, rows, columns = bounds_of(index, self.shape)
        values = self._values[index]
        sides = list(zip((rows, columns), self._block, strict=True))
        if self._has_one:
            scales = _factors(self._scales[...]).flatten().expand(*values.shape[:-2], 1, 1)
        else:
            grid = (slice(first // size, -(-last // size)) for (first, last), size in sides)
            scales = _factors(self._scales[(*(slice(*each) for each in leading), *grid)])
        # which of these blocks each row and column of the slice is in
        in_rows, in_columns = (torch.arange(first, last) // size - first // size for (first, last), size in sides)
        out = torch.empty(values.shape, dtype=self.dtype)
        step = max(1, _BLOCK // max(1, values.shape[-1]))
        for place in itertools.product(*map(range, values.shape[:-2])):
            for row in range(0, values.shape[-2], step):
                factors = scales[place][in_rows[row : row + step]][:, in_columns]
                out[place][row : row + step] = values[place][row : row + step].float() * factors
        return out


class _Mxfp4(Widened):
    """Stacked experts `[experts, inputs, outputs]` whose files hold, for every output, codes of 4 bits in groups of 32
    inputs (`[experts, outputs, groups, 16]` bytes, the lower half first) and one power of two for each group.
    """

    def __init__(self, blocks: FileTensor, scales: FileTensor, dtype: torch.dtype) -> None:
        experts, outputs, groups, half = blocks.get_shape()
        super().__init__((experts, groups * 2 * half, outputs), dtype, blocks.num_bytes + scales.num_bytes)
        if scales.get_shape() != [experts, outputs, groups]:
            raise ServiceError(f"MXFP4 blocks {blocks.get_shape()} do not go with scales {scales.get_shape()}")
        self._blocks, self._scales = blocks, scales
        self._group = 2 * half

    def __getitem__(self, index: Index) -> Tensor:
        experts, inputs, outputs = bounds_of(index, self.shape)
        out = torch.empty([last - first for first, last in (experts, inputs, outputs)], dtype=self.dtype)
        groups = slice(inputs[0] // self._group, -(-inputs[1] // self._group))
        first = inputs[0] - groups.start * self._group
        table = torch.tensor(_FP4)
        for place, expert in enumerate(range(*experts)):
            own = (slice(expert, expert + 1), slice(*outputs), groups)
            codes, powers = self._blocks[own][0], self._scales[own][0].float().sub_(127).exp2_()
            step = max(1, _BLOCK // max(1, codes.shape[1] * self._group))
            for row in range(0, len(codes), step):
                part = codes[row : row + step]
                values = table[torch.stack((part & 15, part >> 4), dim=-1).int()].flatten(-2)  # [outputs, groups, 32]
                values *= powers[row : row + step, :, None]
                chosen = values.flatten(1)[:, first : first + out.shape[1]]
                out[place, :, row : row + step] = chosen.T
        return out


class _FourBits(Widened):
    """bitsandbytes: codes of 4 bits in the order of the matrix (the upper half first), and a factor for each group of
    `blocksize`; the factors may be quantised once more, to 8 bits.
    """

    def __init__(self, codes: FileTensor, parts: Mapping[str, FileTensor], dtype: torch.dtype) -> None:
        self._codes, self._parts = codes, parts
        name = next(name for name in parts if name.startswith("quant_state."))
        self._state = json.loads(bytes(parts[name][...].tolist()))
        shape = tuple(self._state["shape"])
        super().__init__(shape, dtype, codes.num_bytes + sum(part.num_bytes for part in parts.values()))
        if codes.num_bytes * 2 < math.prod(shape):
            raise ServiceError(f"{codes.num_bytes} bytes cannot hold a matrix {shape} in 4 bits")

    def __getitem__(self, index: Index) -> Tensor:
        rows, *others = bounds_of(index, self.shape)
        width = math.prod(self.shape[1:])
        out = torch.empty([rows[1] - rows[0], *(last - first for first, last in others)], dtype=self.dtype)
        table, factors, size = self._parts["quant_map"][...], self._factors(), int(self._state["blocksize"])
        # codes of whole rows of the slice, which may begin in the middle of a byte and of a group
        step = max(1, _BLOCK // width)
        for row in range(rows[0], rows[1], step):
            stop = min(row + step, rows[1])
            first, last = row * width, stop * width
            pairs = self._codes[slice(first // 2, -(-last // 2))].flatten()
            codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).flatten()[first % 2 :][: last - first]
            values = table[codes.int()] * factors[torch.arange(first, last) // size]
            block = values.view(stop - row, *self.shape[1:])
            out[row - rows[0] : stop - rows[0]] = block[(slice(None), *(slice(*each) for each in others))]
        return out

    def _factors(self) -> Tensor:
        factors = self._parts["absmax"][...]
        if "nested_absmax" not in self._parts:
            return factors
        table, outer = self._parts["nested_quant_map"][...], self._parts["nested_absmax"][...]
        groups = torch.arange(len(factors)) // int(self._state["nested_blocksize"])
        return table[factors.int()] * outer[groups] + float(self._state["nested_offset"])


def _factors(scales: Tensor) -> Tensor:
    """As float32. Bytes are exponents of two, as MXFP8 has them."""
    return scales.float().sub_(127).exp2_() if scales.dtype is torch.uint8 else scales.float()


def _method(found: Mapping[str, Any]) -> str:
    method = str(found.get("quant_method", ""))
    if found.get("load_in_4bit") or found.get("_load_in_4bit"):
        return "bitsandbytes 4 bit"
    return f"{method} 8 bit" if method == "bitsandbytes" else method


def _widen_fp8(found: Mapping[str, Any], state: State, dtype: torch.dtype) -> State:
    block = tuple(found.get("weight_block_size") or (128, 128))
    names = ("weight_scale_inv", "activation_scale")
    made = {key: tensor for key, tensor in state.items() if key.rpartition(".")[2] not in names}
    for key, tensor in made.items():
        scales = state.get(f"{key}_scale_inv")
        if scales is not None:
            made[key] = _Blocks(tensor, scales, (block[0], block[1]), dtype)
        elif tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
            raise ServiceError(
                f"{key} is quantised to {tensor.dtype}, and the checkpoint has no {key}_scale_inv for it"
            )
    return made


def _widen_mxfp4(found: Mapping[str, Any], state: State, dtype: torch.dtype) -> State:
    made = {}
    for key, tensor in state.items():
        stem, _, last = key.rpartition("_")
        if last == "blocks":
            if f"{stem}_scales" not in state:
                raise ServiceError(f"the checkpoint has {key} and no {stem}_scales")
            made[stem] = _Mxfp4(tensor, state[f"{stem}_scales"], dtype)
        elif last != "scales":
            made[key] = tensor
    return made


def _widen_four_bits(found: Mapping[str, Any], state: State, dtype: torch.dtype) -> State:
    parts: dict[str, dict[str, FileTensor]] = {}
    for key, tensor in state.items():
        stem, weight, part = key.rpartition(".weight.")
        if weight:
            parts.setdefault(f"{stem}.weight", {})[part] = tensor
    made = {key: tensor for key, tensor in state.items() if ".weight." not in key}
    return made | {key: _FourBits(state[key], own, dtype) for key, own in parts.items() if key in state}


_WIDEN: Mapping[str, Callable[[Mapping[str, Any], State, torch.dtype], State]] = {
    "fp8": _widen_fp8,
    "mxfp4": _widen_mxfp4,
    "bitsandbytes 4 bit": _widen_four_bits,
}
