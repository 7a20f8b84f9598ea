"""What traces would cost, before any runs: one, several, a session, a method, code that needs numbers to go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from services import make_model

import polytrace
from polytrace.certificate import Certificate, LimitLine, charge, price_of
from polytrace.errors import GraphError
from polytrace.methods.patching import patch_activations
from polytrace.model import Model
from polytrace.wire import decode_request

CLEAN, CORRUPT = [3, 1, 4, 1, 5], [3, 1, 4, 9, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = polytrace.load(str(make_model(tmp_path_factory.mktemp("pricing") / "m")))
    yield model
    model.close()


def test_what_is_priced_is_what_the_receipt_says_afterwards(model: Model) -> None:
    with model.trace(CLEAN) as tracer:
        hidden = model.model.layers[1].output[0].save()
        logits = model.lm_head.output[:, -1].save()
    assert isinstance(hidden, torch.Tensor) and isinstance(logits, torch.Tensor)
    priced, receipt = model.validate(tracer), tracer.receipt
    for what in ("tokens", "token_layers", "token_layers_alone", "carried_bytes", "gathered_bytes", "result_bytes"):
        assert getattr(priced, what) == getattr(receipt, what), what
    assert priced.price == receipt.price == charge(5 * 4, 4 * (5 * 32 + 64))
    assert priced.shard_bytes >= priced.row_bytes > 16 * 32 * 4


def test_several_traces_and_sessions_cost_what_each_does(model: Model) -> None:
    traces = []
    for prompt in (CLEAN, CORRUPT, [7]):
        with model.trace(prompt, run=False) as tracer:
            model.model.layers[2].output[0].save()
        traces.append(tracer)
    with model.session(run=False) as session:
        with model.trace(CLEAN):
            hidden = model.model.layers[0].output[0]
        with model.trace(CORRUPT):
            model.model.layers[1].output[0][:] = hidden
            model.model.layers[3].output[0].save()
    price = model.price(*traces, session)
    single = [model.validate(each) for each in (*traces, session)]
    assert price == price_of(single) and price.requests == 4 and not price.is_partial
    assert price.token_layers == sum(each.token_layers for each in single) > 3 * (5 + 5 + 1)
    assert f"{price.charged:,.1f} token-layers" in str(price)


def test_a_methods_sweep_is_priced_without_running_it(model: Model) -> None:
    def sweep(on: Model) -> object:
        return patch_activations(on, CLEAN, CORRUPT, lambda logits: logits[:, 3], normalise=False)

    with model.pricing() as pricing:
        sweep(pricing.model)
        pytest.fail("a sweep that has not run has no result")
    assert pricing.price.requests == 1 and pricing.price.is_partial
    ran: list[int] = []
    run = model.backend.run

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(run.__self__, name)

        def run(self, *given: object) -> object:
            result = run(*given)  # type: ignore[arg-type]
            ran.append(result.receipt.token_layers)
            return result

    with model.pricing() as counted:
        counted.model.__dict__["backend"] = Counting()
        sweep(counted.model)
    assert ran and pricing.price.token_layers == ran[0]


def test_a_loop_of_traces_is_priced_to_its_end_and_stops_where_a_number_is_needed(model: Model) -> None:
    with model.pricing() as pricing:
        for prompt in (CLEAN, CORRUPT, CLEAN):
            with pricing.model.trace(prompt):
                hidden = pricing.model.model.layers[2].output[0].save()
    assert pricing.price.requests == 3 and not pricing.price.is_partial
    assert pricing.price.token_layers == 3 * 5 * 3
    reached = []
    with model.pricing() as pricing:
        with pricing.model.trace(CLEAN):
            hidden = pricing.model.model.layers[2].output[0].save()
        reached.append(1)
        float(hidden.sum())
        reached.append(2)
    assert reached == [1] and pricing.price.requests == 1 and pricing.price.is_partial
    assert "needs a result" in str(pricing.price)
    with model.trace(CLEAN):  # the model itself runs as ever
        hidden = model.model.layers[2].output[0].save()
    assert hidden.shape == (1, 5, 32) and float(hidden.abs().sum()) > 0


def test_a_map_is_priced_whole(model: Model) -> None:
    """As many requests as it sends, for what they cost; a body that mixes prompts is one request."""
    prompts = [[1 + number % 60, 2, 3 + number % 5] for number in range(600)]

    def body() -> dict[str, object]:
        return {"last": model.model.layers[1].output[0][:, -1], "mean": polytrace.mean(model.lm_head.output[:, -1])}

    ran: list[tuple[int, int]] = []
    run = model.backend.run

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(run.__self__, name)

        def run(self, *given: object) -> object:
            result = run(*given)  # type: ignore[arg-type]
            ran.append((result.receipt.token_layers, result.receipt.result_bytes))
            return result

    price = model.map(prompts, body).price()
    with model.pricing() as counted:
        counted.model.__dict__["backend"] = Counting()
        counted.model.map(prompts, body).run()
    assert price.requests == len(ran) == 3 and not price.is_partial
    assert price.token_layers == sum(layers for layers, _ in ran)
    assert price.result_bytes == sum(size for _, size in ran)
    mixing = model.map(prompts[:4], lambda: {"all": model.model.layers[1].output[0].sum(0)}).price()
    assert mixing.requests == 1 and mixing.token_layers <= 4 * 3 * 2


def test_an_error_of_the_code_that_is_priced_is_its_own(model: Model) -> None:
    with pytest.raises(ZeroDivisionError), model.pricing():
        1 / 0  # noqa: B018
    with pytest.raises(GraphError, match="layers"), model.pricing() as pricing, pricing.model.trace(CLEAN):
        pricing.model.model.layers[99].output[0].save()


def test_a_request_is_saved_as_it_would_be_sent(model: Model, tmp_path: Path) -> None:
    vector = torch.arange(32.0)
    with model.trace(CLEAN, run=False) as tracer:
        model.model.layers[1].output[0][:, -1] += vector
        model.lm_head.output[:, -1].save()
    tracer.save_request(tmp_path / "request.safetensors")
    request = decode_request((tmp_path / "request.safetensors").read_bytes())
    assert request.invokes == tracer.built_request().invokes
    assert model.backend.validate(request) == model.validate(tracer)
    (constant,) = request.constants.values()
    assert bytes(constant.data) == vector.numpy().tobytes()


def test_a_sweep_that_is_split_says_into_how_many_passes(model: Model) -> None:
    with model.trace(run=False) as tracer:
        for number in range(300):
            with tracer.invoke([(number * 7 + place * (1 + number % 5)) % 64 for place in range(100)]):
                model.model.layers[1].output[0][:, -1].save()
    certificate = model.validate(tracer)
    assert certificate.passes == 4 and certificate.split == 3  # 30,000 rows, 8,192 a pass
    assert "4 (3 of them because its rows do not fit into fewer)" in str(certificate)


def test_a_limit_is_kept_up_to_its_edge() -> None:
    line = LimitLine(what="tokens_a_day", needed=4, used=6, limit=10, whose="tenant lab")
    assert line.is_within
    assert not LimitLine(what="tokens_a_day", needed=5, used=6, limit=10, whose="tenant lab").is_within
    assert LimitLine(what="tokens_a_day", needed=5, limit=None, whose="tenant lab").is_within


def test_a_certificate_of_nobodys_is_admitted(model: Model) -> None:
    with model.trace(CLEAN, run=False) as tracer:
        model.model.layers[1].output[0].save()
    certificate: Certificate = model.validate(tracer)
    assert certificate.is_admitted and certificate.limits == ()
