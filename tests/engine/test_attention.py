"""Packed attention: a row's bits are its sequence's alone, and its numbers are the textbook's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import AttentionPass, attending, packed_attention
from engine.chunks import TILE
from engine.spans import SpanStore
from engine.streams import Stream, padded
from polytrace.errors import CapacityError, ServiceError
from scheduling.plan import PAGE, PassId, Segment

# H = query heads, G = key/value heads, T = rows of the stream, N = tokens of one sequence, C = head dimension

PASS = PassId(1)
CPU = torch.device("cpu")
LONGEST = 300

Options = dict[str, Any]
QKV = tuple[Tensor, Tensor, Tensor]

SINKS = "s_aux"
OPTIONS: list[Options] = [
    {},
    {"sliding_window": 5},
    {"sliding_window": 40},
    {"sliding_window": 130},
    {"softcap": 3.0},
    {"sliding_window": 33, "softcap": 3.0},
    {SINKS: True},
    {SINKS: True, "sliding_window": 37},
    {SINKS: True, "sliding_window": 64, "softcap": 5.0},
    {"scaling": 0.1},
]
HEADS = [(8, 4), (4, 4), (6, 1)]  # query heads, key/value heads
WIDTHS = [8, 16, 64]


def root(stop: int) -> Segment:
    return Segment(parent=None, starts=(0, 0), stops=(stop,), head=(), tokens=())


def fork(parent: int, start: int, stop: int) -> Segment:
    """Holds the positions from `start` on."""
    return Segment(parent=parent, starts=(start, start), stops=(stop,), head=(), tokens=())


def stream_of(*segments: Segment) -> Stream:
    return Stream(segments, 0, 1)


def rows_of(stream: Stream, segment: int) -> Tensor:
    """The rows of a whole sequence, in the order of its positions."""
    stop = stream.segments[segment].stops[0]
    return torch.tensor([row for run in stream.runs(segment, 0, stop) for row in range(*run)])


def forest(seed: int, longest: int) -> Stream:
    """Roots, forks of them and forks of forks, of any length and from any position; some like each other."""
    random = Random(seed)
    segments = [root(random.randint(1, longest)), root(longest)]
    segments += [segments[0]] * 2
    for _ in range(7):
        parent = random.randrange(len(segments))
        stop = segments[parent].stops[0]
        first = segments[parent].starts[0]
        begin = random.choice(
            [first, stop - 1, random.randint(first, stop - 1), stop // PAGE * PAGE, stop // TILE * TILE]
        )
        begin = min(max(begin, first, 1), stop)
        end = random.choice([begin + 1, random.randint(begin + 1, max(begin + 1, longest)), stop + 1])
        segments += [fork(parent, begin, max(end, begin + 1))] * random.randint(1, 3)
    random.shuffle(order := list(range(len(segments))))
    place = {old: new for new, old in enumerate(order)}
    moved = [segments[old] for old in order]
    return stream_of(
        *(one if one.parent is None else fork(place[one.parent], one.starts[0], one.stops[0]) for one in moved)
    )


def tensors(rows: int, heads: tuple[int, int] = (8, 4), width: int = 16, dtype: torch.dtype = torch.float32) -> QKV:
    """Queries, keys and values of a stream; what is padding has numbers too."""
    generator = torch.Generator().manual_seed(rows * width)

    def normal(number: int) -> Tensor:
        return torch.randn(1, number, max(rows, padded(rows, 1)), width, generator=generator).to(dtype)

    return normal(heads[0]), normal(heads[1]), normal(heads[1])


def with_sinks(options: Options, num_heads: int) -> Options:
    if not options.get(SINKS):
        return options
    return {**options, SINKS: torch.linspace(-2, 2, num_heads)}


def run(stream: Stream, qkv: QKV, options: Options | None = None) -> Tensor:
    """`[T, H, C]`."""
    current = AttentionPass(PASS, SpanStore(1 << 30), CPU)
    with attending(current):
        current.enter(0, stream)
        out, _ = packed_attention(SimpleNamespace(), *qkv, None, **with_sinks(options or {}, qkv[0].shape[1]))  # type: ignore[arg-type]
    return out[0]


def alone(stream: Stream, segment: int, qkv: QKV, options: Options | None = None) -> Tensor:
    """`[N, H, C]` of one sequence that has a pass to itself."""
    rows = rows_of(stream, segment)
    more = torch.zeros(max(0, padded(len(rows), 1) - len(rows)), dtype=torch.long)
    q, k, v = (tensor.index_select(2, torch.cat([rows, more])) for tensor in qkv)
    return run(stream_of(root(len(rows))), (q, k, v), options)[: len(rows)]


def textbook(stream: Stream, segment: int, qkv: QKV, options: Options) -> Tensor:
    """`[N, H, C]` of one sequence in float64, row by row over what the row sees."""
    rows = rows_of(stream, segment)
    q, k, v = (tensor[0].index_select(1, rows).double() for tensor in qkv)
    share = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    scale, window, cap = (
        options.get("scaling", q.shape[2] ** -0.5),
        options.get("sliding_window"),
        options.get("softcap"),
    )
    sinks = with_sinks(options, q.shape[0]).get(SINKS)
    out = []
    for position in range(len(rows)):
        seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
        scores = torch.einsum("hc,hnc->hn", q[:, position], k[:, seen]) * scale
        if cap is not None:
            scores = torch.tanh(scores / cap) * cap
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], 1)
        pattern = torch.softmax(scores, 1)[:, : seen.stop - seen.start]
        out.append(torch.einsum("hn,hnc->hc", pattern, v[:, seen]))
    return torch.stack(out)


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def own(stream: Stream, segment: int) -> tuple[slice, slice]:
    """A segment's own rows in the stream, and in its sequence."""
    here = stream.own(segment)
    base = stream.bases[segment]
    return slice(base, base + len(here)), slice(here.start, here.stop)


