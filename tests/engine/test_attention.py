"""Packed attention and the span store, against attention computed sequence by sequence."""

from __future__ import annotations

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from engine.attention import AttentionPass, attending, packed_attention
from engine.spans import SpanStore
from polytrace.errors import CapacityError, ServiceError
from scheduling.plan import PassId, Segment, Span

torch.set_num_threads(1)
LENGTHS = (7, 1, 12, 7, 3, 12, 9, 9, 12, 30, 5, 5)
HEADS, GROUPS, WIDTH = 8, 4, 16
PASS = PassId(1)


def segments_of(lengths: tuple[int, ...]) -> tuple[Segment, ...]:
    stops = list(accumulate(lengths))
    return tuple(
        Segment(
            member=0,
            invoke=0,
            sequence=i,
            start=stop - n,
            stop=stop,
            spans=(Span(block=PASS, start=stop - n, stop=stop),),
        )
        for i, (n, stop) in enumerate(zip(lengths, stops, strict=True))
    )


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    rows = sum(LENGTHS)
    return (
        torch.randn(1, HEADS, rows, WIDTH, dtype=dtype),
        torch.randn(1, GROUPS, rows, WIDTH, dtype=dtype),
        torch.randn(1, GROUPS, rows, WIDTH, dtype=dtype),
    )


def run(segments, q, k, v, **options):  # type: ignore[no-untyped-def]
    with attending(AttentionPass(PASS, segments, SpanStore(1 << 20))):
        return packed_attention(SimpleNamespace(), q, k, v, None, **options)[0]  # type: ignore[arg-type]


def plain(q, k, v, window=None, softcap=None):  # type: ignore[no-untyped-def]
    """One sequence by the textbook, in float32."""
    q, k, v = (t.float() for t in (q, k.repeat_interleave(HEADS // GROUPS, 1), v.repeat_interleave(HEADS // GROUPS, 1)))
    scores = q @ k.transpose(2, 3) * WIDTH**-0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    n = q.shape[2]
    distance = torch.arange(n)[:, None] - torch.arange(n)[None]
    hidden = (distance < 0) | ((distance >= window) if window is not None else False)
    return (F.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 5}, {"softcap": 3.0}, {"sliding_window": 5, "softcap": 3.0}]
)
def test_packed_sequences_get_the_bits_they_get_alone(dtype: torch.dtype, options: dict[str, float]) -> None:
    q, k, v = tensors(dtype)
    together = run(segments_of(LENGTHS), q, k, v, **options)
    for segment in segments_of(LENGTHS):
        at = slice(segment.start, segment.stop)
        alone = run(segments_of((segment.stop - segment.start,)), q[:, :, at], k[:, :, at], v[:, :, at], **options)
        assert torch.equal(together[:, at], alone)


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 5}, {"softcap": 3.0}, {"sliding_window": 5, "softcap": 3.0}]
)
def test_packed_sequences_attend_as_the_textbook_says(options: dict[str, float]) -> None:
    q, k, v = tensors(torch.float32)
    together = run(segments_of(LENGTHS), q, k, v, **options)
    for segment in segments_of(LENGTHS):
        at = slice(segment.start, segment.stop)
        textbook = plain(q[:, :, at], k[:, :, at], v[:, :, at], options.get("sliding_window"), options.get("softcap"))
        torch.testing.assert_close(together[:, at], textbook, rtol=0, atol=2e-6)  # float32


def test_a_segment_that_continues_another_attends_through_its_spans() -> None:
    q, k, v = tensors(torch.float32)
    parent = Segment(member=0, invoke=0, sequence=0, start=0, stop=20, spans=(Span(block=PASS, start=0, stop=20),))
    spans = (Span(block=PASS, start=0, stop=15), Span(block=PASS, start=20, stop=25))
    fork = Segment(member=0, invoke=1, sequence=0, start=20, stop=25, spans=spans)
    out = run((parent, fork), q, k, v)
    joined = torch.cat([torch.arange(15), torch.arange(20, 25)])
    whole = plain(q[:, :, joined], k[:, :, joined], v[:, :, joined])
    torch.testing.assert_close(out[:, 20:25], whole[:, 15:], rtol=0, atol=2e-6)  # float32


def test_rows_of_no_segment_get_zeros() -> None:
    q, k, v = tensors(torch.float32)
    assert not run(segments_of((7,)), q, k, v)[:, 7:].any()


def test_a_model_outside_a_pass_is_an_error() -> None:
    with pytest.raises(ServiceError, match="outside a pass"):
        packed_attention(SimpleNamespace(), *tensors(torch.float32), None)  # type: ignore[arg-type]


def test_arguments_that_would_change_the_numbers_are_refused_by_name() -> None:
    with pytest.raises(ServiceError, match="position_bias"):
        packed_attention(SimpleNamespace(), *tensors(torch.float32), None, position_bias=torch.ones(1))  # type: ignore[arg-type]


def test_passes_do_not_nest() -> None:
    first = AttentionPass(PASS, (), SpanStore(1))
    with attending(first), pytest.raises(ServiceError, match="already"), attending(first):
        pass


def test_the_store_refuses_more_than_its_budget_and_counts_what_it_drops() -> None:
    store = SpanStore(1000)
    block = torch.zeros(1, 1, 10, 10)
    store.put(0, PASS, block, block)
    with pytest.raises(CapacityError, match="800 bytes a layer"):
        store.put(1, PASS, block, block)
    store.drop(0, PASS)
    assert store.held_bytes == 0
