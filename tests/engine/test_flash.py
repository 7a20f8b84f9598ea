"""The kernel of packed attention: a row's bits are its sequence's alone, and its numbers are the textbook's.

`make gpu-test` runs this on a GPU. With `TRITON_INTERPRET=1`, Triton's interpreter runs the same kernel line by line on
a CPU, with less of everything. (Triton 3.6's wants numpy below 2.4, and its products are numpy's, which add up a row's
terms in another order in another place: so the tests of bits are for a GPU.)
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import AttentionPass, attending, packed_attention
from engine.spans import SpanStore
from engine.streams import Stream, padded
from scheduling.plan import RequestId, Segment
from tests.engine.test_attention import (
    OPTIONS,
    PASS,
    QKV,
    SINKS,
    Options,
    assert_same_bits,
    forest,
    fork,
    own,
    root,
    rows_of,
    stream_of,
    textbook,
    with_sinks,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, interpreting
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

pytest.importorskip("triton", reason="Triton comes with torch for CUDA")

# H = query heads, T = rows of the stream, N = tokens of one sequence, U = dimension of a value's head

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
LONGEST = 80 if IS_INTERPRETED else 400
SEEDS = range(1 if IS_INTERPRETED else 4)
DTYPES = [torch.float32] if IS_INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
# float32; the others round weights to 8 or 11 bits, and so the result, which is 4 at most
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
FEW = OPTIONS[:1] + OPTIONS[8:9]  # all there is, with and without


@dataclass(frozen=True, slots=True)
class Heads:
    """The shapes of a family."""

    queries: int
    keys: int
    dim: int
    value_dim: int

    def tensors(self, rows: int, dtype: torch.dtype = torch.float32) -> QKV:
        """Queries, keys and values of a stream; what is padding has numbers too."""
        generator = torch.Generator().manual_seed(rows)
        shapes = ((self.queries, self.dim), (self.keys, self.dim), (self.keys, self.value_dim))
        num_rows = max(rows, padded(rows, 1))
        q, k, v = (torch.randn(1, heads, num_rows, dim, generator=generator).to(dtype) for heads, dim in shapes)
        return q, k, v.clamp(-4, 4)


SMALL = Heads(6, 2, 16, 16)
SHAPES = [
    SMALL,
    Heads(4, 4, 64, 64),
    Heads(8, 2, 128, 128),
    Heads(5, 1, 12, 20),
    Heads(20, 1, 80, 80),
    Heads(2, 2, 192, 128),
    Heads(4, 2, 256, 256),
    Heads(2, 1, 8, 300),
]


class Behind:
    """What a trunk has: keys and values behind the stream's."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value

    def through(self, _layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([key, self.key], 1), torch.cat([value, self.value], 1)


def entered(stream: Stream, trunks: Any = None) -> AttentionPass:
    current = AttentionPass(PASS, SpanStore(1 << 30), DEVICE, trunks)
    current.has_kernel = True
    current.enter(0, stream)
    return current


def run(stream: Stream, qkv: QKV, options: Options | None = None, trunks: Any = None) -> Tensor:
    """`[T, H, U]` on the CPU."""
    given = with_sinks(options or {}, qkv[0].shape[1])
    given = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in given.items()}
    current = entered(stream, trunks)
    with attending(current):
        out, _ = packed_attention(SimpleNamespace(), *(tensor.to(DEVICE) for tensor in qkv), None, **given)  # type: ignore[arg-type]
    assert current.store.held_bytes == 0
    return out[0].cpu()


def alone(stream: Stream, segment: int, qkv: QKV, options: Options | None = None) -> Tensor:
    """`[N, H, U]` of one sequence that has a pass to itself."""
    rows = rows_of(stream, segment)
    more = torch.zeros(max(0, padded(len(rows), 1) - len(rows)), dtype=torch.long)
    q, k, v = (tensor.index_select(2, torch.cat([rows, more])) for tensor in qkv)
    return run(stream_of(root(len(rows))), (q, k, v), options)[: len(rows)]


def assert_textbook(stream: Stream, qkv: QKV, options: Options, step: int = 1) -> None:
    """That every so many segments' rows are the textbook's, at their dtype's tolerance."""
    together, dtype = run(stream, qkv, options), qkv[0].dtype
    for segment in range(0, len(stream.segments), step):
        here, there = own(stream, segment)
        expected = textbook(stream, segment, qkv, options)[there]
        assert together.dtype == dtype
        torch.testing.assert_close(
            together[here].double(), expected, rtol=0, atol=TOLERANCES[dtype], equal_nan=True, msg=str(segment)
        )


