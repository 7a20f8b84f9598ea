"""What reads and writes mean, each against plain Hugging Face with a hand-written hook; what neighbours cannot do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from torch import Tensor
from transformers import PreTrainedModel

from engine.local import LocalBackend
from polytrace.errors import GraphError, RunError
from polytrace.model import Model

PROMPT = [3, 14, 15, 92, 65]
OTHER = [35, 89, 79]
Hook = Callable[[Any], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return model_of("llama")


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return Model(LocalBackend(str(folder), threads=1))


def by_hand(
    plain: PreTrainedModel, ids: list[int], before: dict[str, Hook] | None = None, after: dict[str, Hook] | None = None
) -> Tensor:
    """The logits `[1, tokens, vocabulary]` of one prompt with hooks on modules' first inputs and outputs."""
    with ExitStack() as stack, torch.no_grad():
        for path, hook in (before or {}).items():
            handle = plain.get_submodule(path).register_forward_pre_hook(lambda m, a, h=hook: (h(a[0]), *a[1:]))
            stack.callback(handle.remove)
        for path, hook in (after or {}).items():
            stack.callback(plain.get_submodule(path).register_forward_hook(lambda m, a, o, h=hook: h(o)).remove)
        return plain(torch.tensor([ids]), use_cache=False).logits


def close(ours: Tensor, plain: Tensor) -> bool:
    """Promise 1's tolerance in float32."""
    return (ours - plain).abs().max().item() <= 1e-5 * max(1.0, plain.abs().max().item())


def test_an_in_place_edit_of_a_norms_input_edits_the_residual_stream_and_an_assignment_does_not(
    model: Model, plain: PreTrainedModel
) -> None:
    path = "model.layers.1.post_attention_layernorm"
    with model.trace(PROMPT):
        model.model.layers[1].post_attention_layernorm.input[:, -1] += 2.0
        in_place = model.lm_head.output.save()
    with model.trace(PROMPT):
        norm = model.model.layers[1].post_attention_layernorm
        norm.input = norm.input + 2.0 * torch.tensor([[[0.0]], [[0.0]], [[0.0]], [[0.0]], [[1.0]]]).view(1, 5, 1)
        assigned = model.lm_head.output.save()

    def edit(hidden: Tensor) -> Tensor:
        hidden[:, -1] += 2.0
        return hidden

    def replace(hidden: Tensor) -> Tensor:
        return edit(hidden.clone())

    assert close(in_place, by_hand(plain, PROMPT, before={path: edit}))
    assert close(assigned, by_hand(plain, PROMPT, before={path: replace}))
    assert (in_place[:, -1] - assigned[:, -1]).abs().max() > 0.1


def test_a_read_is_a_snapshot_and_a_later_read_at_the_same_site_sees_the_write(model: Model) -> None:
    with model.trace(PROMPT):
        layer = model.model.layers[2]
        before = layer.output[0].save()
        layer.output[0][:, 1] = 7.0
        after = layer.output[0].save()
        next_input = model.model.layers[3].input.save()
    assert torch.equal(after, next_input)
    assert (after[:, 1] == 7.0).all()
    assert (before[:, 1] != 7.0).all()
    assert torch.equal(before[:, [0, 2, 3, 4]], after[:, [0, 2, 3, 4]])


def test_the_models_order_rules_between_sites_wherever_the_lines_stand(model: Model, plain: PreTrainedModel) -> None:
    with model.trace(PROMPT) as tracer:
        late = model.model.layers[3].output[0].save()
        model.model.layers[0].output[0][:] *= 0.5
    with torch.no_grad():
        handle = plain.model.layers[0].register_forward_hook(lambda m, a, o: o.mul_(0.5))
        seen: list[Tensor] = []
        other = plain.model.layers[3].register_forward_hook(lambda m, a, o: seen.append(o.clone()))
        plain(torch.tensor([PROMPT]), use_cache=False)
        handle.remove()
        other.remove()
    assert close(late, seen[0])
    assert any("later" in note for note in model.validate(tracer).notes)


