"""Parts of the language with each other: edits, states and kept values in maps, choices in edits, looks at states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from small import WIDTH, small_llama
from torch import Tensor

import polytrace
from polytrace.contents import LARGE_BYTES
from polytrace.edits.sets import decode_edits, encode_edits
from polytrace.errors import GraphError
from polytrace.maps.bodies import _by_content

PROMPTS = [[3, 17, 42, 5, 9, 30, 11], [8, 25, 1, 60], [5, 5]]
VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("llama")
    small_llama().save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as model:
        yield model


def steered(model: Any, name: str | None = None) -> Any:
    with model.edit(name) as edited:
        model.model.layers[0].output[0][:, -1] += VECTOR
        model.model.layers[1].output[0].at(-2)[:] *= 2
    return edited


def logits_of(model: Any, prompt: Any, **options: Any) -> Tensor:
    with model.trace(prompt, **options):
        saved = [model.lm_head.output[:, -1].save()]
    return saved[0]


def test_a_map_starts_from_edits_as_a_trace_does(model: Any) -> None:
    edited = steered(model, "steered")

    def body() -> dict[str, Any]:
        return {"logits": model.lm_head.output[:, -1]}

    maps = [
        edited.map(PROMPTS, body),
        model.map(PROMPTS, body, edits=["steered"]),
        model.map(PROMPTS, body, edits=[edited]),
    ]
    own = torch.cat([logits_of(edited, prompt) for prompt in PROMPTS])
    plain = torch.cat([logits_of(model, prompt) for prompt in PROMPTS])
    assert not torch.equal(own, plain)
    for each in maps:
        (part,) = each
        assert torch.equal(part["logits"], own)


def test_a_sweep_and_a_map_of_all_prompts_at_once_start_from_edits(model: Any) -> None:
    edited = steered(model)
    (part,) = edited.map([0, 2], lambda layer: {"h": model.model.layers[layer].output[0][:, -1]}, prompts=PROMPTS[0])
    with edited.trace(PROMPTS[0]):
        found = [model.model.layers[layer].output[0][:, -1].save() for layer in (0, 2)]
    assert torch.equal(part["h"], torch.cat(found))
    (whole,) = edited.map(PROMPTS[:2], lambda: {"h": (h := model.lm_head.output[:, -1]) - h.mean(0, keepdim=True)})
    with edited.trace(PROMPTS[:2]):
        logits = model.lm_head.output[:, -1]
        centred = (logits - logits.mean(0, keepdim=True)).save()
    assert torch.equal(whole["h"], centred)


def test_a_folder_of_a_map_with_other_edits_is_refused(model: Any, tmp_path: Path) -> None:
    def body() -> dict[str, Any]:
        return {"logits": model.lm_head.output[:, -1]}

    model.map(PROMPTS, body, to=tmp_path).run()
    with pytest.raises(polytrace.errors.ConflictError):
        model.map(PROMPTS, body, to=tmp_path, edits=[steered(model)]).run()


def test_a_map_tells_kept_values_of_one_form_apart_and_reads_no_state(model: Any) -> None:
    with model.trace(PROMPTS[0]):
        hidden = model.model.layers[0].output[0][:, -1]
        one, other = hidden.keep(), (hidden * 5).keep()
    # as of a service, where the bytes are not here
    named = {name: replace(kept.kept_tensor, data=memoryview(b"")) for name, kept in (("a", one), ("b", other))}
    assert not any(raw.is_here for raw in named.values()) and len(set(_by_content(named).values())) == 2
    state = model.state("read", torch.ones(1, WIDTH))

    def body() -> dict[str, Any]:
        return {"h": model.model.layers[0].output[0][:, -1] + state.value}

    with pytest.raises(GraphError, match="the state 'read' may change between them") as refused:
        model.map(PROMPTS, body).run()
    assert refused.value.where is not None and refused.value.where.startswith("test_together.py:")


def test_a_map_leaves_nothing_on_the_service_and_says_so(model: Any) -> None:
    state = model.state("left", torch.zeros(1, WIDTH))

    def keeps() -> dict[str, Any]:
        hidden = model.model.layers[0].output[0][:, -1]
        hidden.keep("of-a-map")
        return {"h": hidden}

    def updates() -> dict[str, Any]:
        hidden = model.model.layers[0].output[0][:, -1]
        state.update(hidden)
        return {"h": hidden}

    for body in (keeps, updates):
        with pytest.raises(GraphError, match="leaves nothing on the service") as refused:
            model.map(PROMPTS, body).run()
        assert refused.value.where is not None and refused.value.where.startswith("test_together.py:")
    assert state.version == 1


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("is_by_at", [True, False])
def test_a_prompt_that_the_body_cannot_be_recorded_for_is_left_out(model: Any, place: int, is_by_at: bool) -> None:
    prompts = [PROMPTS[0], PROMPTS[1]]
    prompts.insert(place, [7])

    def body() -> dict[str, Any]:
        hidden = model.model.layers[1].output[0]
        return {"second": hidden.at(1) if is_by_at else hidden[:, 1]}

    mapping = model.map(prompts, body, on_error="skip")
    (part,) = mapping
    assert list(mapping.skipped) == [place] and f"prompt {place}: " in mapping.skipped[place]
    assert part["second"].shape == (2, WIDTH)
    with pytest.raises(GraphError, match=r"index 1 is out of bounds|no position 1 in this prompt, which has 1 tokens"):
        model.map(prompts, body).run()


def test_a_body_that_is_to_blame_is_not_taken_for_its_prompts(model: Any) -> None:
    with pytest.raises(GraphError, match="no position 40"):
        model.map(PROMPTS * 10, lambda: {"h": model.model.layers[0].output[0].at(40)}, on_error="skip").run()


def test_an_edit_chooses_by_a_number_of_the_run(model: Any) -> None:
    def gate(hidden: Any) -> Any:
        return polytrace.cond(hidden[:, -1].sum() > 0, hidden * 0.5, hidden + VECTOR)

    with model.edit("gate"):
        hidden = model.model.layers[1].output[0]
        hidden[:] = gate(hidden)
    sides = set()
    for prompt in (*PROMPTS, [9], [1, 2, 3]):
        with model.trace(prompt):
            hidden = model.model.layers[1].output[0]
            side = (hidden[:, -1].sum() > 0).save()
            hidden[:] = gate(hidden)
            logits = model.lm_head.output[:, -1].save()
        sides.add(bool(side))
        assert torch.equal(logits_of(model, prompt, edits=["gate"]), logits)
    assert sides == {True, False}
    with pytest.raises(GraphError, match=r"float32\[\?, \?, \d+\] and float32\[\?, \d+\]"), model.edit():
        hidden = model.model.layers[1].output[0]
        hidden[:] = polytrace.cond(hidden.sum() > 0, hidden, hidden[:, -1])


def test_a_state_is_not_looked_at_for_it_may_change_before_the_run(model: Any) -> None:
    state = model.state("seen", torch.zeros(1, WIDTH))
    with pytest.raises(GraphError, match="other requests may change"), model.trace(PROMPTS[0], peek=True):
        bool((state.value + model.model.layers[0].output[0][:, -1]).sum() > 0)


def test_a_kept_value_is_compared_walked_and_asked_like_a_tensor(model: Any) -> None:
    with model.trace(PROMPTS[0]):
        hidden = model.model.layers[1].output[0][:, -1]
        hidden, positive = hidden.keep(), (hidden > 0).keep()
    data, mask = hidden.fetch(), positive.fetch()
    with model.trace(PROMPTS[0]):
        zero, unequal = (hidden == 0).save(), (data != hidden).save()
        negative, both = (~positive).save(), (positive & (hidden > 1)).save()
        rows = [row.save() for row in hidden]
        doubled = (numpy.full(WIDTH, 2, numpy.float32) * hidden).save()
        with pytest.raises(GraphError, match=r"torch\.where"):
            bool(positive.any())
        with pytest.raises(GraphError, match=r"torch\.where"):
            bool(positive)
    assert torch.equal(zero, data == 0) and not unequal.any()
    assert torch.equal(negative, ~mask) and torch.equal(both, mask & (data > 1))
    assert torch.equal(doubled, data * 2)
    assert len(rows) == 1 and torch.equal(rows[0], data[0])
    with pytest.raises(GraphError, match="fetch"):
        bool(positive)
    with model.trace(PROMPTS[0], peek=True):
        assert float(hidden.sum()) == float(data.sum())
        model.lm_head.output.save()
    assert hidden in (hidden,) and hidden not in (positive,)


def test_large_factors_and_edits_fetched_by_name_are_known_by_their_hash(model: Any) -> None:
    wide = torch.randn(LARGE_BYTES // 4)
    with pytest.raises(GraphError, match="whose weight is"):  # it is of no module's size
        logits_of(model, PROMPTS[0], edits=[polytrace.delta({"model.layers.0.mlp.up_proj": (wide, wide)})])
    update = polytrace.delta({"model.layers.0.mlp.up_proj": (wide, wide)}).updates["model.layers.0.mlp.up_proj"]
    assert update.down.digest is not None and update.into.digest is not None
    with model.edit() as edited:
        hidden = model.model.layers[1].output[0]
        hidden[:] = hidden + torch.ones(WIDTH, LARGE_BYTES // 4).sum(-1) * 0 + torch.ones(LARGE_BYTES, WIDTH)[0]
        hidden[:] += (hidden @ torch.zeros(WIDTH, LARGE_BYTES // 4)).sum(-1, keepdim=True)
    (edits,) = edited.edits_of_traces
    again = decode_edits(encode_edits(edits), "again", max_nodes=100)
    digests = [raw.digest for raw in edits.constants.values() if raw.digest is not None]
    assert digests and [raw.digest for raw in again.constants.values() if raw.digest is not None] == digests


def test_a_factor_that_stands_elsewhere_is_a_matrix(model: Any) -> None:
    state = model.state("factor", torch.ones(WIDTH))
    with pytest.raises(GraphError, match="keep it as a matrix"):
        polytrace.delta({"model.layers.0.mlp.down_proj": (state, torch.ones(4))})


def test_functions_of_polytrace_and_einops_take_a_kept_value(model: Any) -> None:
    with model.trace(PROMPTS[0]):
        kept = model.model.layers[1].output[0][:, -1].keep()
    with model.trace(PROMPTS[0]):
        probabilities = polytrace.functions.softmax(kept, dim=-1).save()
        joined = polytrace.functions.cat([kept, kept], dim=0).save()
        chosen = polytrace.cond(model.model.layers[0].output[0].sum() > float("-inf"), kept, kept * 0).save()
    data = kept.fetch()
    assert torch.equal(probabilities, data.softmax(-1))
    assert torch.equal(joined, torch.cat([data, data])) and torch.equal(chosen, data)


def test_a_saved_list_is_filled_by_all_traces_of_a_session(model: Any) -> None:
    with model.session(), model.trace(PROMPTS[0]):
        found = polytrace.save([])
        found.append(model.model.layers[0].output[0][:, -1].sum())
    with model.session():
        with model.trace(PROMPTS[0]):
            both = polytrace.save([])
            both.append(model.model.layers[0].output[0][:, -1].sum())
        with model.trace(PROMPTS[1]):
            both.append(model.model.layers[0].output[0][:, -1].sum())
    with model.trace(PROMPTS[1]):
        second = model.model.layers[0].output[0][:, -1].sum().save()
    assert [torch.equal(one, other) for one, other in zip(both, [found[0], second], strict=True)] == [True, True]


def test_one_edit_outside_of_a_list_is_told(model: Any) -> None:
    with pytest.raises(GraphError, match=r"a list, as in edits=\['steered'\]"):
        logits_of(model, PROMPTS[0], edits="steered")
    with pytest.raises(GraphError, match="a list, as in edits="):
        logits_of(model, PROMPTS[0], edits=steered(model))


def test_what_is_fetched_is_the_callers_own(model: Any) -> None:
    state = model.state("own", torch.zeros(1, WIDTH))
    with model.trace(PROMPTS[0]):
        hidden = model.model.layers[1].output[0][:, -1]
        kept, saved = hidden.keep(), hidden.save()
        state.update(hidden)
    own = saved.clone()
    for changed in (saved, kept.fetch(), state.fetch()):
        assert torch.equal(changed, own)
        changed.zero_()
    with model.trace(PROMPTS[0]):
        again = [kept.value.save(), state.value.save()]
    for one in (*again, kept.fetch(), state.fetch()):
        assert torch.equal(one, own)
    again[0].zero_()
    assert torch.equal(kept.fetch(), own)


def test_a_trace_that_was_only_looked_into_ends_well(model: Any) -> None:
    with model.trace(PROMPTS[0], peek=True) as tracer:
        hidden = model.model.layers[1].output[0]
        seen = float(hidden.sum())
    with model.trace(PROMPTS[0]):
        summed = model.model.layers[1].output[0].sum().save()
    assert seen == float(summed) and len(tracer.peeks) == 1
    with pytest.raises(GraphError, match="saved nothing"):
        print(tracer.receipt)
    with pytest.raises(GraphError, match="saved nothing"):
        hidden.sum()
    with pytest.raises(GraphError, match="this trace saves nothing"), model.trace(PROMPTS[0], peek=True):
        model.model.layers[1].output[0].sum()


def test_a_call_of_a_module_that_an_adapter_changes_is_refused(model: Any) -> None:
    factors = (torch.ones(WIDTH, 1), torch.ones(1, model.config.intermediate_size))
    adapter = polytrace.delta({"model.layers.1.mlp.down_proj": factors})
    with model.edit() as called:
        hidden = model.model.layers[0].output[0]
        hidden[:] = hidden + model.model.layers[1].mlp(hidden)
    words = "a call has the weights that are served"
    with pytest.raises(GraphError, match=words), model.trace(PROMPTS[0], edits=[adapter]):
        model.model.layers[1].mlp(model.model.layers[0].output[0]).save()
    with pytest.raises(GraphError, match=words):
        logits_of(model, PROMPTS[0], edits=[called, adapter])
    with model.session(), model.trace(PROMPTS[0]):
        plain = model.model.layers[1].mlp(model.model.layers[0].output[0]).save()
    with model.trace(PROMPTS[0], edits=[adapter]):
        other = model.model.layers[2].mlp(model.model.layers[0].output[0]).save()
    assert plain.shape == other.shape
    with pytest.raises(GraphError, match="names at least one module"):
        polytrace.delta([("model.layers.1.mlp.down_proj", factors)])  # type: ignore[arg-type]
