"""Bytes that passes keep for gradients, counted by hand on a tiny Llama of four layers over two stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from polytrace.description import Limits, ModelDescription
from polytrace.errors import TooLargeError
from polytrace.graph import Port
from polytrace.tensors import itemsize
from scheduling.plan import Program, RequestId
from scheduling.policy import PassPolicy
from scheduling.scheduler import Scheduler
from tests.scheduling.tiny import HIDDEN, VOCAB, Recorder, tiny_llama

ROW, FILL, HIDDEN_BYTES = 1000, 70, 8  # of a layer: a row, tiles of its experts, hidden states
TINY = replace(
    tiny_llama(num_layers=4, stages=2), tape_bytes=ROW, tape_fill_bytes=FILL, hidden_bytes=HIDDEN_BYTES, row_multiple=8
)
PROMPT = list(range(1, 22))  # 21 tokens: 24 rows
ELEMENT = itemsize("float32")
INPUT, STOP = 2 * HIDDEN * ELEMENT, 3 * HIDDEN * ELEMENT  # a row's gradients in front of a layer, and where they stop
ENDS = 4 * HIDDEN_BYTES  # a row's hidden states where a stage begins and ends
HEAD = 16 * 3 * VOCAB * ELEMENT  # one row, which is filled up to 16


def asked(description: ModelDescription, layer: int, *, losses: int = 1, module: str = "") -> Program:
    """The gradient at a layer's output, or at a module of it, of sums of the last token's logits."""
    r = Recorder(description, [PROMPT])
    early = r.read(f"model.layers.{layer}{module}")
    last = r.index(r.read("lm_head"), slice(None), -1, shape=(1, VOCAB))
    for number in range(losses):
        loss = r.op("sum", last, shape=())
        r.save(r.grad(early, r.backward(loss)), f"g{number}")
    return r.work_out()


def test_layers_from_the_first_stop_on_count_on_the_shard_that_keeps_most() -> None:
    last_stage = 24 * (2 * ROW + 2 * INPUT + ENDS) + 2 * FILL + HEAD  # layers 2 and 3
    assert asked(TINY, 0).tape_bytes == asked(TINY, 1).tape_bytes == last_stage
    one_layer = 24 * (ROW + INPUT + STOP + ENDS) + FILL + HEAD
    assert asked(TINY, 2).tape_bytes == one_layer  # layer 3 and its input, and the output of layer 2
    assert asked(TINY, 0).tape_bytes > asked(TINY, 2).tape_bytes


def test_a_wave_is_kept_once_however_often_it_runs_back() -> None:
    assert asked(TINY, 2, losses=3).tape_bytes == asked(TINY, 2).tape_bytes


def test_what_does_not_fit_runs_layers_again_and_else_is_refused_with_the_numbers() -> None:
    whole = asked(TINY, 0).tape_bytes
    short = replace(TINY, limits=Limits(max_sequence_tokens=100, tape_bytes=whole - 1))
    program = asked(short, 0)
    assert [wave.reruns for wave in program.waves] == [True, False]
    # Each layer keeps what came in; one at a time is there in full.
    least = 24 * (2 * HIDDEN_BYTES + 2 * INPUT + ENDS) + HEAD + 24 * ROW + FILL
    assert program.tape_bytes == least < whole
    with pytest.raises(TooLargeError, match=rf"{least:,} bytes.* 24 rows; the limit is {least - 1:,}"):
        asked(replace(TINY, limits=Limits(max_sequence_tokens=100, tape_bytes=least - 1)), 0)


def test_a_replica_with_less_room_ends_what_it_never_has_room_for_and_goes_on_with_the_next() -> None:
    large, small = asked(TINY, 0), asked(TINY, 2)
    assert large.tape_bytes > small.tape_bytes
    limits = Limits(max_sequence_tokens=100, tape_bytes=small.tape_bytes)
    scheduler = Scheduler(replace(TINY, limits=limits), PassPolicy())
    scheduler.add(replace(large, request=RequestId("large")))
    scheduler.add(replace(small, request=RequestId("small")))
    plan = scheduler.next_pass()
    assert [member.program.request for member in plan.members] == ["small"]
    (outcome,) = scheduler.take_outcomes()
    assert outcome.request == "large"
    assert isinstance(outcome.error, TooLargeError)
    assert f"keep {large.tape_bytes:,} bytes on a shard; there is room for {small.tape_bytes:,}" in str(outcome.error)


def test_layers_inside_of_which_a_gradient_stops_are_kept_whole() -> None:
    whole = asked(TINY, 2, module=".mlp").tape_bytes
    program = asked(replace(TINY, limits=Limits(max_sequence_tokens=100, tape_bytes=1 << 40)), 2, module=".mlp")
    assert program.tape_bytes == whole
    with pytest.raises(TooLargeError):  # layer 2 is whole, and layer 3 saves no more than running one again takes
        asked(replace(TINY, limits=Limits(max_sequence_tokens=100, tape_bytes=whole - 1)), 2, module=".mlp")


def test_requests_without_gradients_keep_nothing() -> None:
    r = Recorder(TINY, [PROMPT])
    r.save(r.read("model.layers.1", Port.OUTPUT), "x")
    assert r.work_out().tape_bytes == r.certify().tape_bytes == 0