def assert_same(got: Tensor, expected: Tensor, told: object) -> None:
    """The same bits, where not a number is one."""
    assert torch.equal(got.isnan(), expected.isnan()), told
    assert_same_bits(torch.where(got.isnan(), 0.0, got), torch.where(expected.isnan(), 0.0, expected), told)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_attends_as_the_textbook_says(options: Options, dtype: torch.dtype) -> None:
    stream = forest(len(str(options)), LONGEST)
    assert_textbook(stream, SMALL.tensors(stream.num_rows, dtype), options, step=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FEW, ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_heads_of_every_shape_attend_as_the_textbook_says(heads: Heads, options: Options, dtype: torch.dtype) -> None:
    stream = stream_of(root(LONGEST), fork(0, LONGEST - 3, LONGEST), fork(0, 20, 45), root(3))
    assert_textbook(stream, heads.tensors(stream.num_rows, dtype), options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_has_the_same_bits_in_a_fork_and_alone_whoever_its_neighbours_are(
    seed: int, options: Options, dtype: torch.dtype
) -> None:
    heads = SHAPES[(seed + len(str(options))) % (3 if IS_INTERPRETED else len(SHAPES))]
    stream = forest(seed + 1, LONGEST)
    qkv = heads.tensors(stream.num_rows, dtype)
    together = run(stream, qkv, options)
    for segment in range(0, len(stream.segments), 5 if IS_INTERPRETED else 1):
        here, there = own(stream, segment)
        assert_same_bits(together[here], alone(stream, segment, qkv, options)[there], (heads, segment))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 45, "softcap": 3.0}, {SINKS: True}], ids=str)
@pytest.mark.parametrize("heads", SHAPES[:3], ids=str)
def test_a_fork_at_any_position_and_a_sequence_of_any_length_has_the_bits_of_the_whole(
    heads: Heads, options: Options, dtype: torch.dtype
) -> None:
    q, k, v = heads.tensors(LONGEST, dtype)
    expected = run(stream_of(root(LONGEST)), (q, k, v), options)
    step = 29 if IS_INTERPRETED else 3
    starts = range(1, LONGEST, step)
    segments = [root(LONGEST), *(fork(0, start, LONGEST) for start in starts), *map(root, starts)]
    positions = torch.cat([torch.arange(one.starts[0], one.stops[0]) for one in segments])
    got = run(stream_of(*segments), tuple(t.index_select(2, positions) for t in (q, k, v)), options)  # type: ignore[arg-type]
    wrong = (got != expected[positions]).flatten(1).any(1).nonzero().flatten()
    assert not len(wrong), [(int(row), int(positions[row])) for row in wrong[:9]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fork_of_a_trunk_has_the_bits_that_it_has_beside_its_parent(dtype: torch.dtype) -> None:
    stop, start = LONGEST, LONGEST - 30
    q, k, v = SMALL.tensors(stop, dtype)
    expected = run(stream_of(root(stop)), (q, k, v))[start:]
    trunk = Segment(
        parent=None, trunk=(RequestId("r"), 0), outputs=(0,), starts=(0, 0), stops=(stop - 20,), head=(), tokens=()
    )
    stream = stream_of(trunk, fork(0, start, stop))
    behind = Behind(*(tensor[0, :, : stop - 20].to(DEVICE) for tensor in (k, v)))
    got = run(stream, tuple(tensor[:, :, start:] for tensor in (q, k, v)), trunks=behind)  # type: ignore[arg-type]
    assert_same_bits(got, expected, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_how_tensors_lie_in_memory_changes_no_bit(dtype: torch.dtype) -> None:
    heads = Heads(4, 4, 12, 12)
    stream = forest(5, LONGEST)
    q, k, v = heads.tensors(stream.num_rows, dtype)
    expected = run(stream, (q, k, v))
    rows_first = torch.stack([q, k, v], 3).transpose(1, 2).contiguous()  # [1, T, H, 3, C], as fused projections give
    by_rows = tuple(rows_first[:, :, :, place].transpose(1, 2) for place in range(3))
    assert_same_bits(run(stream, by_rows), expected, "rows first")  # type: ignore[arg-type]
    columns = torch.cat([q, k, v], 3)  # strides that are no multiples of a head
    assert_same_bits(run(stream, columns.split(12, 3)), expected, "columns")  # type: ignore[arg-type]
    if not IS_INTERPRETED:
        shifted = torch.cat([q.flatten().new_zeros(1), q.flatten()]).to(DEVICE)[1:].view(q.shape)
        assert shifted.data_ptr() % 16
        assert_same_bits(run(stream, (shifted, k, v)), expected, "shifted")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 20}, {SINKS: True, "softcap": 4.0}], ids=str)
