"""Windows over unmodified models of many families: same bits as the whole model, found by structure alone."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from engine.experts import use_padded_experts
from engine.links import Solo
from engine.loading import LoadedModel, ShardConfig, load_model, meta_model
from engine.windows import PassThrough, find_layers, find_layout, split_layers
from polytrace.errors import ServiceError

TOKENS = torch.arange(5, 14)[None]
LLAMA_LIKE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS_OF_16 = LLAMA_LIKE | {"head_dim": 16}
GPT_LIKE = {"vocab_size": 100, "n_embd": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": LLAMA_LIKE,
    "GPT2Config": GPT_LIKE,
    "Gemma2Config": HEADS_OF_16 | {"sliding_window": 5},
    "Gemma3TextConfig": HEADS_OF_16 | {"sliding_window": 5},
    "Qwen3Config": HEADS_OF_16,
    "GPTNeoXConfig": {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"},
    "OPTConfig": {k: v for k, v in LLAMA_LIKE.items() if k not in ("intermediate_size", "num_key_value_heads")}
    | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "MixtralConfig": LLAMA_LIKE | {"num_local_experts": 4},
    "GPTJConfig": GPT_LIKE | {"rotary_dim": 8},  # its layers return tuples
    "BloomConfig": {
        "vocab_size": 100,
        "hidden_size": 32,
        "n_layer": 4,
        "n_head": 4,
    },  # so do these; a norm on embeddings
    "GptOssConfig": HEADS_OF_16 | {"num_local_experts": 4},
}


def tiny(family: str, folder: Path) -> str:
    config: PreTrainedConfig = getattr(transformers, family)(**FAMILIES[family])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


class Stopped(Exception):
    pass


def run_stage(loaded: LoadedModel, hidden: Tensor | None) -> Tensor:
    """The stage's hidden states behind its last layer, or the logits."""
    layers: Any = loaded.model.get_submodule(loaded.window.layers)
    left: list[Tensor] = []

    def put_in(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def take_out(_module: Any, _args: Any, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)
        raise Stopped

    handles = []
    if hidden is not None:
        handles.append(layers[loaded.window.first].register_forward_pre_hook(put_in, with_kwargs=True))
    if not loaded.window.is_last:
        handles.append(layers[loaded.window.stop - 1].register_forward_hook(take_out))
    try:
        with torch.no_grad():
            logits: Tensor = loaded.model(input_ids=TOKENS, use_cache=False).logits
            return logits
    except Stopped:
        return left[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_three_windows_give_the_bits_of_the_whole_model(family: str, tmp_path: Path) -> None:
    source = tiny(family, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(source)
    use_padded_experts(whole)  # as every shard does; grouped products have other last bits
    with torch.no_grad():
        expected = whole(TOKENS, use_cache=False).logits
    hidden, weight_bytes = None, 0
    for stage in range(3):
        loaded = load_model(ShardConfig(source=source, stage=stage, stages=3), Solo())
        hidden = run_stage(loaded, hidden)
        weight_bytes += loaded.weight_bytes
    assert torch.equal(hidden, expected)
    embedding: Any = whole.get_input_embeddings()
    tied = embedding.weight.nbytes if whole.config.tie_word_embeddings else 0
    assert weight_bytes == sum(p.nbytes for p in whole.parameters()) + tied


def test_what_runs_around_the_layers_is_found_by_structure(tmp_path: Path) -> None:
    layout = find_layout(meta_model(tiny("GPT2Config", tmp_path)))
    assert layout.layers == "transformer.h"
    assert set(layout.before) == {"transformer.wte", "transformer.wpe"}
    assert set(layout.after) == {"transformer.ln_f", "lm_head"}
    homes = {path: layout.home(path, 2) for path in ("transformer.wte.weight", "transformer.h.3.mlp", "lm_head", "")}
    assert homes == {"transformer.wte.weight": 0, "transformer.h.3.mlp": 1, "lm_head": 1, "": 0}


def test_a_probe_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = meta_model(tiny("LlamaConfig", tmp_path))
    implementation = model.config._attn_implementation
    find_layout(model)
    assert not any(isinstance(module, PassThrough) for module in model.modules())
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_are_split_so_that_the_heaviest_stage_is_lightest() -> None:
    def lengths(before: float, layers: list[float], after: float, stages: int) -> list[int]:
        split = split_layers((before, *layers, after), stages)
        assert [layer for owned in split for layer in owned] == [*range(len(layers))]
        return [len(owned) for owned in split]

    assert lengths(0, [1.0] * 8, 0, 2) == [4, 4]
    assert lengths(0, [1.0] * 7, 0, 3) == [3, 2, 2]
    assert lengths(0, [1.0] * 7, 0.5, 2) == [4, 3]
    assert lengths(2, [1.0] * 8, 0, 2) == [3, 5]
    assert lengths(0, [1.0] * 8, 3, 4) == [3, 2, 2, 1]
    assert lengths(0, [5.0, 1, 1, 1, 1, 1], 0, 2) == [1, 5]
    assert lengths(9, [1.0] * 6, 9, 3) == [1, 4, 1]  # an end may be the heaviest with one layer: the rest is even
    assert lengths(0, [1.0] * 4, 0, 4) == [1, 1, 1, 1]
    with pytest.raises(ServiceError, match="use 1 to 4"):
        split_layers((0, 1, 1, 1, 1, 0), 5)


@given(shares=st.lists(st.integers(0, 9), min_size=4, max_size=10), stages=st.integers(1, 6))
def test_no_split_has_a_lighter_heaviest_stage(shares: list[int], stages: int) -> None:
    num_layers = len(shares) - 2
    if stages > num_layers:
        return

    def heaviest(bounds: tuple[int, ...]) -> int:
        own = [sum(shares[1 + first : 1 + stop]) for first, stop in pairwise((0, *bounds, num_layers))]
        own[0] += shares[0]
        own[-1] += shares[-1]
        return max(own)

    split = split_layers(tuple(map(float, shares)), stages)
    found = heaviest(tuple(owned.stop for owned in split[:-1]))
    assert found == min(map(heaviest, combinations(range(1, num_layers), stages - 1)))


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = torch.nn.Module()
    model.config = transformers.LlamaConfig(**LLAMA_LIKE)
    with pytest.raises(ServiceError, match="no list of 4 decoder layers"):
        find_layers(model)
