"""`module.skip`: the model without that module, by hand and by polytrace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import IDS, OTHER, close, loaded, logits_of, small_gpt2, small_llama, without_layers
from torch import Tensor

from polytrace.errors import GraphError


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama(num_hidden_layers=6)


@pytest.fixture(scope="module")
def model(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(plain, tmp_path_factory.mktemp("llama")) as made:
        yield made


def skip_three(model: Any) -> None:
    for number in range(2, 5):
        model.model.layers[number].skip(model.model.layers[number].input)


def test_layers_that_hand_on_what_they_get_are_layers_that_are_not_there(plain: Any, model: Any) -> None:
    with model.trace(IDS, validate=True) as tracer:
        skip_three(model)
        ours = model.lm_head.output.save()
        after = model.model.layers[3].output.save()
        before = model.model.layers[1].output.save()
    with without_layers(plain, "model.layers", {2, 3, 4}):
        theirs = logits_of(plain, IDS)
    close(ours, theirs)
    assert (ours - logits_of(plain, IDS)).abs().max() > 0.1
    assert torch.equal(after, before)
    assert tracer.receipt.passes[0].layer_rows == (7, 7, 0, 0, 0, 7)
    assert tracer.receipt.token_layers == tracer.certificate.token_layers == 3 * len(IDS)


def test_a_skip_of_one_prompt_is_nobody_elses_and_equal_rows_run_once(plain: Any, model: Any) -> None:
    with model.trace(IDS):
        skip_three(model)
        alone = model.lm_head.output.save()
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            base = model.lm_head.output.save()
        with tracer.invoke(IDS):
            skip_three(model)
            skipped = model.lm_head.output.save()
        with tracer.invoke(IDS):
            skip_three(model)
            model.model.layers[5].output[0][:, -1] += 1.0
            changed = model.lm_head.output.save()
        with tracer.invoke([OTHER, IDS]):
            model.model.layers[0].skip(model.model.layers[0].input)
            padded = model.lm_head.output[:, -1].save()
    assert torch.equal(skipped, alone)
    close(base, logits_of(plain, IDS))
    assert torch.equal(changed[:, :-1], skipped[:, :-1]) and not torch.equal(changed, skipped)
    with without_layers(plain, "model.layers", {0}):
        close(padded, torch.cat([logits_of(plain, ids)[:, -1] for ids in (OTHER, IDS)]))
    rows = tracer.receipt.passes[0].layer_rows
    assert rows[0] == len(IDS) and rows[2] == 2 * len(IDS) + len(OTHER)


def test_the_value_may_be_another_prompts_or_layers(plain: Any, model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(OTHER):
            late = model.model.layers[4].output[0]
        with tracer.invoke([1, 2, 3, 4]):
            model.model.layers[1].skip(late)
            ours = model.lm_head.output.save()
        with tracer.invoke(IDS):
            model.model.layers[5].skip((model.model.layers[0].output[0], None))
            early = model.lm_head.output.save()
    kept: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, output: Tensor) -> None:
        kept["late"] = output

    handle = plain.model.layers[4].register_forward_hook(keep)
    logits_of(plain, OTHER)
    handle.remove()
    handle = plain.model.layers[1].register_forward_hook(lambda module, args, output: kept["late"])
    close(ours, logits_of(plain, [1, 2, 3, 4]))
    handle.remove()
    with without_layers(plain, "model.layers", {1, 2, 3, 4, 5}):
        close(early, logits_of(plain, IDS))
    assert len(tracer.receipt.passes) == 2


def test_any_module_can_be_skipped_in_its_own_structure(plain: Any, model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            mlp = model.model.layers[2].mlp
            mlp.skip(torch.zeros(1, len(IDS), 32))
            without_mlp = model.lm_head.output.save()
        for value in (torch.zeros(1, len(IDS), 32), (torch.zeros(1, len(IDS), 32), None)):
            with tracer.invoke(IDS):
                model.model.layers[2].self_attn.skip(value)
                without_attention = model.lm_head.output.save()
    handle = plain.model.layers[2].mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    close(without_mlp, logits_of(plain, IDS))
    handle.remove()
    handle = plain.model.layers[2].self_attn.register_forward_hook(
        lambda module, args, output: (torch.zeros_like(output[0]), *output[1:])
    )
    close(without_attention, logits_of(plain, IDS))
    handle.remove()


def test_what_a_skipped_module_would_have_made_leaks_nowhere(plain: Any, model: Any) -> None:
    poison = torch.full((1, len(IDS), 32), float("nan"))
    for module in ("", ".mlp"):
        with model.trace(IDS):
            layer = model.get_submodule("model.layers.1" + module)
            clean = layer.input.clone()
            layer.input = poison
            layer.skip(clean if not module else torch.zeros(1, len(IDS), 32))
            ours = model.lm_head.output.save()
        assert ours.isfinite().all()
    handle = plain.model.layers[1].mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    close(ours, logits_of(plain, IDS))
    handle.remove()


def test_what_is_inside_of_a_skipped_module_is_refused_with_both_lines(model: Any) -> None:
    told = r"layers\.1 is skipped for this prompt \(test_skip\.py:\d+\)"
    with pytest.raises(GraphError, match=told) as error, model.trace(IDS):
        model.model.layers[1].skip(model.model.layers[1].input)
        model.model.layers[1].mlp.output.save()
    assert error.value.where is not None and error.value.where.startswith("test_skip.py")
    with pytest.raises(GraphError, match=r"q_rot cannot be read: model\.layers\.1 is skipped"), model.trace(IDS):
        model.model.layers[1].skip(model.model.layers[1].input)
        model.model.layers[1].self_attn.q_rot.save()
    told = r"cannot be skipped: model\.layers\.1\.mlp\.output is used at test_skip\.py"
    with pytest.raises(GraphError, match=told), model.trace(IDS):
        model.model.layers[1].mlp.output.save()
        model.model.layers[1].skip(model.model.layers[1].input)
    with (
        pytest.raises(
            GraphError, match=r"output is used at test_skip\.py:\d+, and a module that does not run has none"
        ),
        model.trace(IDS),
    ):
        model.model.layers[1].skip(model.model.layers[1].output * 2)
    with pytest.raises(GraphError, match="is skipped already"), model.trace(IDS):
        model.model.layers[1].skip(model.model.layers[1].input)
        model.model.layers[1].skip(model.model.layers[1].input)


def test_a_wrong_structure_or_shape_is_refused(model: Any) -> None:
    told = r"skip\(\.\.\.\) takes model\.layers\.1\.output in that structure"
    with pytest.raises(GraphError, match=told), model.trace(IDS):
        model.model.layers[1].skip((model.model.layers[1].input, model.model.layers[1].input))
    with pytest.raises(GraphError, match="exact shape"), model.trace(IDS):
        model.model.layers[1].skip(torch.zeros(1, 2, 32))
        model.lm_head.output.save()
    with pytest.raises(GraphError, match="whole model cannot be skipped"), model.trace(IDS):
        model.skip(torch.zeros(1))


def test_gpt2_goes_around_its_layers_too(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = small_gpt2()
    with loaded(plain, tmp_path_factory.mktemp("gpt2")) as model, model.trace([IDS, OTHER]) as tracer:
        for number in (0, 2):
            model.transformer.h[number].skip(model.transformer.h[number].input)
        ours = model.lm_head.output[:, -1].save()
    with without_layers(plain, "transformer.h", {0, 2}):
        close(ours, torch.cat([logits_of(plain, ids)[:, -1] for ids in (IDS, OTHER)]))
    assert tracer.receipt.passes[0].layer_rows == (0, 11, 0, 11)
