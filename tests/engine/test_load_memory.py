"""What loading takes, measured in real processes: memory at its peak, and bytes read of the files."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from engine.drawing import DrawnTensor
from engine.links import Distributed, Solo, join_store, open_store
from engine.loading import ShardConfig, load_model
from engine.reading import Reader

SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "small": LlamaConfig(**SIZES | SMALL, vocab_size=256, intermediate_size=128, tie_word_embeddings=True),
    "large": LlamaConfig(**SIZES, vocab_size=8192, intermediate_size=2048, tie_word_embeddings=True),  # 300 MB
    "experts": MixtralConfig(**SIZES, vocab_size=256, intermediate_size=256, num_local_experts=8),  # 200 MB
}
CASES: dict[str, tuple[str, int, str]] = {  # model, ranks, dtype asked for; on two stages
    "sharded files": ("large", 2, "float32"),
    "another dtype": ("large", 2, "bfloat16"),
    "random weights": ("random", 2, "float32"),
    "merged experts": ("experts", 1, "float32"),
}
SLACK = 6 << 20  # bytes: modules, what the allocator keeps


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def load(index: int, port: int, sources: dict[str, str], out: str) -> None:
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 64 << 10)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    place: dict[str, int] = {"stage": index // 2, "stages": 2, "rank": index % 2, "ranks": 2}
    links = Distributed(join_store("127.0.0.1", port), **place)
    load_model(ShardConfig(source=sources["small"], **place), links)  # code, and what is made once
    for case, (name, ranks, dtype) in CASES.items():
        if place["rank"] >= ranks:
            continue
        shard = place | {"ranks": ranks}
        seed = 3 if name == "random" else None
        Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
        before = memory("VmRSS")
        config = ShardConfig(source=sources[name], dtype=dtype, random_weights_seed=seed, **shard)
        loaded = load_model(config, links if ranks > 1 else Solo())
        found = {
            "above": memory("VmHWM") - before,
            "own": loaded.weight_bytes,
            "largest": max(parameter.nbytes for parameter in loaded.model.parameters()),
            "read": loaded.read_bytes,
            "slice": loaded.model.model.layers[place["stage"]].mlp.down_proj.weight if name == "random" else None,
        }
        torch.save(found, Path(out) / f"{case} {index}.pt")
        del loaded
        gc.collect()
    links.barrier()
    links.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = {}
    for name, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60MB")
        sources[name] = str(folder)
    assert len(list(Path(sources["large"]).glob("*.safetensors"))) > 3
    folder = tmp_path_factory.mktemp("random")
    CONFIGS["large"].save_pretrained(folder)
    store = open_store("127.0.0.1")
    results = tmp_path_factory.mktemp("out")
    in_processes(load, (store.port, sources | {"random": str(folder)}, str(results)), 4)
    for source in sources.values():
        shutil.rmtree(source)
    return results


@pytest.mark.parametrize("case", CASES)
def test_a_shard_never_holds_more_than_its_slices_and_one_tensor(case: str, out: Path) -> None:
    _, ranks, dtype = CASES[case]
    widening = 4 // getattr(torch, dtype).itemsize  # a tensor is read in the file's dtype
    for index in range(4):
        if index % 2 < ranks:
            shard = torch.load(out / f"{case} {index}.pt")
            assert shard["own"] > 35 << 20
            assert shard["above"] <= shard["own"] + shard["largest"] * widening + SLACK
            assert shard["above"] > 0.9 * shard["own"]  # weights are in memory, and not left in their file


def test_random_weights_are_the_same_whatever_the_split(out: Path) -> None:
    for stage in range(2):
        with Reader() as reader:
            key = f"3 model.layers.{stage}.mlp.down_proj.weight"
            whole = DrawnTensor(key, (SIZES["hidden_size"],) * 2, torch.float32, 0.02, reader)[...]
        slices = [torch.load(out / f"random weights {2 * stage + rank}.pt")["slice"] for rank in range(2)]
        assert torch.equal(torch.cat(slices, dim=1), whole)


@pytest.mark.parametrize("case", CASES)
def test_a_shard_reads_its_own_slices_once_and_nothing_beside_them(case: str, out: Path) -> None:
    _, ranks, dtype = CASES[case]
    for index in range(4):
        if index % 2 < ranks:
            shard = torch.load(out / f"{case} {index}.pt")
            vectors = 2 * 3 * SIZES["hidden_size"] * 4  # random norms are not read, and not counted
            assert shard["read"] * getattr(torch, dtype).itemsize // 4 == pytest.approx(
                shard["own"], abs=vectors if case == "random weights" else 0
            )
