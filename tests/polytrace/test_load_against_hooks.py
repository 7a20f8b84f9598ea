"""polytrace.load on a tiny Llama gives what plain Hugging Face gives with hooks written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_llama
from torch import Tensor
from transformers import LlamaForCausalLM

import polytrace
from polytrace.errors import GraphError, RunError

IDS = [3, 17, 42, 5, 9, 30, 11]
OTHER = [8, 25, 1, 60]


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="module")
def model(plain: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("llama")
    plain.save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as loaded:
        yield loaded


def hooked(plain: Any, ids: list[int], edits: dict[str, Callable[[Tensor], Tensor]], reads: list[str] = []) -> Any:  # noqa: B006
    """Logits of one prompt with edits of modules' outputs, and the outputs that modules had."""
    seen: dict[str, Tensor] = {}
    handles = []

    def hook(name: str) -> Callable[..., Any]:
        def run(module: Any, args: Any, output: Any) -> Any:
            if name in edits:
                output = edits[name](output.clone())
            seen[name] = output
            return output

        return run

    for name in {*edits, *reads}:
        handles.append(plain.get_submodule(name).register_forward_hook(hook(name)))
    try:
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, seen


def close(ours: Tensor, theirs: Tensor) -> None:
    assert type(ours) is Tensor
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_reading_is_what_hooks_see(plain: Any, model: Any) -> None:
    logits, seen = hooked(plain, IDS, {}, ["model.layers.2", "model.layers.1.mlp"])
    with model.trace(IDS) as tracer:
        hidden = model.model.layers[2].output[0].save()
        mlp = model.model.layers[1].mlp.output[:, 2:4].save()
        ours = model.output.logits.save()
        lens = model.lm_head(model.model.norm(model.model.layers[2].output[0]))[:, -1].softmax(-1).topk(3)
        best = lens.indices.save()
    close(hidden, seen["model.layers.2"])
    close(mlp, seen["model.layers.1.mlp"][:, 2:4])
    close(ours, logits)
    with torch.no_grad():
        expected = plain.lm_head(plain.model.norm(seen["model.layers.2"]))[:, -1].topk(3).indices
    assert torch.equal(best, expected)
    assert {fired.site for fired in tracer.receipt.fired} >= {"model.layers.2.output", "output.logits"}


def test_steering_moves_the_logits_as_a_hook_does(plain: Any, model: Any) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def steer(hidden: Tensor) -> Tensor:
        hidden[:, -2:] += 3 * vector
        return hidden

    theirs, _ = hooked(plain, IDS, {"model.layers.1": steer})
    with model.trace(IDS):
        model.model.layers[1].output[0][:, -2:] += 3 * vector
        ours = model.lm_head.output.save()
    close(ours, theirs)
    assert (ours - hooked(plain, IDS, {})[0]).abs().max() > 0.1


def test_patching_between_invokes_is_patching_by_hand(plain: Any, model: Any) -> None:
    clean = hooked(plain, IDS, {}, ["model.layers.1"])[1]["model.layers.1"][:, -1]

    def patch(hidden: Tensor) -> Tensor:
        hidden[:, -1] = clean
        return hidden

    theirs, _ = hooked(plain, OTHER, {"model.layers.1": patch})
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            h = model.model.layers[1].output[0][:, -1]
        with tracer.invoke(OTHER):
            model.model.layers[1].output[0][:, -1] = h
            ours = model.lm_head.output[:, -1].save()
    close(ours, theirs[:, -1])
    assert (ours - hooked(plain, OTHER, {})[0][:, -1]).abs().max() > 0.1