def assert_same_bits(got: Tensor, expected: Tensor, told: object) -> None:
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_has_the_same_bits_in_a_fork_and_alone_whoever_its_neighbours_are(
    options: Options, dtype: torch.dtype
) -> None:
    for seed in range(2):
        heads, width = HEADS[(seed + len(options)) % 3], WIDTHS[(seed + len(str(options))) % 3]
        stream = forest(100 * len(str(options)) + seed, 150)
        qkv = tensors(stream.num_rows, heads, width, dtype)
        together = run(stream, qkv, options)
        for segment in range(len(stream.segments)):
            here, there = own(stream, segment)
            expected = alone(stream, segment, qkv, options)[there]
            assert_same_bits(together[here], expected, (seed, segment, stream.segments[segment]))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_shape_of_heads_keeps_its_bits(heads: tuple[int, int], width: int) -> None:
    stream = forest(width + heads[0], 150)
    qkv = tensors(stream.num_rows, heads, width)
    together = run(stream, qkv)
    for segment in range(len(stream.segments)):
        here, there = own(stream, segment)
        assert_same_bits(together[here], alone(stream, segment, qkv)[there], stream.segments[segment])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(options: Options) -> None:
    """So what holds with one thread holds with two."""
    for dtype, heads, width in zip((torch.float32, torch.bfloat16, torch.float32), HEADS, WIDTHS, strict=True):
        stream = forest(len(str(options)) + width, 150)
        qkv = tensors(stream.num_rows, heads, width, dtype)
        one = run(stream, qkv, options)
        with threads(2):
            assert_same_bits(run(stream, qkv, options), one, width)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 45, "softcap": 3.0}, {SINKS: True}], ids=str)
def test_a_fork_at_any_position_and_a_sequence_of_any_length_has_the_bits_of_the_whole(options: Options) -> None:
    q, k, v = tensors(LONGEST, (2, 1), 8)
    expected = run(stream_of(root(LONGEST)), (q, k, v), options)
    for first in range(0, LONGEST, 50):  # 50 of each in a pass
        starts = range(max(1, first), first + 50)
        segments = [root(LONGEST), *(fork(0, start, LONGEST) for start in starts), *map(root, starts)]
        positions = torch.cat([torch.arange(one.starts[0], one.stops[0]) for one in segments])
        got = run(stream_of(*segments), tuple(t.index_select(2, positions) for t in (q, k, v)), options)  # type: ignore[arg-type]
        wrong = (got != expected[positions]).flatten(1).any(1).nonzero().flatten()
        assert not len(wrong), [(int(row), int(positions[row])) for row in wrong[:9]]


