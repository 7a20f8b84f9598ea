"""Attention of packed rows on a GPU: one kernel a layer.

The idea is that of FlashAttention (Dao et al., 2022; 2023): keys pass by in blocks, a running maximum and sum make the
softmax, and no score leaves the chip. Keys are found through a table, as in paged attention (Kwon et al., 2023), and
query heads that share keys go through together, as in FlashDecoding (Dao et al., 2023). A program is one tile of
`engine.tables` and one key/value head.

A row's bits depend on its query and on the keys and values at positions up to its own, and on nothing else. Blocks
begin at multiples of their size counted from position 0, and sizes depend on the dtype and the head's dimensions alone,
never on how many rows there are. A product's row does not depend on the others. What a row does not see has score
-inf and weight 0, and leaves maximum, sum and result as they are: a block before all that a window sees, where the
maximum is still -inf, as well as a block behind the row.

Zero times infinity is no zero: so values are read with everything that is not finite taken out, and what these give to
the rows that see them is found in a second walk, which is only gone when the layer has such a value at all.

Scores, softmax and sums are float32; weights are rounded to the values' dtype before they meet these. float32 models
are computed in float32 throughout. One long row is not cut into parts for more programs to share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.tables import TILE_NUMBERS, KeyTables

# T = packed rows, R = those and the rows of trunks, H = query heads, G = key/value heads, E = query heads a key/value
# head (H = G E), C = dimension of a query's head, U = dimension of a value's head. In kernels M = query vectors of a
# tile, N = positions of a block

_MOST_HEADS = 16  # query heads of one program

# What one block's values that are not finite sum up to tells how many of each kind there are: fewer than 128.
_INF, _MINUS_INF, _NAN = tl.constexpr(1), tl.constexpr(1 << 7), tl.constexpr(1 << 14)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizes:
    """How a kernel is cut for a dtype and a head's dimension."""

    vectors: int  # M
    positions: int  # N
    features: int  # of queries and keys that are multiplied at a time
    warps: int
    stages: int  # blocks under way


def block_sizes(dtype: torch.dtype, dims: int) -> BlockSizes:
    """Sizes that fit into 99 KiB of shared memory: what the smallest GPUs of today have. `dims`: a power of two."""
    if dtype == torch.float32:  # products on the ordinary cores: operands lie in registers
        positions = 32 if dims <= 64 else 16
        return BlockSizes(
            vectors=32, positions=positions, features=min(dims, 32), warps=8 if dims > 64 else 4, stages=1
        )
    if dims <= 128:
        return BlockSizes(vectors=64, positions=64, features=dims, warps=4, stages=2)
    if dims <= 256:
        return BlockSizes(vectors=64, positions=32, features=dims, warps=8, stages=1)
    return BlockSizes(vectors=32, positions=16, features=dims, warps=8, stages=1)


