"""What a block offers beside values: stop, scan, validate, barrier, result, and containers that are saved as such."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from small import IDS, OTHER, close, loaded, logits_of, small_llama

import polytrace
from polytrace.errors import GraphError, TooLargeError

Pair = namedtuple("Pair", "first second")


@dataclass
class Findings:
    name: str
    hidden: Any


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def model(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(plain, tmp_path_factory.mktemp("llama")) as made:
        yield made


# stop


def test_behind_a_stop_nothing_runs_and_nothing_can_be_had(model: Any) -> None:
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[1].output.save()
        tracer.stop()
        again = model.model.layers[0].output.save()  # it is there
    assert hidden.shape == again.shape == (1, 7, 32)
    assert tracer.receipt.passes[0].layer_rows[2:] == (0, 0)
    told = r"layers\.2\.output cannot be read: tracer\.stop\(\) at test_block\.py:\d+ ended this prompt's run"
    with pytest.raises(GraphError, match=told) as error, model.trace(IDS) as tracer:
        model.model.layers[1].output.save()
        tracer.stop()
        model.model.layers[2].output.save()
    assert error.value.where is not None and error.value.where.startswith("test_block.py")
    with pytest.raises(GraphError, match="cannot be written"), model.trace(IDS) as tracer:
        tracer.stop()
        model.model.layers[0].output = torch.zeros(1, 7, 32)


def test_a_stop_is_the_invokes_own(model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            model.model.layers[1].output.save()
            tracer.stop()
        with tracer.invoke(OTHER):
            logits = model.lm_head.output.save()
    assert logits.shape == (1, 4, 64)


# scan and validate


def test_a_scan_knows_every_shape_and_runs_nothing(model: Any, capfd: Any) -> None:
    before = model.backend.scheduler._passes
    with model.scan([IDS, OTHER]) as tracer:
        hidden = model.model.layers[0].output
        dim = polytrace.save(hidden.shape[-1])
        hidden[:, 2] = 0
        probabilities, token = model.lm_head(hidden[:, -1]).softmax(-1).max(-1)
    assert model.backend.scheduler._passes == before
    assert dim == 32 and hidden.shape == (2, 7, 32) and hidden.dtype is torch.float32
    assert probabilities.shape == token.shape == (2,) and token.dtype is torch.int64
    assert tracer.certificate is not None and tracer.certificate.passes == 1
    with pytest.raises(GraphError, match="this trace was scanned: nothing ran"):
        hidden + 1


def test_the_certificate_of_a_scan_is_that_of_what_is_saved(model: Any) -> None:
    def program() -> Any:
        model.lm_head.output  # noqa: B018  read, and not saved
        return model.model.layers[1].output[0].save()

    with model.scan(IDS) as scanned:
        value = program()
    with model.trace(IDS) as ran:
        program()
    assert scanned.certificate is not None and value.shape == (1, 7, 32)
    assert scanned.certificate.token_layers == ran.receipt.token_layers
    assert scanned.certificate.result_bytes == ran.receipt.result_bytes


def test_a_scan_finds_what_does_not_fit_saved_or_not(model: Any) -> None:
    for wrong in (
        lambda: model.model.layers[1].output[:, 9],
        lambda: model.model.layers[1].output @ torch.zeros(3, 3),
        lambda: setattr(model.model.layers[1], "output", torch.zeros(1, 2, 32)),
    ):
        with pytest.raises(GraphError) as error, model.scan(IDS):
            wrong()
        assert error.value.where is not None and error.value.where.startswith("test_block.py")


def test_validate_checks_before_anything_runs_and_tells_the_price(model: Any) -> None:
    with model.trace(IDS, validate=True, scan=True) as tracer:
        model.lm_head.output[:, -1].save()
    assert tracer.certificate.token_layers == tracer.receipt.token_layers
    before = model.backend.scheduler._passes
    with pytest.raises(GraphError, match="exact shape"), model.trace(IDS, validate=True):
        model.model.layers[1].output = torch.zeros(1, 2, 32)
        model.lm_head.output.save()
    assert model.backend.scheduler._passes == before


# barrier and result


def test_a_barrier_is_taken_and_not_needed(plain: Any, model: Any) -> None:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(IDS):
            clean = model.model.layers[1].output[:, -1]
            barrier()
        with tracer.invoke(OTHER):
            barrier()
            model.model.layers[1].output[:, -1] = clean
            patched = model.lm_head.output.save()
    assert (patched - logits_of(plain, OTHER)).abs().max() > 0.1
    with pytest.raises(GraphError, match="a number of invokes"), model.trace(IDS) as tracer:
        tracer.barrier(0)


def test_the_result_is_what_the_model_returns(plain: Any, model: Any) -> None:
    with model.trace(IDS) as tracer:
        out = tracer.result.save()
        logits = tracer.result.logits[:, -1].save()
    close(out.logits, logits_of(plain, IDS))
    assert torch.equal(out["logits"][:, -1], logits)


# containers


def test_containers_of_values_are_saved_as_such(model: Any) -> None:
    with model.trace(IDS):
        late = polytrace.save([])
        by_layer = polytrace.save({n: layer.output[0].norm() for n, layer in enumerate(model.model.layers)})
        nested = polytrace.save({"a": [model.model.layers[0].output, 5, "text"], "b": (None, {"c": by_layer[1] * 2})})
        pair = polytrace.save(Pair(model.model.layers[1].output[:, 0], 3.5))
        findings = polytrace.save(Findings("layer 2", model.model.layers[2].output[:, 0]))
        attention = polytrace.save(model.model.layers[0].self_attn.output)
        one = polytrace.save(model.lm_head.output[:, -1])
        listed = [layer.output[:, -1].save() for layer in model.model.layers]
        for layer in model.model.layers:
            late.append(layer.output[:, -1])
    assert polytrace.save(7) == 7
    for value in (*by_layer.values(), *late, *listed, nested["a"][0], nested["b"][1]["c"], pair.first, findings.hidden):
        assert type(value) is torch.Tensor
    assert nested["a"][1:] == [5, "text"] and pair.second == 3.5 and findings.name == "layer 2"
    assert all(torch.equal(a, b) for a, b in zip(late, listed, strict=True))
    assert float(nested["b"][1]["c"]) == 2 * float(by_layer[1])
    assert type(attention) is tuple and attention[0].shape == (1, 7, 32) and one.shape == (1, 64)


def test_a_tuple_of_the_models_inside_of_a_container_is_refused(model: Any) -> None:
    with pytest.raises(GraphError, match="has several tensors"), model.trace(IDS):
        polytrace.save([model.model.layers[0].self_attn.output])


# logs


def test_a_log_is_printed_as_its_pass_ends_with_the_bits_of_a_save(model: Any, capsys: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            norm = model.model.layers[3].output[0].norm()
            kept = norm.save()
            tracer.log("late norm", norm)
            norm += 1.0  # a log is what the value is at its line
        with tracer.invoke(OTHER):
            model.model.layers[0].output[0][:, -1] = kept
            tracer.log(model.model.layers[1].output[0][:, -1, :2], "early")
            tracer.log(model.lm_head.output[0, -1, 3])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["late norm", "early", "test_block.py"]
    assert [log.name for log in tracer.logs[:2]] == ["late norm", "early"]
    assert float(tracer.logs[0].value) == float(kept) - 1.0
    assert tracer.logs[1].value.shape == (1, 2) and str(float(tracer.logs[0].value))[:5] in printed[0]


def test_a_log_is_heard_before_later_passes_run(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, int]] = []
    show = lambda text, **how: heard.append((text.split(":")[0], model.backend.scheduler._passes))  # noqa: E731
    monkeypatch.setattr("builtins.print", show)
    before = model.backend.scheduler._passes
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            last = model.model.layers[3].output[0][:, -1]
            tracer.log(last.norm(), "first")
        with tracer.invoke(OTHER):
            model.model.layers[0].output[0][:, -1] = last
            again = model.model.layers[3].output[0][:, -1]
            tracer.log(again.norm(), "second")
        with tracer.invoke(IDS):
            model.model.layers[0].output[0][:, -1] = again
            model.lm_head.output[0, -1, 0].save()
    assert heard == [("first", before + 1), ("second", before + 2)]
    assert len(tracer.receipt.passes) == 3


def test_a_log_is_small_and_of_the_trace(model: Any) -> None:
    with pytest.raises(TooLargeError, match=r"28,672 bytes .* at most 16,384"), model.trace([IDS] * 32) as tracer:
        tracer.log(model.model.layers[0].output[0], "all of it")
    with pytest.raises(GraphError, match="takes a value of the trace and a name"), model.trace(IDS) as tracer:
        tracer.log("text", 3)