def test_a_single_row_behind_any_position_has_the_bits_of_the_whole() -> None:
    q, k, v = tensors(LONGEST, (8, 4), 64, torch.bfloat16)
    expected = run(stream_of(root(LONGEST)), (q, k, v))
    for position in range(1, LONGEST, 7):
        segments = [root(position), *[fork(0, position, position + 1)] * (1 + position % 4)]
        positions = torch.tensor([*range(position), *[position] * (len(segments) - 1)])
        positions = torch.cat([positions, torch.zeros(max(0, 16 - len(positions)), dtype=torch.long)])
        got = run(stream_of(*segments), tuple(t.index_select(2, positions) for t in (q, k, v)))  # type: ignore[arg-type]
        for row in range(position, position + len(segments) - 1):
            assert torch.equal(got[row], expected[position])


def test_bits_do_not_depend_on_how_many_tiles_go_through_the_kernels_together() -> None:
    """More forks than the scores' memory takes at a time."""
    start, count = 250, 400
    segments = [root(LONGEST), *[fork(0, start, LONGEST)] * count]
    positions = torch.cat([torch.arange(LONGEST), *[torch.arange(start, LONGEST)] * count])
    q, k, v = tensors(LONGEST, (8, 4), 8)
    got = run(stream_of(*segments), tuple(t.index_select(2, positions) for t in (q, k, v)))  # type: ignore[arg-type]
    assert torch.equal(got, run(stream_of(root(LONGEST)), (q, k, v))[positions])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_attends_as_the_textbook_says(options: Options) -> None:
    stream = forest(len(str(options)), 120)
    for heads, width in zip(HEADS, WIDTHS, strict=True):
        qkv = tensors(stream.num_rows, heads, width)
        together = run(stream, qkv, options)
        for segment in range(0, len(stream.segments), 3):
            here, there = own(stream, segment)
            expected = textbook(stream, segment, qkv, options)[there].float()
            torch.testing.assert_close(together[here], expected, rtol=0, atol=2e-6)  # float32


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 20}, {SINKS: True, "softcap": 4.0}], ids=str)
def test_numbers_that_are_not_finite_reach_the_rows_that_see_them_and_no_others(
    options: Options, which: str, number: float
) -> None:
    # a parent, forks before and behind the poisoned position, a fork of a fork, and neighbours
    stream = stream_of(
        root(70), fork(0, 30, 75), fork(0, 60, 70), fork(2, 65, 70), root(70), fork(4, 60, 70), root(3), fork(0, 60, 70)
    )
    poisoned = 40  # of the first root
    clean = tensors(stream.num_rows)
    qkv = tuple(tensor.clone() for tensor in clean)
    qkv[["query", "key", "value"].index(which)][:, :, poisoned, 3] = number
    together, before = run(stream, qkv, options), run(stream, clean, options)  # type: ignore[arg-type]
    for segment in range(len(stream.segments)):
        here, there = own(stream, segment)
        rows = rows_of(stream, segment)
        expected = textbook(stream, segment, qkv, options)[there].float()  # type: ignore[arg-type]
        torch.testing.assert_close(together[here], expected, rtol=0, atol=2e-6, equal_nan=True)  # float32
        if poisoned not in rows:
            assert_same_bits(together[here], before[here], segment)
            continue
        window = options.get("sliding_window", LONGEST)
        sees = range(poisoned, poisoned + 1 if which == "query" else poisoned + window)
        for position, row in zip(range(there.start, there.stop), range(here.start, here.stop), strict=True):
            if position not in sees:
                assert_same_bits(together[row], before[row], (segment, position))
    if "softcap" not in options:  # which makes an infinite score a finite one
        assert not torch.isfinite(together[poisoned]).all()