def flash_attention(
    query_HTC: Tensor,
    key_GRC: Tensor,
    value_GRU: Tensor,
    tables: KeyTables,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`[T, H, U]` in the query's dtype; rows of no segment are zeros. Nothing is waited for."""
    dtype = torch.promote_types(torch.promote_types(query_HTC.dtype, key_GRC.dtype), value_GRU.dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    num_heads, num_rows, dim_C = query_HTC.shape
    num_groups, _, dim_U = value_GRU.shape
    share = num_heads // num_groups
    pad_C, pad_U = max(16, triton.next_power_of_2(dim_C)), max(16, triton.next_power_of_2(dim_U))
    sizes = block_sizes(dtype, max(pad_C, pad_U))
    heads = min(share, _MOST_HEADS)
    tiles, num_tiles = tables.tiles(sizes.vectors // heads)
    out_THU = query_HTC.new_zeros(num_rows, num_heads, dim_U)
    if not num_tiles:
        return out_THU
    q, k, raw = (_aligned(tensor.to(dtype)) for tensor in (query_HTC, key_GRC, value_GRU))
    v = _aligned(torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0))
    _attend[num_tiles, num_groups * triton.cdiv(share, heads)](
        q,
        k,
        v,
        raw,
        raw.sum(dtype=torch.float32),
        None if sinks_H is None else sinks_H.float(),
        out_THU,
        tiles,
        *(tensor.stride(dim) // tensor.shape[2] for tensor in (q, k, v, raw) for dim in (0, 1)),
        scaling * math.log2(math.e) if softcap is None else scaling / softcap,
        0.0 if softcap is None else softcap * math.log2(math.e),
        window or 0,
        HAS_CAP=softcap is not None,
        HAS_WINDOW=window is not None,
        HAS_SINKS=sinks_H is not None,
        NUM_HEADS=num_heads,
        SHARE=share,
        HEADS=heads,
        C=dim_C,
        U=dim_U,
        PAD_C=pad_C,
        PAD_U=pad_U,
        M=sizes.vectors,
        N=sizes.positions,
        PART_C=min(sizes.features, pad_C),
        TILE_NUMBERS=TILE_NUMBERS,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    return out_THU


def _aligned(tensor: Tensor) -> Tensor:
    """`[heads, rows, dim]` that every launch finds alike: strides in whole heads, a begin that wide loads can use.

    The compiler makes another kernel for other alignments, and nobody says that it has the same bits.
    """
    dim = tensor.shape[2]
    is_fine = tensor.stride(2) == 1 and tensor.stride(0) % dim == 0 and tensor.stride(1) % dim == 0
    if is_fine and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


_STRIDES = [f"{tensor}_{dim}" for tensor in ("q", "k", "v", "raw") for dim in ("head", "row")]


@triton.jit(do_not_specialize=[*_STRIDES, "window"])
def _attend(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    raw: tl.tensor,
    raw_sum: tl.tensor,
    sinks: tl.tensor,
    out: tl.tensor,
    tiles: tl.tensor,
    q_head: tl.tensor,  # strides in heads
    q_row: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    raw_head: tl.tensor,
    raw_row: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    U: tl.constexpr,
    PAD_C: tl.constexpr,
    PAD_U: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PART_C: tl.constexpr,
    TILE_NUMBERS: tl.constexpr,
) -> None:
    # 1) which rows, which heads
    tile = tiles + tl.program_id(0) * TILE_NUMBERS
    row, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    own, table = tl.load(tile + 3), tiles + tl.load(tile + 4)
    splits: tl.constexpr = (SHARE + HEADS - 1) // HEADS
    group = tl.program_id(1) // splits
    vector_M = tl.arange(0, M)
    place_M = vector_M // HEADS
    share_M = tl.program_id(1) % splits * HEADS + vector_M % HEADS
    head_M = group * SHARE + share_M
    position_M = first + place_M
    is_real_M = (place_M < count) & (share_M < SHARE)
    stop = first + count
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first - window + 1, 0) // N * N
    c, u = tl.arange(0, PAD_C), tl.arange(0, PAD_U)
    q_M = q + (head_M.to(tl.int64) * q_head + (row + place_M).to(tl.int64) * q_row) * C
    q_MC = q_M
    if PART_C == PAD_C:
        q_MC = tl.load(q_M[:, None] + c[None, :], mask=is_real_M[:, None] & (c < C)[None, :], other=0.0)
    # 2) the softmax as far as it has come: logits to the base of 2
    if HAS_SINKS:
        most_M = tl.load(sinks + head_M, mask=is_real_M, other=0.0) * 1.4426950408889634
        sum_M = tl.where(most_M == float("-inf"), 0.0, 1.0)
    else:
        most_M = tl.full([M], float("-inf"), tl.float32)
        sum_M = tl.zeros([M], tl.float32)
    total_MU = tl.zeros([M, PAD_U], tl.float32)
    # 3) block by block
    for start in range(begin, stop, N):
        n = start + tl.arange(0, N)
        row_N = _key_rows(n, table, own, row - first)
        is_there_N = n < stop
        k_N = k + (group.to(tl.int64) * k_head + row_N * k_row) * C
        if PART_C == PAD_C:
            k_NC = tl.load(k_N[:, None] + c[None, :], mask=is_there_N[:, None] & (c < C)[None, :], other=0.0)
            score_MN = tl.dot(q_MC, tl.trans(k_NC), input_precision="ieee")
        else:
            score_MN = tl.zeros([M, N], tl.float32)
            for part in tl.static_range(0, PAD_C, PART_C):
                d = part + tl.arange(0, PART_C)
                q_MD = tl.load(q_M[:, None] + d[None, :], mask=is_real_M[:, None] & (d < C)[None, :], other=0.0)
                k_ND = tl.load(k_N[:, None] + d[None, :], mask=is_there_N[:, None] & (d < C)[None, :], other=0.0)
                score_MN = tl.dot(q_MD, tl.trans(k_ND), score_MN, input_precision="ieee")
        score_MN = score_MN * scale
        if HAS_CAP:
            score_MN = _tanh(score_MN) * cap
        sees_MN = n[None, :] <= position_M[:, None]
        if HAS_WINDOW:
            sees_MN = sees_MN & (position_M[:, None] - n[None, :] < window)
        score_MN = tl.where(sees_MN, score_MN, float("-inf"))
        new_M = tl.maximum(most_M, tl.max(score_MN, 1))
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)  # nothing seen yet
        weight_MN = tl.exp2(score_MN - base_M[:, None])
        shrink_M = tl.exp2(most_M - base_M)
        most_M = new_M
        sum_M = sum_M * shrink_M + tl.sum(weight_MN, 1)
        v_N = v + (group.to(tl.int64) * v_head + row_N * v_row) * U
        v_NU = tl.load(v_N[:, None] + u[None, :], mask=is_there_N[:, None] & (u < U)[None, :], other=0.0)
        total_MU = tl.dot(weight_MN.to(v_NU.dtype), v_NU, total_MU * shrink_M[:, None], input_precision="ieee")
    out_MU = total_MU / sum_M[:, None]
    out_MU = tl.where(out_MU == 0.0, 0.0, out_MU)  # a block that is not seen may have turned a -0
    # 4) values that are not finite, where there are any
    if not (tl.abs(tl.load(raw_sum)) < float("inf")):
        for start in range(begin, stop, N):
            n = start + tl.arange(0, N)
            row_N = _key_rows(n, table, own, row - first)
            raw_N = raw + (group.to(tl.int64) * raw_head + row_N * raw_row) * U
            raw_NU = tl.load(raw_N[:, None] + u[None, :], mask=(n < stop)[:, None] & (u < U)[None, :], other=0.0)
            sees_MN = n[None, :] <= position_M[:, None]
            if HAS_WINDOW:
                sees_MN = sees_MN & (position_M[:, None] - n[None, :] < window)
            out_MU += _odd_values(sees_MN, raw_NU)
    out_M = out + ((row + place_M).to(tl.int64) * NUM_HEADS + head_M) * U
    tl.store(out_M[:, None] + u[None, :], out_MU, mask=is_real_M[:, None] & (u < U)[None, :])


@triton.jit
def _key_rows(n: tl.tensor, table: tl.tensor, own: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """Rows of the keys at some positions."""
    before_N = tl.load(table + n, mask=n < own, other=0)
    return tl.where(n < own, before_N, n + shift).to(tl.int64)


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _odd_values(sees_MN: tl.tensor, raw_NU: tl.tensor) -> tl.tensor:
    """What values that are not finite give to the rows that see them: infinity, NaN, or 0 where there are none."""
    kind_NU = tl.where(raw_NU != raw_NU, _NAN, 0) + tl.where(raw_NU == float("inf"), _INF, 0)
    kind_NU += tl.where(raw_NU == float("-inf"), _MINUS_INF, 0)
    counts = tl.dot(sees_MN.to(raw_NU.dtype), kind_NU.to(raw_NU.dtype), input_precision="ieee").to(tl.int32)
    is_inf, is_minus_inf, is_nan = counts % _MINUS_INF > 0, counts // _MINUS_INF % 128 > 0, counts >= _NAN
    number = tl.where(is_inf, float("inf"), tl.where(is_minus_inf, float("-inf"), 0.0))
    return tl.where(is_nan | (is_inf & is_minus_inf), float("nan"), number)
