"""Edits that later traces start from: for whatever prompts these have, by name and version, against hooks by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, OTHER, WIDTH, at_last, close, hooked, small_llama
from torch import Tensor

import polytrace
from polytrace.edits.sets import LocalShelf, decode_edits, encode_edits
from polytrace.errors import GraphError, NotFoundError, WireError
from polytrace.model import Model
from polytrace.wire import encode_request

HAPPY = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)) * 3
CALM = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)) * 3


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def folder(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("llama")
    plain.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Iterator[Any]:
    with polytrace.load(str(folder), threads=1) as model:
        yield model


@pytest.fixture
def model(loaded: Any) -> Any:
    """The loaded model, with no edits kept."""
    return Model(loaded.backend)


def steer(model: Any, layer: int, vector: Tensor, name: str | None = None, **options: Any) -> Any:
    with model.edit(name, **options) as edited:
        model.model.layers[layer].output[0][:, -1] += vector
    return edited


def logits_of(model: Any, prompt: Any, **options: Any) -> Tensor:
    with model.trace(prompt, **options):
        saved = [model.lm_head.output.save()]
    return saved[0]


def test_an_edit_applies_to_every_prompt_of_the_traces_that_start_from_it(plain: Any, model: Any) -> None:
    edited = steer(model, 1, HAPPY)
    together = logits_of(edited, [IDS, OTHER])
    for row, ids in enumerate((IDS, OTHER)):
        theirs = hooked(plain, ids, {"model.layers.1": at_last(HAPPY)})[0]
        close(together[row, -len(ids) :], theirs[0])
        close(logits_of(edited, ids), theirs)
        assert (theirs - hooked(plain, ids)[0]).abs().max() > 0.1
        close(logits_of(model, ids), hooked(plain, ids)[0])
    with edited.trace() as tracer:
        with tracer.invoke(OTHER):
            first = edited.lm_head.output.save()
        with tracer.invoke([IDS]):
            model.model.layers[2].output[0][:, -1] += CALM  # of the model that was edited: its modules are the same
            second = model.lm_head.output.save()
    close(first, hooked(plain, OTHER, {"model.layers.1": at_last(HAPPY)})[0])
    close(second, hooked(plain, IDS, {"model.layers.1": at_last(HAPPY), "model.layers.2": at_last(CALM)})[0])


def test_positions_masks_calls_and_parameters_follow_the_later_prompts(plain: Any, model: Any) -> None:
    with model.edit() as edited:
        hidden = model.model.layers[1].output[0]
        assert (hidden.dim(), hidden.shape[-1]) == (3, WIDTH)
        hidden.at(1)[:, : WIDTH // 2] = 0.0
        hidden.at([0, -1])[...] += model.model.norm.weight
        assert hidden.at(1).shape[-1] == model.model.norm(hidden.at([0, -1])).shape[-1] == WIDTH
        mean = (hidden * edited.mask[..., None]).sum(1) / edited.mask.sum(1, keepdim=True)
        model.model.layers[2].mlp.output = model.model.layers[2].mlp.output + model.model.norm(mean)[:, None]

    def by_hand(hidden: Tensor) -> Tensor:
        hidden[:, 1, : WIDTH // 2] = 0.0
        hidden[:, [0, -1]] += plain.model.norm.weight
        return hidden

    logits = logits_of(edited, [IDS, OTHER, IDS[:2]])
    for row, ids in enumerate((IDS, OTHER, IDS[:2])):
        changed = hooked(plain, ids, {"model.layers.1": by_hand})[1]["model.layers.1"]
        added = plain.model.norm(changed.mean(1)).detach()
        edits = {"model.layers.1": by_hand, "model.layers.2.mlp": lambda out, added=added: out + added}
        close(logits[row, -len(ids) :], hooked(plain, ids, edits)[0][0])  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="no position 1 in this prompt, which has 1 tokens"):
        logits_of(edited, [5])


def test_a_choice_is_made_anew_by_each_later_prompt(plain: Any, model: Any) -> None:
    first = [hooked(plain, ids)[1]["model.layers.1"][0, -1, 0] for ids in (IDS, OTHER)]
    with model.edit() as edited:
        hidden = model.model.layers[1].output[0]
        is_larger = hidden[:, -1, 0].max() >= float(max(first)) - 1e-3
        model.model.layers[1].output[0][:] = polytrace.cond(is_larger, lambda: hidden * 2, lambda: hidden)
        with pytest.raises(GraphError, match=r"are float32\[\?, \?, 32\] and float32\[\?, 32\]"):
            polytrace.cond(is_larger, hidden, hidden[:, -1])
    for ids, number in zip((IDS, OTHER), first, strict=True):
        change: dict[str, Any] = {"model.layers.1": lambda x: x * 2} if number == max(first) else {}
        close(logits_of(edited, ids), hooked(plain, ids, change)[0])
    both: dict[str, Any] = {"model.layers.1": lambda x: x * 2}
    assert (hooked(plain, IDS, both)[0] - hooked(plain, IDS)[0]).abs().max() > 0.01
    close(logits_of(edited, [IDS, OTHER])[:1], hooked(plain, IDS, both)[0])


def test_several_are_stacked_in_their_order(plain: Any, model: Any) -> None:
    double = steer(model, 1, HAPPY, "happy")
    with model.edit("twice"):
        model.model.layers[1].output[0][:] *= 2.0

    def happy_then_twice(hidden: Tensor) -> Tensor:
        return at_last(HAPPY)(hidden) * 2.0

    def twice_then_happy(hidden: Tensor) -> Tensor:
        return at_last(HAPPY)(hidden * 2.0)

    first = hooked(plain, IDS, {"model.layers.1": happy_then_twice})[0]
    second = hooked(plain, IDS, {"model.layers.1": twice_then_happy})[0]
    assert (first - second).abs().max() > 0.1
    close(logits_of(model, IDS, edits=["happy", "twice"]), first)
    close(logits_of(double, IDS, edits=["twice"]), first)
    close(logits_of(double.edited("twice"), IDS), first)
    close(logits_of(model.edited("twice", double), IDS), second)


def test_versions_count_up_and_each_can_be_had(plain: Any, model: Any) -> None:
    steer(model, 1, HAPPY, "mood")
    steer(model, 2, CALM, "mood")
    happy = hooked(plain, IDS, {"model.layers.1": at_last(HAPPY)})[0]
    calm = hooked(plain, IDS, {"model.layers.2": at_last(CALM)})[0]
    close(logits_of(model.edited("mood"), IDS), calm)
    close(logits_of(model.edited("mood", version=1), IDS), happy)
    close(logits_of(model, IDS, edits=["mood@1"]), happy)
    assert [(known.name, known.version) for known in model.edits()] == [("mood", 1), ("mood", 2)]
    model.delete_edit("mood", version=2)
    close(logits_of(model.edited("mood"), IDS), happy)
    steer(model, 2, CALM, "mood")
    assert [known.version for known in model.edits()] == [1, 3]
    model.delete_edit("mood")
    assert model.edits() == []
    with pytest.raises(NotFoundError, match="no edit 'mood' here; there are none"):
        model.edited("mood")


def test_receipt_and_certificate_say_what_a_request_started_from(model: Any) -> None:
    edited = steer(model, 1, HAPPY, "happy")
    unnamed = steer(edited, 2, CALM)
    with unnamed.trace(IDS) as tracer:
        model.lm_head.output.save()
    names = ("happy@1", tracer.receipt.edits[1])
    assert names[1].startswith("edit at test_edits.py:")
    assert tracer.receipt.edits == names == model.validate(tracer).edits
    with model.session() as session:
        with model.trace(IDS):
            model.lm_head.output.save()
        with edited.trace(OTHER):
            model.lm_head.output.save()
    assert session.receipt.edits == ("happy@1",)
    with pytest.raises(GraphError, match="starts from 17 edits; 16 is the most"):
        logits_of(model, IDS, edits=[steer(model, 1, HAPPY, f"e{number}") for number in range(17)])


def test_an_edited_request_merged_with_others_has_the_bits_that_it_has_alone(model: Any) -> None:
    edited = [steer(model, 1, HAPPY), steer(model, 2, CALM), model]

    def request(of: Any) -> Any:
        with of.trace(IDS, run=False) as tracer:
            model.lm_head.output.save()
        return tracer.request

    requests = [request(of) for of in edited]
    backend = model.backend
    together = backend.run_together([backend.work_out(each) for each in requests])
    assert together[0].receipt.passes[0].requests == 3
    for each, merged in zip(requests, together, strict=True):
        (alone,) = backend.run_together([backend.work_out(each)])
        assert torch.equal(merged.values["0"], alone.values["0"])


def test_random_edits_draw_anew_for_each_invoke_and_the_same_for_a_seed(model: Any) -> None:
    with model.edit() as edited:
        hidden = model.model.layers[1].output[0]
        hidden[:, -1] += torch.randn_like(hidden[:, -1])

    def run(seed: int) -> list[Tensor]:
        with edited.trace(seed=seed) as tracer:
            saved = []
            for _ in range(2):
                with tracer.invoke(IDS):
                    saved.append(model.model.layers[1].output[0][:, -1].save())
        return saved

    first, second = run(1)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(run(1), (first, second), strict=True))
    assert not torch.equal(first, run(2)[0])


def test_in_place_edits_change_the_model_that_they_were_made_of(plain: Any, model: Any) -> None:
    with model.edit(inplace=True):
        model.model.layers[1].output[0][:, -1] += HAPPY
    close(logits_of(model, IDS), hooked(plain, IDS, {"model.layers.1": at_last(HAPPY)})[0])
    model.clear_edits()
    close(logits_of(model, IDS), hooked(plain, IDS)[0])


def test_edits_can_be_looked_at_while_a_trace_is_recorded(model: Any) -> None:
    edited = steer(model, 1, HAPPY)
    with edited.trace(IDS, peek=True) as tracer:
        seen = float(model.model.layers[1].output[0].norm())
        norm = model.model.layers[1].output[0].norm().save()
    assert seen == float(norm)
    assert tracer.peeks[0].edits == tracer.receipt.edits
    with model.trace(IDS):
        without = model.model.layers[1].output[0].norm().save()
    assert abs(float(norm) - float(without)) > 0.1


def test_what_an_edit_cannot_be_is_refused_with_the_users_line(model: Any) -> None:
    def refused(match: str, body: Any) -> None:
        with pytest.raises(GraphError, match=match) as caught, model.edit("mine") as edited:
            body(edited)
        assert str(caught.value.where).startswith("test_edits.py:")

    layer = model.model.layers[1]
    refused("this edit writes nothing", lambda edited: layer.output[0][:, -1] * 2)
    refused("save values in the traces that start from it", lambda edited: layer.output[0].save())
    refused(r"shape is \[\?, \?, 32\].*later traces", lambda edited: layer.output[0].shape[1])
    refused("an edit runs when a later trace", lambda edited: float(layer.output[0].norm()))
    with pytest.raises(GraphError, match="a trace is open already"), model.edit():
        model.trace(IDS).__enter__()
    with pytest.raises(GraphError, match="cannot be an edit's name"):
        model.edit("../mine")
    with pytest.raises(GraphError, match="edits are names, edited models and adapters, not a int"):
        model.trace(IDS, edits=[3])
    assert model.edits() == []
    with pytest.raises(ValueError, match="mine"), model.edit("mine") as edited:
        layer.output[0][:] *= 2
        raise ValueError("mine")
    assert (model.edits(), edited.edits_of_traces) == ([], ())


def test_a_folder_keeps_edits_for_the_next_process(folder: Path, plain: Any, tmp_path: Path) -> None:
    with polytrace.load(str(folder), threads=1, edits=str(tmp_path)) as first:
        steer(first, 1, HAPPY, "mood")
        steer(first, 2, CALM, "mood")
        first.delete_edit("mood", version=2)
        again = Model(first.backend, shelf=LocalShelf(tmp_path))
        close(logits_of(again.edited("mood"), IDS), hooked(plain, IDS, {"model.layers.1": at_last(HAPPY)})[0])
        steer(again, 2, CALM, "mood")
        assert [known.version for known in again.edits()] == [1, 3]


def test_only_the_bytes_of_an_edit_are_taken_as_one(model: Any) -> None:
    (edits,) = steer(model, 1, HAPPY).edits_of_traces
    data = encode_edits(edits)
    assert decode_edits(data, edits.label, max_nodes=100) == edits
    with pytest.raises(WireError, match="at most 1 "):
        decode_edits(data, "e", max_nodes=1)
    with pytest.raises(WireError):
        decode_edits(data[:-1], "e", max_nodes=100)
    with model.trace(IDS, run=False) as tracer:
        model.lm_head.output.save()
    with pytest.raises(WireError, match="no prompts of its own"):
        decode_edits(b"".join(encode_request(tracer.request)), "e", max_nodes=100)