def test_values_that_are_not_finite_leave_bits_alone_in_every_fork() -> None:
    stream = forest(11, 200)
    q, k, v = tensors(stream.num_rows, (6, 2), 16)
    v[0, :, ::23, 5] = math.inf
    v[0, 1, ::31] = math.nan
    together = run(stream, (q, k, v), {"sliding_window": 50})
    for segment in range(len(stream.segments)):
        here, there = own(stream, segment)
        expected = alone(stream, segment, (q, k, v), {"sliding_window": 50})[there]
        assert torch.equal(torch.nan_to_num(together[here], 7.0), torch.nan_to_num(expected, 7.0))
        assert torch.equal(together[here].isnan(), expected.isnan())


def test_padding_that_is_not_finite_reaches_nobody() -> None:
    stream = stream_of(root(5))
    clean = tensors(5)
    qkv = tuple(tensor.clone() for tensor in clean)
    for tensor in qkv:
        tensor[:, :, 5:] = math.nan
    assert torch.equal(run(stream, qkv)[:5], run(stream, clean)[:5])  # type: ignore[arg-type]


def test_rows_of_no_segment_get_zeros() -> None:
    assert not run(stream_of(root(7)), tensors(7))[7:].any()


def test_a_level_without_rows_gives_zeros() -> None:
    assert not run(stream_of(), tensors(0)).any()


def test_a_pass_attends_by_the_level_it_has_entered() -> None:
    q, k, v = tensors(40)
    current = AttentionPass(PASS, SpanStore(1 << 30), CPU)
    first, second = stream_of(root(40)), stream_of(root(20), root(20))
    with attending(current):
        outs = []
        for stream in (first, second, second):
            current.enter(0, stream)
            outs.append(packed_attention(SimpleNamespace(), q, k, v, None)[0][0])  # type: ignore[arg-type]
    assert torch.equal(outs[0], run(first, (q, k, v)))
    assert torch.equal(outs[1], run(second, (q, k, v))) and torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[0][20:], outs[1][20:])


def test_a_model_outside_a_pass_is_an_error() -> None:
    with pytest.raises(ServiceError, match="outside a pass"):
        packed_attention(SimpleNamespace(), *tensors(9), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "arguments", "told"),
    [
        ({}, {"position_bias": torch.ones(1)}, "position_bias"),
        ({}, {"is_causal": False}, "not causal"),
        ({"is_causal": False}, {}, "not causal"),
    ],
)
def test_arguments_that_would_change_the_numbers_are_refused_by_name(
    module: dict[str, Any], arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(ServiceError, match=told):
        packed_attention(SimpleNamespace(**module), *tensors(9), None, **arguments)  # type: ignore[arg-type]


def test_a_mask_is_refused() -> None:
    with pytest.raises(ServiceError, match="attention_mask"):
        packed_attention(SimpleNamespace(), *tensors(9), torch.ones(1))  # type: ignore[arg-type]


def test_passes_do_not_nest() -> None:
    first = AttentionPass(PASS, SpanStore(1), CPU)
    with attending(first), pytest.raises(ServiceError, match="already"), attending(first):
        pass


def test_a_pass_leaves_nothing_in_the_store_even_when_it_fails() -> None:
    store = SpanStore(1 << 20)
    current = AttentionPass(PASS, store, CPU)
    current.enter(0, stream_of(root(7)))
    with attending(current):
        packed_attention(SimpleNamespace(), *tensors(7), None)  # type: ignore[arg-type]
        assert store.held_bytes == 0
    with pytest.raises(RuntimeError, match="broken"), attending(current):
        store.put(0, PASS, torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
        raise RuntimeError("broken")
    assert store.held_bytes == 0


def test_the_store_refuses_more_than_its_budget_and_counts_what_it_drops() -> None:
    store = SpanStore(1000)
    block = torch.zeros(1, 10, 10)
    store.put(0, PASS, block, block)
    with pytest.raises(CapacityError, match="800 bytes a layer"):
        store.put(1, PASS, block, block)
    store.drop(0, PASS)
    assert store.held_bytes == 0
