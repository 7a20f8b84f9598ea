"""Quantised checkpoints: what is loaded is what their codes and scales say, in every slice, and serves as any model."""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engine.links import Solo
from engine.loading import ShardConfig, check_source, load_model
from engine.local import LocalBackend
from engine.quantised import widened
from engine.reading import Reader, WeightFile
from polytrace.errors import ServiceError
from polytrace.model import Model

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": []}
RECORDED = Path(__file__).parent / "nf4.safetensors"  # by bitsandbytes 0.50.2, with what it makes of them
TOKENS = torch.arange(24)[None] % 50 + 2


def to_fp8(whole: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and what they stand for, block by block."""
    rows, columns = (-(-size // each) for size, each in zip(whole.shape, block, strict=True))
    codes, scales = torch.empty(whole.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    means = torch.empty_like(whole)
    for i, j in itertools.product(range(rows), range(columns)):
        place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
        scales[i, j] = whole[place].abs().max() / 448
        codes[place] = (whole[place] / scales[i, j]).to(torch.float8_e4m3fn)
        means[place] = codes[place].float() * scales[i, j]
    return codes, scales, means


def quantise_fp8(model: Any, folder: Path, block: tuple[int, int]) -> dict[str, Tensor]:
    """Saves the layers' matrices in fp8; the weights that the checkpoint stands for."""
    state, means = {}, {}
    for name, tensor in model.state_dict().items():
        if ".layers." in name and tensor.dim() == 2:
            state[name], state[f"{name}_scale_inv"], means[name] = to_fp8(tensor, block)
        else:
            state[name] = means[name] = tensor.clone()
    save_config(model, folder, FP8 | {"weight_block_size": list(block)})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return means


def save_config(model: Any, folder: Path, quantisation: dict[str, Any]) -> None:
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))


def llama(width: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


class Quantisation:
    """Stands for a configuration."""

    def __init__(self, **quantisation: Any) -> None:
        self.quantization_config = quantisation


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[dict[str, Any], Tensor]]]:
    """A file, and by name how each is quantised and what it stands for."""
    generator = torch.Generator().manual_seed(0)
    codes, scales, means = to_fp8(torch.randn(100, 90, generator=generator), (32, 16))
    state = {"blocks.weight": codes, "blocks.weight_scale_inv": scales}
    state |= {"one.weight": codes.clone(), "one.weight_scale_inv": torch.tensor(0.5)}
    known: dict[str, tuple[dict[str, Any], Tensor]] = {
        "blocks.weight": (FP8 | {"weight_block_size": [32, 16]}, means),
        "one.weight": (FP8, codes.float() * 0.5),
    }
    state["experts.up_blocks"] = torch.randint(0, 256, (3, 20, 5, 16), generator=generator).byte()
    state["experts.up_scales"] = torch.randint(120, 134, (3, 20, 5), generator=generator).byte()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    halves = torch.stack((state["experts.up_blocks"] & 15, state["experts.up_blocks"] >> 4), -1).int().flatten(-2)
    powers = 2.0 ** (state["experts.up_scales"].int() - 127)
    values = table[halves & 7] * torch.where(halves > 7, -1, 1) * powers[..., None]
    known["experts.up"] = (MXFP4, values.flatten(-2).transpose(1, 2))
    recorded = load_file(RECORDED)
    for name in ("plain", "nested"):
        known[f"{name}.weight"] = (NF4, recorded.pop(f"expected.{name}"))
    path = tmp_path_factory.mktemp("quantised") / "all.safetensors"
    save_file(state | recorded, path, metadata={"format": "pt"})
    return path, known


@given(st.data())
def test_every_slice_of_a_quantised_tensor_is_what_its_codes_stand_for(
    tensors: tuple[Path, dict[str, tuple[dict[str, Any], Tensor]]], data: st.DataObject
) -> None:
    path, known = tensors
    name = data.draw(st.sampled_from(sorted(known)))
    quantisation, expected = known[name]
    index = []
    for size in expected.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    with Reader() as reader, closing(WeightFile(str(path), reader)) as file:
        stem = name.split(".")[0]
        own = {key: tensor for key, tensor in file.tensors.items() if key.startswith(f"{stem}.")}
        state = widened(Quantisation(**quantisation), own, torch.float32)
        assert set(state) == {name}
        assert state[name].get_shape() == list(expected.shape) and state[name].get_dtype() == "F32"
        assert state[name].num_bytes == sum(tensor.num_bytes for tensor in own.values())
        assert torch.equal(state[name][tuple(index)], expected[tuple(index)])
        assert torch.equal(state[name][...], expected)


@pytest.mark.parametrize("width", [48, 64])  # 48: blocks of 32 end inside the matrices
def test_an_fp8_model_computes_with_what_its_codes_stand_for(width: int, tmp_path: Path) -> None:
    model = llama(width)
    unquantised = model(TOKENS, use_cache=False).logits
    model.load_state_dict(quantise_fp8(model, tmp_path, (32, 32)))
    for stage in range(2):
        loaded = load_model(ShardConfig(source=str(tmp_path), dtype="float32", stage=stage, stages=2), Solo())
        expected = model.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())
        assert loaded.read_bytes < 0.5 * loaded.weight_bytes
    served = Model(LocalBackend(str(tmp_path), dtype="float32", threads=1))  # the gate passes
    with served.trace(TOKENS.tolist()):
        logits = served.lm_head.output.save()
    with torch.no_grad():
        expected_logits = model(TOKENS, use_cache=False).logits
    assert (logits - expected_logits).abs().max() <= 1e-5
    assert (logits - unquantised).abs().max() > 1e-3
    if width == 64:  # here transformers finds the right blocks too
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
        assert all(torch.equal(theirs[key], value) for key, value in model.state_dict().items())


def test_an_mxfp4_model_has_the_weights_that_transformers_gives_it(tmp_path: Path) -> None:
    model = model_of("gpt_oss")
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            state[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).byte()
            state[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator).byte()
        else:
            state[name] = tensor.clone()
    save_config(model, tmp_path, MXFP4)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for stage in range(2):
        loaded = load_model(ShardConfig(source=str(tmp_path), dtype="bfloat16", stage=stage, stages=2), Solo())
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())
    LocalBackend(str(tmp_path), dtype="bfloat16", threads=1)  # the gate passes


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        (
            {"quant_method": "awq", "bits": 4},
            "awq, which polytrace does not read; it reads fp8, mxfp4, bitsandbytes 4 bit",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8 bit, which"),
    ],
)
def test_a_quantisation_that_is_not_read_is_refused_before_anything(
    quantisation: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = llama(48)
    model.save_pretrained(tmp_path)
    save_config(model, tmp_path, quantisation)
    with pytest.raises(ServiceError, match=message):
        check_source(str(tmp_path), "auto", random_weights=False)
    with pytest.raises(ServiceError, match=message):
        load_model(ShardConfig(source=str(tmp_path)), Solo())
    check_source(str(tmp_path), "auto", random_weights=True)
    load_model(ShardConfig(source=str(tmp_path), random_weights_seed=0), Solo())


def test_scales_that_do_not_fit_or_are_missing_are_refused(tmp_path: Path) -> None:
    quantise_fp8(llama(48), tmp_path, (32, 32))
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for scales, message in ((torch.ones(2, 3), r"needs scales \[3, 2\], not \[2, 3\]"), (None, "has no .*up_proj")):
        changed = {key: tensor for key, tensor in state.items() if key != f"{name}_scale_inv"}
        if scales is not None:
            changed[f"{name}_scale_inv"] = scales
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ServiceError, match=message):
            load_model(ShardConfig(source=str(tmp_path)), Solo())
