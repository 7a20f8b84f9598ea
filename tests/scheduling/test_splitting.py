"""Waves that are too large for a pass: how they are split, for the shapes of sweeps that people write."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from polytrace.description import Limits
from polytrace.graph import Options, Sharing
from scheduling.plan import Program
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

BUDGET = 64


def save_last(recorder: Recorder, invoke: int) -> None:
    logits = recorder.read("lm_head", invoke=invoke)
    recorder.save(recorder.index(logits, slice(None), -1, shape=(1, VOCAB)))


def put_out(recorder: Recorder, invoke: int, position: int) -> None:
    """One token of the first layer is zero."""
    here = recorder.read("model.layers.0", invoke=invoke)
    zeros = recorder.constant((1, HIDDEN))
    changed = recorder.op("setitem", here, (slice(None), position), zeros)
    recorder.write("model.layers.0", changed, invoke=invoke, in_place=True)


def nested_prefixes(budget: int) -> Recorder:
    """Every prefix of a text, with a token in its middle put out: a chain of forks of forks."""
    text = tuple(range(1, 31))
    prompts = [[list(text[:stop])] for stop in range(2, 31)]
    recorder = Recorder(tiny_llama(limits=Limits(max_sequence_tokens=64, pass_tokens=budget)), *prompts)
    for invoke, (prompt,) in enumerate(prompts):
        put_out(recorder, invoke, len(prompt) // 2)
        save_last(recorder, invoke)
    return recorder


def pairs(budget: int) -> Recorder:
    """Many prompts, each patched into one of its own: every second invoke is what another needs."""
    prompts = [[[(number + step) % VOCAB for step in range(10)]] for number in range(40)]
    recorder = Recorder(tiny_llama(limits=Limits(max_sequence_tokens=64, pass_tokens=budget)), *prompts)
    for clean in range(0, 40, 2):
        value = recorder.index(recorder.read("model.layers.1", invoke=clean), slice(None), -1, shape=(1, HIDDEN))
        here = recorder.read("model.layers.1", invoke=clean + 1)
        changed = recorder.op("setitem", here, (slice(None), -1), value)
        recorder.write("model.layers.1", changed, invoke=clean + 1, in_place=True)
        save_last(recorder, clean + 1)
    return recorder


@pytest.mark.parametrize("sweep", [nested_prefixes, pairs])
def test_every_part_fits_and_parts_are_well_filled(sweep: Callable[[int], Recorder]) -> None:
    whole, split = sweep(10_000).work_out(), sweep(BUDGET).work_out()
    assert len(whole.waves) == 1
    widest = [wave.rows_anew.widest for wave in split.waves]
    assert all(rows <= BUDGET for rows in widest)
    fewest = -(-whole.waves[0].rows.widest // BUDGET)
    assert fewest <= len(widest) <= 2 * fewest + 1, widest


@pytest.mark.parametrize("sweep", [nested_prefixes, pairs])
def test_sharing_never_takes_more_passes_than_none(sweep: Callable[[int], Recorder]) -> None:
    def compiled(sharing: Sharing) -> Program:
        recorder = sweep(BUDGET)
        recorder.options = Options(sharing=sharing)
        return recorder.work_out()

    assert len(compiled(Sharing.TENANT).waves) <= len(compiled(Sharing.OFF).waves)
