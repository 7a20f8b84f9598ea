"""What a shard reads: its own files and keys only, in the dtype asked for; and what it says when it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import model_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from engine.drawing import DrawnTensor
from engine.links import Solo
from engine.loading import ShardConfig, check_source, load_model, meta_model, resolve_dtype
from engine.reading import Reader
from polytrace.errors import ServiceError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def save(folder: Path, *, one_file: bool = False, dtype: torch.dtype = torch.float32, tied: bool = False) -> str:
    config: PreTrainedConfig = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="5GB" if one_file else "10KB")
    return str(folder)


def files_of(folder: str, *, layers: range | None = None, outside: bool = False) -> set[Path]:
    """Weight files that hold any key of these layers, or any key that belongs to no layer."""
    where = json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]
    found = set()
    for key, file in where.items():
        parts = key.split(".")
        is_layer = parts[1] == "layers"
        if (outside and not is_layer) or (layers is not None and is_layer and int(parts[2]) in layers):
            found.add(Path(folder) / file)
    return found


@pytest.mark.parametrize("damage", ["garbage", "missing"])
def test_a_shard_does_not_open_the_files_of_other_layers(damage: str, tmp_path: Path) -> None:
    source = save(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    spoiled = files_of(source, layers=range(2)) - files_of(source, layers=range(2, 4), outside=True)
    assert spoiled
    for file in spoiled:
        if damage == "garbage":
            file.write_bytes(b"\xff" * 64)
        else:
            file.unlink()
    loaded = load_model(ShardConfig(source=source, stage=1, stages=2), Solo())
    owned = loaded.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in owned.items())
    assert {key.split(".")[2] for key in owned if ".layers." in key} == {"2", "3"}
    assert not any("embed_tokens" in key for key in owned)
    with pytest.raises(ServiceError, match="00002-of"):
        load_model(ShardConfig(source=source, stage=0, stages=2), Solo())


def test_one_file_is_read_by_key(tmp_path: Path) -> None:
    source = save(tmp_path, one_file=True)
    loaded = load_model(ShardConfig(source=source, stage=1, stages=2), Solo())
    whole = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_pretrained(source).parameters())
    assert loaded.weight_bytes < 0.6 * whole
    assert (loaded.window.first, loaded.window.stop) == (2, 4)


def test_a_head_tied_to_the_embedding_is_on_the_last_stage_too(tmp_path: Path) -> None:
    source = save(tmp_path, tied=True)
    embedding = AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight
    last = load_model(ShardConfig(source=source, stage=1, stages=2), Solo())
    assert torch.equal(last.model.lm_head.weight, embedding)
    alone = load_model(ShardConfig(source=source), Solo())
    assert alone.model.lm_head.weight is alone.model.get_input_embeddings().weight


def test_experts_that_lie_one_by_one_in_the_files_are_merged_on_their_stage(tmp_path: Path) -> None:
    model_of("mixtral").save_pretrained(tmp_path, max_shard_size="10KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    keys = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert any("experts.3.w1" in key for key in keys) and not any("gate_up_proj" in key for key in keys)
    owned: set[str] = set()
    for stage in range(2):
        loaded = load_model(ShardConfig(source=str(tmp_path), stage=stage, stages=2), Solo())
        part = loaded.model.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in part.items())
        assert loaded.read_bytes == loaded.weight_bytes
        owned |= part.keys()
    assert owned == expected.keys()


def test_a_checkpoint_of_the_model_without_its_head_has_other_names_and_is_split_too(tmp_path: Path) -> None:
    whole = model_of("gpt2")
    whole.transformer.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "wte.weight" in file.keys()  # noqa: SIM118
    expected = whole.state_dict()
    for stage in range(2):
        loaded = load_model(ShardConfig(source=str(tmp_path), stage=stage, stages=2), Solo())
        assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())


FROM_CACHE = """
import torch
from engine.links import Solo
from engine.loading import ShardConfig, load_model
lines = []
loaded = load_model(ShardConfig(source="some/tiny", dtype="bfloat16", stage=1, stages=2), Solo(), lines.append)
assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
print(loaded.weight_bytes, *lines, sep="\\n")
load_model(ShardConfig(source="some/tiny", stage=0, stages=2), Solo())
"""


def test_a_hub_id_is_read_from_the_cache_which_need_not_have_the_files_of_others(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--some--tiny"
    snapshot = cache / "snapshots" / "1234abcd"
    source = save(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1234abcd")
    others = files_of(source, layers=range(2)) - files_of(source, layers=range(2, 4), outside=True)
    for file in others:
        file.unlink()
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run([sys.executable, "-c", FROM_CACHE], capture_output=True, text=True, env=environment)
    told = answer.stdout.splitlines()
    assert int(told[0]) > 0 and any(line.startswith("getting model-0") for line in told), answer.stderr
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith("polytrace.errors.ServiceError: ")
    assert "-of-" in answer.stderr.splitlines()[-1]


def test_auto_means_the_configured_dtype_and_else_the_checkpoints(tmp_path: Path) -> None:
    source = save(tmp_path, one_file=True, dtype=torch.bfloat16)
    assert resolve_dtype(source, "auto") is torch.bfloat16
    assert resolve_dtype(source, "float32") is torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert resolve_dtype(source, "auto") is torch.bfloat16
    assert {p.dtype for p in load_model(ShardConfig(source=source), Solo()).model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in meta_model(source, "float32").parameters()} == {torch.float32}
    with pytest.raises(ServiceError, match="float31"):
        resolve_dtype(source, "float31")


def test_a_loaded_model_is_for_reading(tmp_path: Path) -> None:
    model = load_model(ShardConfig(source=save(tmp_path)), Solo()).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    json.dumps(model.config.to_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_the_same_on_every_shard(tied: bool, tmp_path: Path) -> None:
    LlamaConfig(**SIZES, tie_word_embeddings=tied).save_pretrained(tmp_path)  # a configuration and nothing else
    whole = load_model(ShardConfig(source=str(tmp_path), random_weights_seed=7), Solo()).model.state_dict()
    other = load_model(ShardConfig(source=str(tmp_path), random_weights_seed=8), Solo()).model.state_dict()
    owned: set[str] = set()
    for stage in range(2):
        config = ShardConfig(source=str(tmp_path), stage=stage, stages=2, random_weights_seed=7)
        part = load_model(config, Solo()).model.state_dict()
        assert all(torch.equal(value, whole[key]) for key, value in part.items())
        owned |= part.keys()
    assert owned == whole.keys()
    assert not torch.equal(whole["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"]) == tied
    assert 0.01 < whole["lm_head.weight"].std() < 0.03


def test_a_model_that_ships_loads_by_its_name_with_random_weights_alone() -> None:
    config = ShardConfig(source="llama-3.1-8b", stage=30, stages=32, random_weights_seed=1)
    loaded = load_model(config, Solo())
    assert (loaded.window.first, loaded.window.stop) == (30, 31)
    assert loaded.weight_bytes == 2 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096)
    with pytest.raises(ServiceError, match="--random-weights"):
        check_source("llama-3.1-8b", "auto", random_weights=False)
    check_source("llama-3.1-8b", "auto", random_weights=True)


def test_random_weights_are_drawn_slice_by_slice() -> None:
    with Reader() as reader:
        for shape in ((300, 70), (4, 33, 50)):
            tensor = DrawnTensor("7 a.weight", shape, torch.float32, 0.02, reader)
            whole = tensor[...]
            for index in (
                (slice(3, 30),),
                (slice(1, 2), slice(5, 20)),
                (slice(None),) * (len(shape) - 1) + (slice(9, 20),),
            ):
                assert torch.equal(tensor[index], whole[index])
            assert whole.unique().numel() > 0.999 * whole.numel()
            assert abs(whole.mean()) < 1e-3 and whole.std() == pytest.approx(0.02, rel=0.02)
            assert abs(torch.corrcoef(whole.flatten(0, -2))).triu(1).mean() < 0.15  # rows have nothing in common
            other = DrawnTensor("8 a.weight", shape, torch.float32, 0.02, reader)[...]
            assert not torch.equal(other, whole)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "gpt_oss", "gpt_neox", "opt"])
def test_a_model_of_random_weights_computes(family: str, tmp_path: Path) -> None:
    model_of(family).config.save_pretrained(tmp_path)
    loaded = load_model(ShardConfig(source=str(tmp_path), random_weights_seed=1), Solo())
    logits = loaded.model(input_ids=torch.arange(20)[None] % 50 + 2, use_cache=False).logits
    assert logits.isfinite().all() and logits.std() > 1e-3
    assert all(parameter.isfinite().all() for parameter in loaded.model.parameters())


def test_a_checkpoint_that_lacks_a_weight_is_refused_with_its_name(tmp_path: Path) -> None:
    source = save(tmp_path, one_file=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ServiceError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(ShardConfig(source=source), Solo())


def test_a_source_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="configuration"):
        meta_model(str(tmp_path))
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ServiceError, match=r"safetensors.*--random-weights"):
        load_model(ShardConfig(source=str(tmp_path)), Solo())
