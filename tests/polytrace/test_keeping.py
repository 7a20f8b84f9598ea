"""Kept values and states in one process, against plain Hugging Face."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_llama
from transformers import LlamaForCausalLM

import polytrace
from polytrace.errors import GraphError, NotFoundError, RunError

IDS = [3, 17, 42, 5, 9, 30, 11]
OTHER = [8, 25, 1, 60]
TOLERANCE = 1e-5  # float32, of max(1, max|plain|)


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture
def model(plain: LlamaForCausalLM, folder: Path) -> Iterator[Any]:
    with polytrace.load(str(folder), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def folder(plain: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llama")
    plain.save_pretrained(folder)
    return folder


def hidden_of(plain: Any, layer: int, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states
    found: torch.Tensor = states[layer + 1]
    return found


def keep(model: Any, ids: list[int] = IDS, **more: Any) -> Any:
    with model.trace([ids]):
        handle = model.model.layers[1].output[0][:, -1].keep(**more)
    assert handle.shape == (1, 32)
    return handle


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))


def test_a_kept_value_is_what_hugging_face_has_and_serves_in_later_traces(model: Any, plain: Any) -> None:
    before = time.time()
    kept = keep(model, name="mean-resid", ttl=3600)
    assert isinstance(kept, polytrace.Kept)
    assert (kept.name, kept.shape, kept.dtype, kept.bytes) == ("mean-resid", (1, 32), torch.float32, 128)
    assert kept.expires is not None and before + 3600 <= kept.expires <= time.time() + 3600
    assert close(kept.fetch(), hidden_of(plain, 1, IDS)[:, -1])

    def patch(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[:, -1] = hidden_of_ids
        return output

    hidden_of_ids = hidden_of(plain, 1, IDS)[:, -1]
    handle = plain.model.layers[1].register_forward_hook(patch)
    with torch.no_grad():
        patched = plain(torch.tensor([OTHER])).logits[:, -1]
    handle.remove()
    with model.trace([OTHER]) as tracer:
        model.model.layers[1].output[0][:, -1] = kept
        out = model.lm_head.output[:, -1].save()
    assert close(out, patched) and tracer.receipt.kept_bytes == 0
    with torch.no_grad():
        assert not close(plain(torch.tensor([OTHER])).logits[:, -1], patched)


def test_operators_and_functions_take_a_kept_value_like_a_tensor(model: Any, plain: Any) -> None:
    kept = keep(model)
    own, other = hidden_of(plain, 1, IDS)[:, -1], hidden_of(plain, 1, OTHER)[:, -1]
    with model.trace([OTHER]):
        hidden = model.model.layers[1].output[0][:, -1]
        found = {
            "right": (hidden - kept).save(),
            "left": (kept - hidden).save(),
            "scaled": (2 * kept + 1).save(),
            "function": torch.nn.functional.cosine_similarity(hidden, kept.value).save(),
            "both": torch.cat([kept, kept]).save(),
            "method": kept.mean(-1).save(),
            "matrix": (kept @ hidden.mT).save(),
            "index": kept[0, 3:5].save(),
        }
    expected = {
        "right": other - own,
        "left": own - other,
        "scaled": 2 * own + 1,
        "function": torch.nn.functional.cosine_similarity(other, own),
        "both": torch.cat([own, own]),
        "method": own.mean(-1),
        "matrix": own @ other.mT,
        "index": own[0, 3:5],
    }
    for name, value in found.items():
        assert close(value, expected[name]), name


def test_what_is_kept_moves_nowhere_and_a_trace_may_keep_only(model: Any) -> None:
    with model.trace([IDS]) as tracer:
        hidden = model.model.layers[1].output[0]
        wide = hidden.keep("wide")
        saved = hidden[:, -1].save()
    assert (tracer.receipt.result_bytes, tracer.receipt.kept_bytes) == (saved.nbytes, 7 * 128)
    assert torch.equal(wide.fetch()[:, -1], saved)
    assert keep(model, name="wide").shape == (1, 32)  # nothing is saved there
    assert [kept.name for kept in model.kept()] == ["wide"] and model.kept("wide").shape == (1, 32)
    certificate = model.validate(tracer)
    assert certificate.kept_bytes == 7 * 128 and len(certificate.saves) == 1


def test_in_place_code_behind_keep_changes_what_is_kept_as_it_would_a_tensor(model: Any, plain: Any) -> None:
    with model.trace([IDS]):
        value = model.model.layers[1].output[0][:, -1] * 1
        kept = value.keep()
        value[:, 0] = 5.0
    assert kept.fetch()[0, 0] == 5.0 and close(kept.fetch()[:, 1:], hidden_of(plain, 1, IDS)[:, -1, 1:])


def test_kept_values_go_by_time_and_by_wish(model: Any) -> None:
    short, other = keep(model, name="short", ttl=0.5), keep(model, OTHER, name="other")
    time.sleep(0.6)
    for gone in (lambda: model.kept("short"), short.fetch, short.delete, lambda: model.kept("never")):
        with pytest.raises(NotFoundError):
            gone()
    other.delete()
    assert model.kept() == []


def test_a_kept_value_serves_another_model(model: Any, folder: Path, plain: Any) -> None:
    kept = keep(model)
    with polytrace.load(str(folder), threads=1) as second, second.trace([IDS]):
        difference = (second.model.layers[1].output[0][:, -1] - kept).save()
    assert not difference.any()


@pytest.mark.parametrize("bad", [{"name": "../up"}, {"name": ""}, {"name": 3}, {"ttl": 0}, {"ttl": "long"}])
def test_bad_names_and_times_are_refused_with_the_line(model: Any, bad: dict[str, Any]) -> None:
    with pytest.raises(GraphError, match=r"test_keeping\.py:\d+"):
        keep(model, **bad)


def test_misuse_is_told(model: Any) -> None:
    with pytest.raises(GraphError, match=r"kept already in this trace, at .*test_keeping"), model.trace([IDS]):
        model.model.layers[1].output[0].keep("x")
        model.model.layers[2].output[0].keep("x")
    kept = keep(model)
    with pytest.raises(GraphError, match="use it in a trace, or fetch"):
        kept + 1
    with model.trace([IDS], run=False):
        never = model.model.layers[1].output[0].keep()
    with pytest.raises(GraphError, match="not on the service"):
        never.fetch()


def test_a_failed_trace_keeps_nothing_and_changes_no_state(model: Any) -> None:
    state = model.state("count", torch.zeros(1))
    with pytest.raises(RunError), model.trace([IDS]):
        hidden = model.model.layers[1].output[0]
        hidden.keep("kept")
        state.update(state.value + 1)
        hidden[:, -1, hidden[:, -1].argmax() + 1000].save()
    assert state.fetch() == 0 and state.version == 1 and model.kept() == []


def test_updates_of_a_state_are_not_lost_between_threads(model: Any) -> None:
    state = model.state("count", torch.full((3,), 0.5))

    def add() -> None:
        for _ in range(10):
            with model.trace([IDS]):
                state.update(state.value + 1)

    threads = [threading.Thread(target=add) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(state.fetch(), torch.full((3,), 80.5)) and state.version == 81


def test_a_state_is_read_as_the_request_before_left_it(model: Any, plain: Any) -> None:
    state = model.state("last", torch.zeros(1, 32))
    for ids in (IDS, OTHER):
        with model.trace([ids]):
            hidden = model.model.layers[1].output[0][:, -1]
            before = state.value.save()
            step = (hidden - state.value).save()
            state.update(hidden)
    own, other = hidden_of(plain, 1, IDS)[:, -1], hidden_of(plain, 1, OTHER)[:, -1]
    assert close(before, own) and close(step, other - own) and close(state.fetch(), other)


def test_a_state_has_one_form(model: Any) -> None:
    state = model.state("s", torch.zeros(2, 3))
    assert torch.equal(model.state("s", torch.ones(2, 3)).fetch(), torch.zeros(2, 3))  # what is there stays
    assert [each.name for each in model.states()] == ["s"]
    with pytest.raises(GraphError, match=r"float32 \[2, 3\].*float32 \[3\]"):
        model.state("s", torch.zeros(3))
    for wrong in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(GraphError, match=r"test_keeping\.py:\d+"), model.trace([IDS]):
            state.update(wrong)
    with pytest.raises(GraphError, match="updated already"), model.trace([IDS]):
        state.update(state.value + 1)
        state.update(state.value + 2)
    with model.trace([IDS]):
        state.update(torch.ones(2, 3))
    assert torch.equal(state.fetch(), torch.ones(2, 3))
    state.delete()
    with pytest.raises(NotFoundError):
        model.state("s")
    with pytest.raises(NotFoundError), model.trace([IDS]):
        state.value.save()
    assert model.state("number", 1.5).fetch() == 1.5
