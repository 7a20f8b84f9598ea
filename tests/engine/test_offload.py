"""Weights in the host's memory: all values keep their bits, and the weights are on the device during calls only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from engine.links import Solo
from engine.loading import ShardConfig, load_model
from engine.local import LocalBackend
from engine.offload import offload
from polytrace.model import Model

ALL = 1.0  # GiB: more than any model here has
PROMPT = [list(range(2, 30))]


def values(model: Any) -> dict[str, Tensor]:
    """Sites, an edit, modules called on values, a parameter: everything that weights are used for."""
    head = getattr(model, "lm_head", None) or model.embed_out
    base = model.transformer if hasattr(model, "transformer") else model.model
    layers = base.h if hasattr(base, "h") else base.layers
    norm = base.ln_f if hasattr(base, "ln_f") else base.norm
    with model.trace(PROMPT):
        early = layers[1].output[0].save()
        layers[2].output[0][:, -1] = layers[2].output[0][:, -1] * 1.5
        called = head(norm(layers[0].output[0][:, -2:])).save()
        weighed = (layers[3].output[0] * norm.weight).save()
        logits = head.output.save()
    return {"early": early, "called": called, "weighed": weighed, "logits": logits}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_all_values_keep_their_bits(family: str, tmp_path: Path) -> None:
    model_of(family).save_pretrained(tmp_path)
    plain = values(Model(LocalBackend(str(tmp_path), threads=1)))
    for gib in (ALL, 3e-5):
        backend = LocalBackend(str(tmp_path), threads=1, offload_gib=gib)
        for name, value in values(Model(backend)).items():
            assert torch.equal(value, plain[name])
            assert value.abs().max() > 0


class Watched:
    """Where each weight of a model is, at every call of its module."""

    def __init__(self, model: nn.Module) -> None:
        self.homes = {id(p): p.data_ptr() for p in model.parameters()}
        self.away: set[str] = set()
        for path, module in model.named_modules():
            module.register_forward_hook(self._looking(path))

    def _looking(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, _output: Any) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.data_ptr() != self.homes[id(parameter)]:
                    self.away.add(f"{path}.{name}")

        return hook


def test_weights_are_copied_for_their_modules_calls_and_go_behind_them(tmp_path: Path) -> None:
    model = model_of("llama")
    layer_bytes = sum(p.nbytes for p in model.model.layers[0].parameters())
    watched = Watched(model)  # its hooks run before those that let go
    kept = offload(model, "model.layers", 2 * layer_bytes, torch.device("cpu"))
    assert kept == 2 * layer_bytes
    tokens = torch.tensor(PROMPT)
    model(tokens, use_cache=False)
    assert {path.split(".")[2] for path in watched.away} == {"1", "3"}
    assert len(watched.away) == 2 * len(list(model.model.layers[0].parameters()))
    assert all(p.data_ptr() == watched.homes[id(p)] for p in model.parameters())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model.model.layers[3].mlp.down_proj.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(tokens, use_cache=False)
    assert all(p.data_ptr() == watched.homes[id(p)] for p in model.parameters())


@pytest.fixture
def large(tmp_path: Path) -> Iterator[str]:
    """Half a GiB in bfloat16, of which layers are nine tenths."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.gpu
def test_a_gpu_holds_only_what_is_not_offloaded(large: str) -> None:
    def weights_on_gpu(gib: float) -> tuple[int, int, Tensor]:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        config = ShardConfig(source=large, device="cuda", offload_bytes=int(gib * (1 << 30)))
        loaded = load_model(config, Solo())
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            logits = loaded.model(torch.tensor(PROMPT, device="cuda"), use_cache=False).logits.cpu()
        return loaded.weight_bytes, torch.cuda.max_memory_allocated() - before, logits

    own, peak, expected = weights_on_gpu(0.0)
    assert peak > own
    _, offloaded, logits = weights_on_gpu(ALL)
    assert offloaded < 0.35 * own  # the largest weight, and activations
    assert torch.equal(logits, expected)


@pytest.mark.gpu
def test_a_trace_on_a_gpu_keeps_its_bits(tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "mixtral"):
        folder = tmp_path / family
        model_of(family).save_pretrained(folder)
        plain = values(Model(LocalBackend(str(folder), device="cuda")))
        for name, value in values(Model(LocalBackend(str(folder), device="cuda", offload_gib=ALL))).items():
            assert torch.equal(value.cpu(), plain[name].cpu())
