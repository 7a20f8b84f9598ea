"""Rows that decode over caches have the bits of the same text in one piece."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from decoded import REQUEST, Machine, cache
from torch import Tensor
from width import covering

from scheduling.plan import PassTooLargeError

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
DECODED = ["llama", "gpt2", "gemma2", "gemma3", "gpt_oss", "mixtral", "mistral"]
LENGTHS = (5, 31, 40)
STEPS = 6


def text(seed: int, length: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, 96) for _ in range(length)]


def decode(machine: Machine, texts: list[list[int]], lengths: tuple[int, ...], capacity: int = 64) -> list[Tensor]:
    """All texts' rows: prompts of some lengths in one pass, then token by token, beside rows of others."""
    own = machine.pass_()
    for number, (tokens, length) in enumerate(zip(texts, lengths, strict=True)):
        place = own.rows(number, tokens[:length])
        own.grow(cache(number), place, 0, length, capacity=capacity)
    first = machine.run(own)
    found = [[first[number]] for number in range(len(texts))]
    for step in range(STEPS):
        own = machine.pass_()
        trace = own.rows("trace", text(77, 20 + step))
        own.rows("fork", [9, 8], start=10, parent=trace)
        for number, tokens in enumerate(texts):
            length = lengths[number] + step
            before = own.trunk(cache(number), 0, length)
            place = own.rows(number, tokens[length : length + 1], start=length, parent=before)
            own.grow(cache(number), place, length, length + 1, capacity=capacity)
        rows = machine.run(own)
        assert torch.equal(rows["trace"], machine.whole(text(77, 20 + step)))
        for number in range(len(texts)):
            found[number].append(rows[number])
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize(("family", "dtype"), covering(DECODED, [torch.float32, torch.bfloat16]), ids=str)
def test_rows_that_decode_have_the_bits_of_their_text_in_one_piece(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    machine = Machine(family, tmp_path, dtype)
    texts = [text(number, length + STEPS) for number, length in enumerate(LENGTHS)]
    for tokens, rows in zip(texts, decode(machine, texts, LENGTHS), strict=True):
        whole = machine.whole(tokens)
        assert torch.equal(rows, whole)
        if dtype is torch.float32:
            expected = machine.by_hugging_face(tokens)
            assert (rows - expected).abs().max() <= FLOAT32_TOLERANCE * max(1.0, float(expected.abs().max()))
    machine.shard._forget(REQUEST)
    assert machine.store.held_bytes == 0


@pytest.mark.parametrize("length", [40, 32])
def test_samples_of_one_prompt_share_its_whole_pages(length: int, tmp_path: Path) -> None:
    machine = Machine("gemma3", tmp_path)
    prompt = text(1, length)
    texts = [prompt + text(10 + number, STEPS) for number in range(3)]
    own = machine.pass_()
    place = own.rows("prompt", prompt)
    own.grow(cache(0), place, 0, 32)
    for number in range(3):  # what is no whole page goes into each one's own
        own.grow(cache(1 + number), place, 32, length, begin=32, capacity=32)
    first = machine.run(own)["prompt"]
    held = machine.store.held_bytes
    assert held == 4 * 32 * machine.num_layers * 2 * 2 * 8 * 4  # caches, positions, layers, keys/values, heads, ...
    found = [[first] for _ in texts]
    for step in range(STEPS):
        own = machine.pass_()
        shared = own.trunk(cache(0), 0, 32)
        for number, tokens in enumerate(texts):
            stop = length + step
            before = own.trunk(cache(1 + number), 32, stop, shared)
            place = own.rows(number, tokens[stop : stop + 1], stop, before)
            own.grow(cache(1 + number), place, stop, stop + 1, begin=32)
        rows = machine.run(own)
        for number in range(3):
            found[number].append(rows[number])
    assert machine.store.held_bytes == held
    for tokens, parts in zip(texts, found, strict=True):
        assert torch.equal(torch.cat(parts), machine.whole(tokens))


def test_prompts_fork_from_a_cached_beginning_chunk_by_chunk_and_caches_get_more_room(tmp_path: Path) -> None:
    machine = Machine("llama", tmp_path)
    tokens = text(4, 60)
    own = machine.pass_()
    own.grow(cache(0), own.rows("first", tokens[:13]), 0, 13)
    parts = [machine.run(own)["first"]]
    for start, stop, capacity in ((13, 30, 32), (30, 47, 64), (47, 48, 64)):
        own = machine.pass_()
        place = own.rows("more", tokens[start:stop], start, own.trunk(cache(0), 0, start))
        own.grow(cache(0), place, start, stop, capacity=capacity)
        other = own.rows("other", [5, 6, 7], start, own.trunk(cache(0), 0, start))
        page = start // 32 * 32  # rows of the beginning go into its cache as well
        own.grow(cache(start), other, page, start + 3, begin=page)
        rows = machine.run(own)
        parts.append(rows["more"])
        assert torch.equal(rows["other"], machine.whole([*tokens[:start], 5, 6, 7])[start:])
    assert torch.equal(torch.cat(parts), machine.whole(tokens[:48]))
    own = machine.pass_()
    before = own.trunk(cache(47), 32, 50, own.trunk(cache(0), 0, 32))
    own.grow(cache(47), own.rows("other", [8], 50, before), 50, 51, begin=32)
    assert torch.equal(machine.run(own)["other"], machine.whole([*tokens[:47], 5, 6, 7, 8])[50:])
    machine.shard._forget(REQUEST)
    assert machine.store.held_bytes == 0


def test_a_fork_that_begins_at_a_later_layer_goes_on_from_a_cache_of_its_own(tmp_path: Path) -> None:
    """Two that are equal up to a layer: one row there, two behind; then each from its own cache."""
    machine = Machine("llama", tmp_path)
    tokens = text(4, 20)
    own = machine.pass_()
    place = own.rows("prompt", tokens)
    for number in range(2):
        own.grow(cache(number), place, 0, 20)
    machine.run(own)
    own = machine.pass_()
    one = own.rows("one", [7], 20, own.trunk(cache(0), 0, 20))
    own.grow(cache(0), one, 20, 21)
    own.grow(cache(1), one, 20, 21)
    rows = machine.run(own)
    assert torch.equal(rows["one"], machine.whole([*tokens, 7])[20:])
    own = machine.pass_()
    for number in range(2):
        place = own.rows(number, [8 + number], 21, own.trunk(cache(number), 0, 21))
        own.grow(cache(number), place, 21, 22)
    rows = machine.run(own)
    for number in range(2):
        assert torch.equal(rows[number], machine.whole([*tokens, 7, 8 + number])[21:])


def test_more_than_the_budget_is_refused_with_the_numbers_and_all_is_forgotten(tmp_path: Path) -> None:
    machine = Machine("llama", tmp_path)
    machine.store.budget_bytes = 40_000
    own = machine.pass_()
    own.grow(cache(0), own.rows("first", text(1, 20)), 0, 20)
    own.grow(cache(1), own.rows("second", text(2, 50)), 0, 50)
    with pytest.raises(PassTooLargeError, match=r"of 40,000.*in a pass of 70 rows"):
        machine.run(own)
    assert machine.store.held_bytes == 0
    machine.store.budget_bytes = 1 << 30
    assert torch.equal(machine.run(own)["first"], machine.whole(text(1, 20)))
