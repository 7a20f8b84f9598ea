"""Attention over caches: whatever runs beside it, a row that decodes has the bits that a prompt gives it."""

from __future__ import annotations

import math
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoded import Pass, cache, room, threads
from torch import Tensor
from width import covering

from engine.attention import AttentionPass, attending, packed_attention
from engine.points import Point
from engine.spans import SpanStore
from engine.streams import Streams, padded
from engine.trunks import Trunks
from polytrace.graph import Port
from scheduling.plan import PAGE, PROLOGUE, PassId, Plan

CPU = torch.device("cpu")
LONGEST = 200
MODULE: Any = SimpleNamespace()

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
HEADS = [(8, 4), (4, 4), (6, 1), (32, 2)]  # query heads, key/value heads
WIDTHS = [8, 16, 64]


class Text:
    """Queries, keys and values of one text's positions."""

    def __init__(self, seed: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.qkv: QKV = tuple(  # type: ignore[assignment]
            torch.randn(number, LONGEST, width, generator=generator).to(dtype) for number in (heads[0], *heads[1:] * 2)
        )

    def with_start_of(self, other: Text, stop: int) -> Text:
        for own, theirs in zip(self.qkv, other.qkv, strict=True):
            own[:, :stop] = theirs[:, :stop]
        return self


def streams_of(own: Pass) -> Streams:
    plan = Plan(
        pass_id=PassId(1),
        segments=tuple(own.segments),
        layer_rows=(sum(len(one.head) for one in own.segments),),
        views=(),
        members=(),
        keeps=(),
        grows=tuple(own.grows),
        until=PROLOGUE,
        num_stages=1,
    )
    return Streams(plan, 1, CPU, is_fixed=False)


def run(
    store: SpanStore, own: Pass, texts: dict[object, Text], options: Options, points: dict[Port, Point] | None = None
) -> dict[object, Tensor]:
    """`[rows, H, C]` of each segment with a name that is a text's."""
    streams = streams_of(own)
    current = AttentionPass(PassId(1), store, CPU, Trunks(streams, store))
    if points:
        current.points[id(MODULE)] = points
    parts = [
        tuple(tensor[:, one.starts[0] : one.stops[0]] for tensor in texts[own.names[place]].qkv)
        for place, one in enumerate(own.segments)
        if one.trunk is None
    ]
    query, key, value = (torch.cat([part[which] for part in parts], 1) for which in range(3))
    more = (0, 0, 0, padded(query.shape[1], 1) - query.shape[1])
    query, key, value = (torch.nn.functional.pad(tensor, more)[None] for tensor in (query, key, value))
    if options.get(SINKS):
        options = {**options, SINKS: torch.linspace(-2, 2, query.shape[1])}
    with attending(current):
        current.enter(0, streams.inside(0))
        out = packed_attention(MODULE, query, key, value, None, **options)[0][0]
    found: dict[object, Tensor] = {}
    for place, name in own.names.items():
        base = streams.layer(0).bases[place]
        found[name] = out[base : base + len(own.segments[place].head)]
    return found


def alone(text: Text, stop: int, options: Options) -> Tensor:
    own = Pass(1)
    own.rows("alone", [0] * stop)
    return run(SpanStore(1 << 30), own, {"alone": text}, options)["alone"]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


class Crowd:
    """Sequences with caches: some alone, some that share a beginning, some that share a beginning of that."""

    def __init__(self, seed: int, heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
        random = Random(seed)
        self.store = SpanStore(1 << 30)
        self.texts: dict[object, Text] = {}
        self.lengths: dict[int, int] = {}
        self.before: dict[int, tuple[int, ...]] = {}  # numbers of caches, by number of cache
        self.begins: dict[int, int] = {}
        roots = [Text(seed * 1000, heads, width, dtype)]
        roots.append(Text(seed * 1000 + 1, heads, width, dtype).with_start_of(roots[0], 96))
        for number in range(12):
            text = Text(seed * 1000 + 10 + number, heads, width, dtype)
            kind = number % 4
            begin, self.before[number] = 0, ()
            if kind == 1:
                begin, self.before[number] = 96, (100,)
                text.with_start_of(roots[0], 96)
            if kind == 2:
                begin, self.before[number] = 128, (100, 101)
                text.with_start_of(roots[1], 128)
            self.begins[number], self.texts[number] = begin, text
            self.lengths[number] = begin + random.randint(0 if begin else 1, 40)
        self.texts |= {100: roots[0], 101: roots[1], "beside": Text(seed + 5, heads, width, dtype)}
        self.fill()

    def fill(self) -> None:
        own = Pass(1)
        place = own.rows(100, [0] * 96)
        own.grow(cache(100), place, 0, 96)
        place = own.rows(101, [0] * 32, start=96, parent=place)
        own.grow(cache(101), place, 96, 128, begin=96)
        run(self.store, own, self.texts, {})
        own = Pass(1)
        for number, length in self.lengths.items():
            if length == self.begins[number]:
                continue  # its first row is yet to come
            parent = self.parent_of(own, number)
            place = own.rows(number, [0] * (length - self.begins[number]), self.begins[number], parent)
            own.grow(cache(number), place, self.begins[number], length, self.begins[number], self.capacity(number))
        run(self.store, own, self.texts, {})

    def capacity(self, number: int) -> int:
        return room(self.lengths[number] - self.begins[number] + 10) + PAGE * (number % 3 == 0)

    def parent_of(self, own: Pass, number: int) -> int | None:
        parent = None
        for before, begin, stop in zip(self.before[number], (0, 96), (96, 128), strict=False):
            parent = own.trunk(cache(before), begin, stop, parent)
        return parent

    def step(self, own: Pass, numbers: list[int]) -> None:
        """One row of each."""
        for number in numbers:
            length, begin = self.lengths[number], self.begins[number]
            parent = self.parent_of(own, number)
            if length > begin:
                parent = own.trunk(cache(number), begin, length, parent)
            place = own.rows(number, [0], length, parent)
            own.grow(cache(number), place, length, length + 1, begin, self.capacity(number))
            self.lengths[number] += 1


@pytest.mark.parametrize(("options", "dtype"), covering(OPTIONS, [torch.float32, torch.bfloat16]), ids=str)
def test_a_row_that_decodes_has_the_bits_of_a_prompt_whoever_its_neighbours_are(
    options: Options, dtype: torch.dtype
) -> None:
    seed = len(str(options))
    for heads, width in zip(HEADS, (*WIDTHS, 16), strict=True):
        crowd = Crowd(seed, heads, width, dtype)
        random = Random(seed)
        for step in range(4):
            own = Pass(1)
            if step % 2:
                place = own.rows("beside", [0] * 50)
                own.rows("beside", [0] * 4, 33, place)
            numbers = random.sample(range(12), 12 if step == 3 else random.randint(1, 11))
            crowd.step(own, numbers)
            for number in (1, 2) if step == 3 else (1,):  # the same pass by two threads
                with threads(number):
                    rows = run(crowd.store, own, crowd.texts, options)
                for name in numbers:
                    expected = alone(crowd.texts[name], crowd.lengths[name], options)[-1:]
                    assert same_bits(rows[name], expected), (heads, step, name, number)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["cache", "row", "shared"])
def test_values_that_are_not_finite_reach_the_rows_that_see_them_and_no_others(number: float, where: str) -> None:
    options: Options = {"sliding_window": 50}
    crowd = Crowd(3, (8, 4), 16, torch.float32)
    whose = [name for name in range(12) if name % 4 in (1, 2)] if where == "shared" else [4]
    position = 90 if where == "shared" else crowd.lengths[4] - (3 if where == "cache" else 0)
    for name in (*whose, *((100, 101) if where == "shared" else ())):
        crowd.texts[name].qkv[2][:, position, 2] = number
    crowd.fill()
    own = Pass(1)
    crowd.step(own, list(range(12)))
    rows = run(crowd.store, own, crowd.texts, options)
    assert not all(torch.isfinite(rows[name]).all() for name in whose)
    for name in range(12):
        expected = alone(crowd.texts[name], crowd.lengths[name], options)[-1:]
        assert torch.equal(rows[name].isnan(), expected.isnan())
        assert torch.equal(rows[name].nan_to_num(7.0), expected.nan_to_num(7.0)), name


def test_a_row_whose_pattern_somebody_writes_to_decodes_beside_rows_that_nobody_looks_at() -> None:
    crowd = Crowd(5, (8, 4), 16, torch.float32)
    seen: list[Tensor] = []
    asked = 2  # a name, and its row

    def visit(pairs: Any) -> None:
        pattern = pairs.read([asked], 192)
        seen.append(pattern)
        pairs.write([asked], pattern * 2)

    own = Pass(1)
    crowd.step(own, list(range(6)))
    rows = run(crowd.store, own, crowd.texts, {}, {Port.PATTERN: Point(visit=visit, rows=(asked,))})
    length = crowd.lengths[asked]
    torch.testing.assert_close(seen[0].sum(2), torch.ones(1, 8))
    assert (seen[0][..., :length] > 0).all() and not seen[0][..., length:].any()
    for name in range(6):
        expected = alone(crowd.texts[name], crowd.lengths[name], {})[-1:]
        assert same_bits(rows[name], expected * 2 if name == asked else expected)


def test_only_what_somebody_looks_for_is_gathered_behind_the_stream() -> None:
    crowd = Crowd(5, (4, 4), 8, torch.float32)
    own = Pass(1)
    crowd.step(own, list(range(6)))
    place = own.rows("beside", [0] * 3, 4, own.trunk(cache(8), 0, 4))
    streams = streams_of(own)
    stream = streams.layer(0)
    (before,) = streams.gathering(stream, frozenset())[1]
    assert before == own.segments[place].parent and stream.runs(place, 0, 4) == [
        (stream.num_padded, stream.num_padded + 4)
    ]
    asked = next(segment for segment, name in own.names.items() if name == 2)
    apart, places = streams.gathering(stream, frozenset([asked]))
    own_cache = own.segments[asked].parent
    assert set(places) >= {before, own_cache} and len(places) == 4, "two others share its beginning"
    assert apart.bases[asked] == stream.bases[asked]
    rows = [row for run in apart.runs(asked, 0, crowd.lengths[2] - 1) for row in range(*run)]
    num_gathered = sum(own.segments[one].stops[0] - own.segments[one].starts[0] for one in places)
    assert all(stream.num_padded <= row < stream.num_padded + num_gathered for row in rows)
