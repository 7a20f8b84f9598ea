"""Tensor parallelism over real processes: equal to plain Hugging Face, and the same bits whatever lies beside a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import in_processes
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.links import Distributed, Solo, join_store, open_store
from engine.loading import LoadedModel, ShardConfig, load_model, meta_model
from engine.splits import plan_splits
from polytrace.errors import ServiceError

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaConfig": SIZES,
    "GPT2Config": {"vocab_size": 100, "n_embd": 64, "n_layer": 4, "n_head": 4},
    "Gemma2Config": SIZES | {"head_dim": 16, "sliding_window": 5},  # tied, vocabulary split over ranks
    "PhiConfig": SIZES,  # biases everywhere
    "Qwen3Config": SIZES | {"head_dim": 16},  # norms on heads
    "Phi3Config": SIZES | {"pad_token_id": 0},  # q, k and v in one matrix, gate and up in another
    "MistralConfig": SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True},  # fewer than ranks
    "MixtralConfig": SIZES | {"num_key_value_heads": 2, "num_local_experts": 4},
    "Qwen3MoeConfig": SIZES | {"head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    "GptOssConfig": SIZES
    | {"head_dim": 16, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "DeepseekV3Config": SIZES | LATENT,
    "OPTConfig": SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "StableLmConfig": SIZES | {"num_key_value_heads": 2},
}
KEY_VALUES_OF_6 = {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 96, "intermediate_size": 96}
WORLDS = {"2x2": (2, 2), "1x4": (1, 4), "2x1": (2, 1)}
CASES = [
    *(("1x4", name, dtype) for name in FAMILIES for dtype in ("float32", "bfloat16")),
    *((world, name, "float32") for world in ("2x2", "2x1") for name in ("LlamaConfig", "GPT2Config", "Gemma2Config")),
    *(("2x2", name, "float32") for name in ("MixtralConfig", "GptOssConfig")),
]
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2}
TOKENS = torch.arange(40).reshape(2, 20) % 97 + 2


class Stopped(Exception):
    pass


def run(loaded: LoadedModel, links: Distributed | Solo, tokens: Tensor) -> Tensor | None:
    """One forward over the stages; the logits on the last stage."""
    window, layers = loaded.window, loaded.model.get_submodule(loaded.window.layers)
    handles = []
    if not window.is_first:
        shape = (*tokens.shape, loaded.model.config.hidden_size)
        hidden = links.receive(shape, loaded.model.dtype, window.stage - 1)

        def put_in(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (hidden, *args[1:]), kwargs

        handles.append(layers[window.first].register_forward_pre_hook(put_in, with_kwargs=True))
    if not window.is_last:

        def take_out(_module: Any, _args: Any, output: Any) -> None:
            links.send(output, window.stage + 1)
            raise Stopped

        handles.append(layers[window.stop - 1].register_forward_hook(take_out))
    try:
        with torch.no_grad():
            logits: Tensor = loaded.model(input_ids=tokens, use_cache=False).logits
            is_split = logits.shape[-1] < loaded.model.config.get_text_config().vocab_size  # a rank has its part
            return links.gather(logits, -1) if is_split else logits
    except Stopped:
        links.flush()
        return None
    finally:
        for handle in handles:
            handle.remove()


def shard(index: int, ports: dict[str, int], sources: dict[str, str], out: str) -> None:
    torch.set_num_threads(1)
    for world, (stages, ranks) in WORLDS.items():
        if index >= stages * ranks:
            continue
        place: dict[str, Any] = {"stage": index // ranks, "stages": stages, "rank": index % ranks, "ranks": ranks}
        links = Distributed(join_store("127.0.0.1", ports[world]), **place)
        for _, name, dtype in (case for case in CASES if case[0] == world):
            loaded = load_model(ShardConfig(source=sources[name], dtype=dtype, **place), links)
            together = run(loaded, links, TOKENS)
            alone = [run(loaded, links, tokens[None]) for tokens in TOKENS]
            parts = {f"{s.module}.{n}": p for s in loaded.splits for n, p in s.parts.items() if p is not None}
            local = {path: loaded.model.get_parameter(path).detach() for path in parts}
            found = {"together": together, "alone": alone, "parts": parts, "local": local}
            torch.save(found, Path(out) / f"{world} {name} {dtype} {index}.pt")
        links.barrier()
        links.close()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, sizes in FAMILIES.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes, **SPECIAL_IDS)).save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.fixture(scope="module")
def out(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    stores = {world: open_store("127.0.0.1") for world in WORLDS}
    ports = {world: store.port for world, store in stores.items()}
    in_processes(shard, (ports, sources, str(folder)), 4)
    return folder


def found(out: Path, world: str, name: str, dtype: str, index: int) -> dict[str, Any]:
    each: dict[str, Any] = torch.load(out / f"{world} {name} {dtype} {index}.pt", weights_only=False)
    return each


def plain(source: str, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation="eager")
        logits: Tensor = model(TOKENS, use_cache=False).logits
        return logits


@pytest.mark.parametrize(("world", "name", "dtype"), CASES)
def test_every_split_of_a_model_computes_what_the_whole_model_does(
    world: str, name: str, dtype: str, sources: dict[str, str], out: Path
) -> None:
    stages, ranks = WORLDS[world]
    expected = plain(sources[name], torch.float32)
    together = found(out, world, name, dtype, stages * ranks - 1)["together"]
    error = (together - expected).abs().max()
    if ranks == 1:
        assert torch.equal(together, expected)
    elif dtype == "float32":
        assert error <= 1e-5 * max(1, expected.abs().max())
    else:
        assert error <= 1.5 * (plain(sources[name], torch.bfloat16) - expected).abs().max() + 1e-3


@pytest.mark.parametrize(("world", "name", "dtype"), CASES)
def test_a_row_has_the_same_bits_beside_others_alone_and_on_every_rank(
    world: str, name: str, dtype: str, out: Path
) -> None:
    stages, ranks = WORLDS[world]
    last = [found(out, world, name, dtype, index) for index in range((stages - 1) * ranks, stages * ranks)]
    for each in last:
        assert torch.equal(each["together"], torch.cat(each["alone"]))
        assert torch.equal(each["together"], last[0]["together"])


def test_the_ranks_slices_make_up_the_whole(sources: dict[str, str], out: Path) -> None:
    for name, source in sources.items():
        whole = dict(AutoModelForCausalLM.from_pretrained(source).named_parameters(remove_duplicate=False))
        ranks = [found(out, "1x4", name, "float32", rank) for rank in range(4)]
        assert len(ranks[0]["parts"]) >= 3 * SIZES["num_hidden_layers"]
        for path, part in ranks[0]["parts"].items():
            held = [rank["local"][path].unflatten(part.dim, (part.blocks, -1)) for rank in ranks]
            for first in range(0, 4, part.copies):
                assert all(torch.equal(each, held[first]) for each in held[first : first + part.copies])
            assert torch.equal(
                torch.cat(held[:: part.copies], part.dim + 1).flatten(part.dim, part.dim + 1), whole[path]
            )


@pytest.mark.parametrize(
    ("name", "change", "ranks", "message"),
    [
        ("LlamaConfig", {}, 3, "4 attention heads, which 3 ranks cannot share: use ranks 1, 2, 4"),
        ("LlamaConfig", KEY_VALUES_OF_6, 4, "6 key/value heads, which 4 ranks cannot share: use ranks 1, 2, 3, 6, 12"),
        ("GPTNeoXConfig", {}, 8, "4 attention heads, which 8 ranks cannot share: use ranks 1, 2, 4"),
        ("GptOssConfig", {"num_local_experts": 6}, 4, "6 experts, which 4 ranks cannot share: use ranks 1, 2$"),
        ("GPT2Config", {}, 8, "use ranks 1, 2, 4"),
        ("GPTJConfig", {"rotary_dim": 8}, 2, "no tensor-parallel plan for its layers: use ranks=1"),
        (
            "MixtralConfig",
            {"intermediate_size": 130},
            4,
            "130 features of .*experts.gate_up_proj, which 4 ranks cannot share: use ranks 1, 2$",
        ),
        ("GPTBigCodeConfig", {}, 2, "no tensor-parallel plan for its layers: use ranks=1"),  # one key, in c_attn
    ],
)
def test_what_cannot_be_split_is_refused_with_the_way_out(
    name: str, change: dict[str, Any], ranks: int, message: str, tmp_path: Path
) -> None:
    sizes = FAMILIES["GPT2Config"] if name in ("GPT2Config", "GPTJConfig", "GPTBigCodeConfig") else SIZES
    getattr(transformers, name)(**sizes | SPECIAL_IDS | change).save_pretrained(tmp_path)
    with pytest.raises(ServiceError, match=message):
        plan_splits(meta_model(str(tmp_path)), ranks)


def test_a_vocabulary_that_does_not_divide_stays_whole_with_what_is_tied_to_it(tmp_path: Path) -> None:
    sizes = SIZES | {"vocab_size": 101, "tie_word_embeddings": True}
    transformers.LlamaConfig(**sizes).save_pretrained(tmp_path)
    modules = {split.module for split in plan_splits(meta_model(str(tmp_path)), 2)}
    assert "model.layers.0.mlp.up_proj" in modules
    assert not modules & {"lm_head", "model.embed_tokens"}
