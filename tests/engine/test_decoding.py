"""Rows that decode over caches have the bits of the same text in one piece."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from decoded import REQUEST, Machine
from torch import Tensor

from scheduling.plan import TrunkId

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
DECODED = ["llama", "gpt2", "gemma2", "gemma3", "gpt_oss", "mixtral", "mistral"]
LENGTHS = (5, 31, 40)
STEPS = 6


def text(seed: int, length: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(3, 96) for _ in range(length)]


def cache(number: int) -> TrunkId:
    return TrunkId((REQUEST, -1 - number))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DECODED)
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
