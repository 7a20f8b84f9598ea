"""What a certificate says on 2 stages x 2 ranks is what the receipt says; what it says of memory is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from processes import ProcessBackend, ProcessShards
from services import make_model

from polytrace.certificate import Certificate, Receipt
from polytrace.model import Model

CLEAN, CORRUPT = [3, 1, 4, 1, 5, 9, 2, 6], [3, 1, 4, 9, 5, 9, 2, 6]
HIDDEN_BYTES, RANKS = 32 * 4, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("certificates")
    source = str(make_model(folder / "model"))
    shards = ProcessShards(source, stages=2, ranks=2)
    yield Model(ProcessBackend(source, shards, folder))
    shards.close()


def carried(model: Model) -> None:
    """A value of the first stage in an edit of the second."""
    early = model.model.layers[0].output[0]
    model.model.layers[3].output[0][:, -1] += early[:, 0]
    model.lm_head.output[:, -1].save()


def gathered(model: Model) -> None:
    """All features of what ranks split."""
    model.model.layers[1].mlp.down_proj.input.save()
    model.model.layers[2].self_attn.o_proj.input[:, -1].save()


def parameter(model: Model) -> None:
    """A matrix that ranks split."""
    (model.model.layers[3].output[0][:, -1] @ model.lm_head.weight.T).save()


def plain(model: Model) -> None:
    model.model.layers[3].output[0].save()


@pytest.mark.parametrize("program", [carried, gathered, parameter, plain])
def test_what_a_request_moves_is_certified(model: Model, program: Callable[[Model], None]) -> None:
    with model.trace(CLEAN) as tracer:
        program(model)
    certificate, receipt = model.validate(tracer), tracer.receipt
    assert isinstance(receipt, Receipt)
    for what in ("tokens", "token_layers", "carried_bytes", "gathered_bytes", "result_bytes", "read_bytes"):
        assert getattr(certificate, what) == getattr(receipt, what), what
    assert certificate.price == receipt.price
    rows = 8 * HIDDEN_BYTES * RANKS  # all rows cross the one border
    if program is gathered:
        rows = certificate.hidden_link_bytes
        assert receipt.gathered_bytes >= 8 * 64 * 4
    assert certificate.hidden_link_bytes == rows > 0
    assert certificate.link_bytes == rows + receipt.carried_bytes + receipt.gathered_bytes
    if program is carried:
        assert receipt.carried_bytes >= 32 * 4 * RANKS


def test_a_picked_feature_travels_alone_and_is_certified_alone(model: Model) -> None:
    with model.trace(CLEAN) as tracer:
        model.model.layers[1].mlp.down_proj.input[..., 5].save()
    certificate = model.validate(tracer)
    assert certificate.gathered_bytes == tracer.receipt.gathered_bytes == 8 * 4
    assert certificate.read_bytes == 8 * 64 * 4


def test_a_certificate_of_gradients_has_their_tape_and_both_ways(model: Model) -> None:
    def certified(layer: int | None) -> Certificate:
        with model.trace(CLEAN, run=False) as tracer:
            hidden = None if layer is None else model.model.layers[layer].output[0]
            loss = model.lm_head.output[:, -1, 3].sum()
            if hidden is None:
                loss.save()
            else:
                with loss.backward():
                    hidden.grad.save()
        return model.validate(tracer)

    none, late, early = certified(None), certified(2), certified(0)
    assert none.tape_bytes == 0 < late.tape_bytes <= early.tape_bytes
    assert none.token_layers < late.token_layers < early.token_layers
    assert early.hidden_link_bytes == 2 * late.hidden_link_bytes == 2 * none.hidden_link_bytes
    assert early.shard_bytes >= early.tape_bytes + early.row_bytes


def test_flops_of_ops_calls_and_gradients_are_counted(model: Model) -> None:
    def flops(program: Callable[[torch.Tensor], torch.Tensor]) -> int:
        with model.trace(CLEAN, run=False) as tracer:
            program(model.model.layers[1].output[0]).save()
        return model.validate(tracer).op_flops

    product = flops(lambda hidden: hidden @ hidden.transpose(1, 2))
    assert product == 2 * 8 * 8 * 32
    assert flops(lambda hidden: model.lm_head(hidden)) == 2 * 8 * 32 * 64
    assert flops(lambda hidden: hidden[:, 0]) == 0


def test_kept_rows_of_a_sweep_and_of_a_generation_are_in_a_shards_bytes(model: Model) -> None:
    with model.generate(CLEAN, max_new_tokens=5, run=False) as tracer:
        model.lm_head.output.save()
    certificate = model.validate(tracer)
    position = model.description.key_value_bytes * 2  # layers of a stage
    assert certificate.trunk_bytes == math.ceil((8 + 5) / 32) * 32 * position
    with model.trace(run=False) as tracer:
        with tracer.invoke(CLEAN):
            late = model.model.layers[3].output[0][:, -1]
        with tracer.invoke(CORRUPT):
            model.model.layers[1].output[0][:, -1] = late
            model.lm_head.output[:, -1].save()
    waves = model.validate(tracer)
    assert waves.passes == 2 and waves.trunk_bytes == waves.shard_bytes - waves.row_bytes - waves.live_bytes