def test_values_flow_to_earlier_layers_of_other_prompts_in_a_second_wave(model: Model, plain: PreTrainedModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            source = model.model.layers[3].output[0][:, -1]
        with tracer.invoke(OTHER):
            model.model.layers[0].output[0][:, -1] = source
            logits = model.lm_head.output[:, -1].save()
    seen: list[Tensor] = []
    by_hand(plain, PROMPT, after={"model.layers.3": lambda out: seen.append(out[:, -1].clone())})

    def patch(hidden: Tensor) -> Tensor:
        hidden[:, -1] = seen[0]
        return hidden

    expected = by_hand(plain, OTHER, after={"model.layers.0": patch})[:, -1]
    assert close(logits, expected)
    assert (expected - by_hand(plain, OTHER)[:, -1]).abs().max() > 0.1
    assert len(tracer.receipt.passes) == 2


def test_a_value_that_would_need_its_own_future_is_refused_with_both_lines(model: Model) -> None:
    with pytest.raises(GraphError, match=r"test_semantics\.py:\d+.*test_semantics\.py:\d+"), model.trace(PROMPT):
        model.model.layers[0].output[0][:, -1] = model.model.layers[3].output[0][:, -1]
        model.lm_head.output.save()


def test_ragged_prompts_are_left_padded_with_zeros_and_writes_on_pads_vanish(
    model: Model, plain: PreTrainedModel
) -> None:
    with model.trace([PROMPT, OTHER]) as tracer:
        model.model.layers[1].output[0][:] += 1.0
        hidden = model.model.layers[2].output[0].save()
        first = model.model.layers[2].output[0].at(0).save()
        logits = model.lm_head.output[:, -1].save()
    assert not hidden[1, :2].any()
    assert torch.equal(first[1], hidden[1, 2])
    assert tracer.receipt.pad_rows_written == 2
    for row, ids in enumerate((PROMPT, OTHER)):
        assert close(logits[row], by_hand(plain, ids, after={"model.layers.1": lambda out: out.add_(1.0)})[0, -1])


def test_modules_parameters_and_constants_give_torchs_numbers(model: Model, plain: PreTrainedModel) -> None:
    direction = torch.randn(32, generator=torch.Generator().manual_seed(3))
    with model.trace(PROMPT):
        hidden = model.model.layers[1].output[0]
        lens = model.lm_head(model.model.norm(hidden)).save()
        row = model.lm_head.weight[7].save()
        projected = (hidden @ direction).save()
    seen: list[Tensor] = []
    by_hand(plain, PROMPT, after={"model.layers.1": lambda out: seen.append(out.clone())})
    with torch.no_grad():
        assert close(lens, plain.lm_head(plain.model.norm(seen[0])))
    assert torch.equal(row, plain.lm_head.weight[7])
    assert close(projected, seen[0] @ direction)


def test_calling_a_module_does_not_fire_anybodys_reads_of_it(model: Model) -> None:
    with model.trace(PROMPT):
        lens = model.lm_head(model.model.norm(model.model.layers[0].output[0])).save()
        final = model.lm_head.output.save()
    with model.trace(PROMPT):
        alone = model.lm_head.output.save()
    assert torch.equal(final, alone)
    assert not torch.equal(lens, final)


def test_random_draws_depend_on_seed_and_node_only(model: Model) -> None:
    def noise(seed: int, prompt: list[int]) -> Tensor:
        with model.trace(prompt, seed=seed):
            drawn = [torch.randn_like(model.model.layers[0].output[0][:, -1]).save()]
        return drawn[0]

    assert torch.equal(noise(1, PROMPT), noise(1, OTHER))
    assert not torch.equal(noise(1, PROMPT), noise(2, PROMPT))


def test_nan_and_failure_stay_with_their_owner(model: Model) -> None:
    backend = model.backend
    assert isinstance(backend, LocalBackend)

    def quiet() -> Any:
        with model.trace(PROMPT, run=False) as tracer:
            model.lm_head.output.save()
        return tracer.built_request()

    with model.trace(PROMPT, run=False) as poisonous:
        model.model.layers[0].output[0][:] = float("nan")
        model.lm_head.output.save()
    with model.trace(OTHER, run=False) as failing:
        ids = model.lm_head.output[0].argmax(-1) + 1000
        model.model.layers[0].output[0][:] *= 3.0
        model.model.embed_tokens(ids).save()
    (alone,) = backend.run_together([backend.work_out(quiet())])
    requests = [quiet(), poisonous.built_request(), failing.built_request(), quiet()]
    first, poisoned, failed, last = backend.run_together([backend.work_out(request) for request in requests])
    assert len({outcome.receipt.passes[0].pass_id for outcome in (first, poisoned, last) if outcome.receipt}) == 1
    (name,) = alone.values
    assert torch.equal(first.values[name], alone.values[name])
    assert torch.equal(last.values[name], alone.values[name])
    assert poisoned.values[name].isnan().all()
    assert isinstance(failed.error, RunError)
    assert "1" in failed.error.message
    assert failed.error.where is not None
    assert failed.error.where.startswith("test_semantics.py:")


def test_only_what_was_saved_moves(model: Model) -> None:
    with model.trace(PROMPT) as tracer:
        neuron = model.model.layers[1].mlp.down_proj.input[:, -1, 17].save()
        last = model.lm_head.output[:, -1].save()
    receipt = tracer.receipt
    assert receipt.result_bytes == neuron.nbytes + last.nbytes == (1 + 96) * 4
    assert receipt.read_bytes > receipt.result_bytes
    fired = {(entry.site, entry.kind) for entry in receipt.fired}
    assert ("model.layers.1.mlp.down_proj.input", "read") in fired


def test_token_ids_cannot_be_overwritten(model: Model) -> None:
    with pytest.raises(GraphError, match="token ids"), model.trace(PROMPT):
        model.model.embed_tokens.input[:] = 5
        model.lm_head.output.save()