def test_every_kind_of_write_is_what_the_hook_does(plain: Any, model: Any) -> None:
    edits: list[tuple[str, Callable[[Any], Any], Callable[[], None]]] = []

    def edge() -> None:
        model.model.layers[1].mlp.output = model.model.layers[1].mlp.output * 2

    def heads() -> None:
        model.model.layers[1].mlp.output.view(1, len(IDS), 4, 8)[:, :, 1] = 0

    def listed() -> None:
        model.model.layers[1].mlp.output[:, [0, 3]] -= 1

    def masked() -> None:
        out = model.model.layers[1].mlp.output
        out[...] = torch.where(out > 0, out, -out)

    def set_heads(out: Tensor) -> Tensor:
        out.view(1, len(IDS), 4, 8)[:, :, 1] = 0
        return out

    def set_listed(out: Tensor) -> Tensor:
        out[:, [0, 3]] -= 1
        return out

    edits = [
        ("edge", lambda out: out * 2, edge),
        ("heads", set_heads, heads),
        ("listed", set_listed, listed),
        ("masked", lambda out: out.abs(), masked),
    ]
    without = hooked(plain, IDS, {})[0]
    for name, by_hand, by_trace in edits:
        theirs, _ = hooked(plain, IDS, {"model.layers.1.mlp": by_hand})
        with model.trace(IDS):
            by_trace()
            ours = model.output.logits.save()
        close(ours, theirs)
        assert (ours - without).abs().max() > 1e-2, name


def test_a_list_of_prompts_is_each_alone(plain: Any, model: Any) -> None:
    with model.trace([IDS, OTHER]) as tracer:
        hidden = model.model.layers[2].output[0]
        last, first = hidden.at(-1).save(), hidden.at(0).save()
        mean = (hidden * tracer.mask[..., None]).sum(1).save()
        logits = model.lm_head.output.save()
    for row, ids in enumerate((IDS, OTHER)):
        theirs, seen = hooked(plain, ids, {}, ["model.layers.2"])
        close(last[row], seen["model.layers.2"][0, -1])
        close(first[row], seen["model.layers.2"][0, 0])
        close(mean[row], seen["model.layers.2"][0].sum(0))
        close(logits[row, -len(ids) :], theirs[0])
    assert logits[1, : len(IDS) - len(OTHER)].abs().max() == 0


def test_a_value_carried_back_takes_a_second_pass(plain: Any, model: Any) -> None:
    late = hooked(plain, IDS, {}, ["model.layers.3"])[1]["model.layers.3"][:, -1]

    def patch(hidden: Tensor) -> Tensor:
        hidden[:, -1] = late
        return hidden

    theirs, _ = hooked(plain, OTHER, {"model.layers.0": patch})
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            h = model.model.layers[3].output[0][:, -1]
        with tracer.invoke(OTHER):
            model.model.layers[0].output[0][:, -1] = h
            ours = model.lm_head.output.save()
        assert model.validate(tracer).passes == 2
    close(ours, theirs)
    assert len(tracer.receipt.passes) == 2


def test_parameters_and_constants_meet_values(plain: Any, model: Any) -> None:
    _, seen = hooked(plain, IDS, {}, ["model.norm"])
    with model.trace(IDS):
        direction = model.lm_head.weight[7] - model.lm_head.weight[9]
        ours = (model.model.norm.output @ direction).save()
    close(ours, seen["model.norm"] @ (plain.lm_head.weight[7] - plain.lm_head.weight[9]).detach())


def test_shapes_known_while_recording_are_the_shapes_that_come_back(model: Any) -> None:
    with model.trace(IDS):
        logits = model.lm_head(model.model.norm(model.model.layers[1].output[0]))
        values = [logits, logits.softmax(-1).max(-1).values, logits[:, 1:3].transpose(1, 2), logits.argmax(-1)]
        known = [(value.shape, value.dtype) for value in values]
        for value in values:
            value.save()
    assert [(value.shape, value.dtype) for value in values] == known


def test_a_shape_error_is_refused_with_the_line_before_anything_runs(model: Any) -> None:
    with pytest.raises(GraphError) as caught, model.trace(IDS):
        (model.lm_head.output @ torch.ones(3, 3)).save()
    assert str(caught.value.where).startswith("test_load_against_hooks.py:")


def test_a_run_time_failure_is_the_user_s_and_the_next_trace_works(model: Any) -> None:
    with pytest.raises((RunError, GraphError)) as caught, model.trace(IDS):
        torch.arange(3)[model.lm_head.output.argmax(-1) + 100].save()
    assert str(caught.value.where).startswith("test_load_against_hooks.py:")
    with model.trace(IDS):
        assert model.lm_head.output.save() is not None