def test_numbers_that_are_not_finite_reach_the_rows_that_see_them_and_no_others(
    options: Options, which: str, number: float
) -> None:
    stream = stream_of(root(70), fork(0, 30, 75), fork(0, 60, 70), fork(2, 65, 70), root(70), fork(4, 60, 70), root(3))
    poisoned = 40  # of the first root
    for dtype in DTYPES:
        clean = SMALL.tensors(stream.num_rows, dtype)
        qkv = tuple(tensor.clone() for tensor in clean)
        qkv[["query", "key", "value"].index(which)][:, :, poisoned, 3] = number
        together, before = run(stream, qkv, options), run(stream, clean, options)  # type: ignore[arg-type]
        assert_textbook(stream, qkv, options)  # type: ignore[arg-type]
        for segment in range(len(stream.segments)):
            here, there = own(stream, segment)
            window = options.get("sliding_window", LONGEST)
            last = poisoned + (1 if which == "query" else window)
            reached = range(poisoned, last) if poisoned in rows_of(stream, segment) else range(0)
            for position, row in zip(range(there.start, there.stop), range(here.start, here.stop), strict=True):
                if position not in reached:
                    assert_same_bits(together[row], before[row], (segment, position))
        if "softcap" not in options:  # which makes an infinite score a finite one
            assert not torch.isfinite(together[poisoned]).all()


def test_values_that_are_not_finite_leave_bits_alone_in_every_fork() -> None:
    stream = forest(11, LONGEST)
    q, k, v = SMALL.tensors(stream.num_rows)
    v[0, :, ::23, 5] = math.inf
    v[0, :, ::19, 5] = -math.inf  # which are NaN where both are seen
    v[0, 1, ::31] = math.nan
    options = {"sliding_window": 50}
    together = run(stream, (q, k, v), options)
    assert torch.isfinite(together).any() and together.isnan().any() and together.isinf().any()
    for segment in range(0, len(stream.segments), 3 if IS_INTERPRETED else 1):
        here, there = own(stream, segment)
        assert_same(together[here], alone(stream, segment, (q, k, v), options)[there], segment)


def test_padding_that_is_not_finite_reaches_nobody_and_rows_of_no_segment_get_zeros() -> None:
    clean = SMALL.tensors(5)
    qkv = tuple(tensor.clone() for tensor in clean)
    for tensor in qkv:
        tensor[:, :, 5:] = math.nan
    got = run(stream_of(root(5)), qkv)  # type: ignore[arg-type]
    assert torch.equal(got[:5], run(stream_of(root(5)), clean)[:5])
    assert len(got) > 5 and not got[5:].any()


def test_a_level_without_rows_gives_zeros() -> None:
    assert not run(stream_of(), SMALL.tensors(0)).any()


def test_dtypes_that_differ_are_computed_in_the_wider_one_and_the_result_is_the_querys() -> None:
    stream = stream_of(root(40))
    q, k, v = SMALL.tensors(40)
    mixed = run(stream, (q, k.half(), v.half()))
    assert_same_bits(mixed, run(stream, (q, k.half().float(), v.half().float())), None)
    wide = run(stream, (q.double(), k.double(), v.double()))
    assert wide.dtype == torch.float64 and torch.equal(wide, run(stream, (q, k, v)).double())


@pytest.mark.skipif(IS_INTERPRETED, reason="a CPU waits for nothing")
def test_nobody_waits_for_the_gpu() -> None:
    stream = forest(3, LONGEST)
    q, k, v = (tensor.to(DEVICE) for tensor in SMALL.tensors(stream.num_rows, torch.bfloat16))
    run(stream, (q, k, v))  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        current = entered(stream)
        with attending(current):
            packed_attention(SimpleNamespace(), q, k, v, None)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_sync_debug_mode(before)
