"""`tracer.cache()` against forward hooks on every module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import IDS, OTHER, close, loaded, logits_of, small_gpt2, small_llama
from torch import Tensor

from polytrace.errors import GraphError, TooLargeError
from polytrace.wire import encode_request


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def model(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(plain, tmp_path_factory.mktemp("llama"), rename={"model.layers": "blocks"}) as made:
        yield made


def seen_by_hooks(plain: Any, ids: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Outputs and first inputs by path."""
    outputs: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    handles = []
    for path, module in plain.named_modules():

        def hook(_: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            outputs[path] = output
            inputs[path] = [*args, *kwargs.values()][0] if args or kwargs else None

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    logits_of(plain, ids)
    for handle in handles:
        handle.remove()
    return outputs, inputs


def test_a_cache_of_everything_is_what_hooks_see(plain: Any, model: Any) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache(include_inputs=True)
    outputs, inputs = seen_by_hooks(plain, IDS)
    compared = 0
    for path, entry in cache.items():
        theirs = outputs[path]
        if isinstance(entry.output, tuple):
            entry.output[0].shape  # noqa: B018
            close(entry.output[0], theirs[0])
        elif isinstance(entry.output, dict):
            if path == "":
                close(entry.output.logits, theirs.logits)
        elif isinstance(entry.output, Tensor) and isinstance(theirs, Tensor):
            close(entry.output, theirs)
        if isinstance(entry.input, Tensor) and entry.input.is_floating_point():
            close(entry.input, inputs[path])
            assert entry.inputs is not None and entry.inputs[0][0] is entry.input
        compared += 1
    assert compared == len(cache) > 4 * 10
    assert set(cache) | {site.rpartition(".output")[0] for site in cache.refused} >= {
        path for path, output in outputs.items() if isinstance(output, Tensor)
    }


def test_entries_are_found_by_path_attribute_index_and_alias(model: Any) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=[model.model.layers[0], "model.layers.1.mlp", "blocks.2"])
    first = cache["model.layers.0"].output
    for same in (cache.model.layers[0].output, cache.blocks[0].output, cache.model["layers.0"].output):
        assert same is first
    assert cache.model.layers[1].mlp.output.shape == (1, 7, 32)
    assert (
        cache.keys() == ["model.layers.0", "model.layers.1.mlp", "model.layers.2"] and len(cache.model.layers[1]) == 1
    )
    assert "blocks.2" in cache and "blocks.3" not in cache
    with pytest.raises(KeyError, match="not in this cache"):
        cache["model.layers.3"]
    with pytest.raises(AttributeError):
        cache.lm_head  # noqa: B018
    with pytest.raises(AttributeError):
        cache.model.layers[3]


def test_nnsights_paths_lead_to_the_same(tmp_path_factory: pytest.TempPathFactory, model: Any) -> None:
    with loaded(small_gpt2(), tmp_path_factory.mktemp("gpt2")) as gpt2, gpt2.trace(IDS) as tracer:
        cache = tracer.cache(modules=[gpt2.transformer.h[0], "model.transformer.h.1", "model.lm_head"])
    assert cache.keys() == ["transformer.h.0", "transformer.h.1", "lm_head"]
    assert cache["model.transformer.h.0"] is cache["transformer.h.0"] and "model.lm_head" in cache
    assert cache.model.transformer.h[1].output is cache["transformer.h.1"].output
    assert cache.model.layers[1].output is cache.layers[1].output is cache.model.h[1].output
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=["model.model.layers.0"])
    assert cache["model.model.layers.0"] is cache["model.layers.0"]
    assert cache.model.model.layers[0].output is cache.model.layers[0].output


def test_a_cache_sees_changes_that_stand_before_and_behind_it(plain: Any, model: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            cache = tracer.cache(modules=["model.layers.1", "model.layers.2"], select=lambda h: h[:, -1])
            model.model.layers[1].output[0][:] = 0
        with tracer.invoke(IDS):
            model.model.layers[1].output[0][:] = 0
            expected = model.model.layers[2].output[0][:, -1].save()
    assert not cache["model.layers.1"].output.any()
    assert torch.equal(cache["model.layers.2"].output, expected)


def test_selection_and_reduction_move_only_what_is_left(model: Any) -> None:
    layers = list(model.model.layers)
    with model.trace([IDS, OTHER]) as tracer:
        whole = tracer.cache(modules=layers)
        last = tracer.cache(modules=layers, select=lambda h: h[:, -1], reduce=lambda h: h.norm(dim=-1))
        means = {how: tracer.cache(modules=layers, reduce=how) for how in ("mean", "sum", "max")}
        lens = tracer.cache(modules=layers, select=lambda h: model.lm_head(model.model.norm(h[:, -1])).argmax(-1))
        half = tracer.cache(modules=layers[:1], dtype=torch.float16)
    for path, entry in whole.items():
        own = [entry.output[0], entry.output[1, -len(OTHER) :]]
        close(last[path].output, torch.stack([one[-1].norm() for one in own]))
        close(means["mean"][path].output, torch.stack([one.mean(0) for one in own]))
        close(means["sum"][path].output, torch.stack([one.sum(0) for one in own]))
        assert torch.equal(means["max"][path].output, torch.stack([one.amax(0) for one in own]))
        assert lens[path].output.shape == (2,) and lens[path].output.dtype is torch.int64
    assert half["model.layers.0"].output.dtype is torch.float16


def test_what_cannot_be_read_is_told_and_does_not_stop_the_rest(model: Any) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache(select=lambda h: h[:, -1, 40])  # only logits and the wide inner features have so many
        model.model.layers[2].skip(model.model.layers[2].input)
    assert set(cache) >= {"lm_head", "model.layers.0.mlp.gate_proj"} and "model.layers.0" not in cache
    assert "index 40" in cache.refused["model.layers.0.output"] or "40" in cache.refused["model.layers.0.output"]
    assert "is skipped" in cache.refused["model.layers.2.mlp.gate_proj.output"]


def test_many_modules_are_a_loop_on_the_wire(model: Any) -> None:
    def size(modules: list[Any]) -> int:
        with model.trace(IDS, run=False) as tracer:
            tracer.cache(modules=modules, select=lambda h: h[:, -1])
        return sum(len(part) for part in encode_request(tracer.request))

    layers = list(model.model.layers)
    one = size([layer.mlp.gate_proj for layer in layers[:2]])
    assert size([layer.mlp.gate_proj for layer in layers]) <= one + 64


def test_a_cache_that_is_too_large_is_refused_with_the_number(model: Any) -> None:
    description = model.backend.description
    limits = replace(description.limits, max_result_bytes=1000)
    model.backend.description = replace(description, limits=limits)
    try:
        with (
            pytest.raises(TooLargeError, match=r"all saves take \d+ bytes; the limit is 1000"),
            model.trace(IDS) as tracer,
        ):
            tracer.cache(modules=model.model.layers)
    finally:
        model.backend.description = description


def test_a_cache_of_what_is_not_there_is_refused(model: Any) -> None:
    with pytest.raises(GraphError, match=r"model\.layers to keep: it is a list of modules"), model.trace(IDS) as tracer:
        tracer.cache(modules=[model.model.layers])
    with pytest.raises(GraphError, match=r"no module 'model\.layer\.0'; did you mean"), model.trace(IDS) as tracer:
        tracer.cache(modules=["model.layer.0"])
    with pytest.raises(GraphError, match="not by 'median'"), model.trace(IDS) as tracer:
        tracer.cache(reduce="median")
    with pytest.raises(GraphError, match="belongs to prompts"), model.trace() as tracer:
        tracer.cache()
