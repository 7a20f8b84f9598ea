"""What TransformerLens gives of the same weights, polytrace's `HookedModel` gives, call by call.

TransformerLens runs in an environment of its own (`bench.environments`). Where nobody made it these tests are skipped;
make it with `python -c "from bench.environments import TRANSFORMER_LENS; TRANSFORMER_LENS.make()"`.
"""

from __future__ import annotations

import copy
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import habits
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

import polytrace
from bench.environments import TRANSFORMER_LENS
from polytrace.methods.transformer_lens import HookedModel, get_act_name

TESTS = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5  # of max(1, max|TransformerLens|), float32

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "llama": LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
}


@dataclass
class Sides:
    """One model's results, here and there."""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    model: HookedModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models, and beside each what TransformerLens gave."""
    python = TRANSFORMER_LENS.made()
    if python is None:
        pytest.skip("TransformerLens has no environment here")
    made = {name: _made(name, tmp_path_factory.mktemp("model")) for name in CONFIGS}
    variables = os.environ | {"PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pairs = [str(path) for folder in made.values() for path in (folder, folder / "habits.safetensors")]
    command = [str(python), "-m", "peers.habits", *pairs]
    ran = subprocess.run(command, cwd=TESTS, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return made


def _made(name: str, folder: Path) -> Path:
    """A model whose every weight, norms' and biases too, is far from what would not show."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            else:  # norms and biases
                parameter.add_(0.3 * torch.randn_like(parameter))
    plain.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def sides(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    folder = folders[request.param]
    with safe_open(folder / "habits.safetensors", "pt") as file:
        theirs: dict[str, Any] = {**file.metadata(), **{name: file.get_tensor(name) for name in list(file.keys())}}
    with polytrace.load(str(folder), threads=1) as model:
        hooked = HookedModel(model)
        ours = {**dict(habits.names(get_act_name)), **dict(habits.run(hooked, fold_ln={"fold_ln": False}))}
        yield Sides(ours, theirs, hooked)


def test_every_call_gives_what_it_gives_in_transformer_lens(sides: Sides) -> None:
    """Each by its name: cached activations, methods of the cache, hooks, weights, short names."""
    theirs = {name: value for name, value in sides.theirs.items() if not name.startswith("processed ")}
    assert sides.ours.keys() == theirs.keys()
    assert len(theirs) > 250
    wrong = {name: told for name, value in theirs.items() if (told := _difference(sides.ours[name], value))}
    assert not wrong


def test_hooks_change_what_the_model_gives(sides: Sides) -> None:
    plain = sides.theirs["logits"]
    others = ["heads ablated", "by a function of names", "through a context", "several at one place", "added"]
    for name in [*(f"hooked {name}" for name in habits.HOOKED), *others]:
        assert (sides.theirs[name] - plain).abs().max() > 100 * TOLERANCE * plain.abs().max(), name
    assert torch.equal(sides.ours["reset"], sides.ours["logits"])


def test_processed_numbers_are_ours_by_the_formulas_of_the_page(sides: Sides) -> None:
    """TransformerLens's defaults: fold_ln, center_writing_weights, center_unembed, fold_value_biases."""
    model = sides.model
    theirs = {
        name.removeprefix("processed "): value for name, value in sides.theirs.items() if name.startswith("processed ")
    }
    ours = _processed(model)
    assert ours.keys() == theirs.keys()
    wrong = {name: told for name, value in theirs.items() if (told := _difference(ours[name], value))}
    assert not wrong
    plain = model.run_with_cache(habits.TOKENS)[1]
    moved = "blocks.1.attn.hook_v" if model.cfg.normalization_type == "LN" else "blocks.1.attn.hook_q"
    assert _difference(plain[moved], theirs[moved]) or model.cfg.normalization_type == "RMS"
    assert _difference(model.W_U, theirs["W_U"])


def _processed(model: HookedModel) -> dict[str, Tensor]:
    """What TransformerLens's processing makes of our numbers. Writing weights are centred where norms centre."""
    logits, cache = model.run_with_cache(habits.TOKENS)
    centres = model.cfg.normalization_type == "LN"

    def centred(value: Tensor) -> Tensor:
        return value - value.mean(-1, keepdim=True) if centres else value

    def folded(weight: Tensor, norm: Any) -> Tensor:  # [.., d_model, out]
        own = norm.w[:, None] * weight
        return own - own.mean(-2, keepdim=True) if centres else own

    block, last = model.blocks[1], model.ln_final
    v_bias = block.attn.b_V + (block.ln1.b[:, None] * block.attn.W_V).sum(-2)
    v_moved = v_bias[:: model.cfg.n_heads // cache["v", 1].shape[2]]
    unembedding = folded(model.W_U, last)
    results = cache.stack_head_results(2)
    v_biases = torch.stack([one.attn.b_V + (one.ln1.b[:, None] * one.attn.W_V).sum(-2) for one in model.blocks[:2]])
    moved = torch.einsum("lhc,lhcd->lhd", v_biases, model.W_O[:2]).flatten(0, 1)
    found = {
        "logits": logits - logits.mean(-1, keepdim=True),
        "blocks.1.ln1.hook_scale": cache["scale", 1, "ln1"],
        "blocks.1.ln1.hook_normalized": cache["normalized", 1, "ln1"],
        "blocks.1.attn.hook_q": cache["q", 1],
        "blocks.1.attn.hook_v": cache["v", 1] - v_moved,
        "blocks.1.attn.hook_pattern": cache["pattern", 1],
        "blocks.1.attn.hook_z": cache["z", 1] - v_bias,
        "blocks.1.mlp.hook_post": cache["post", 1],
        "ln_final.hook_scale": cache["scale"],
        "ln_final.hook_normalized": cache["normalized"],
        "result": centred(results - moved[:, None, None]),
        "W_U": unembedding - unembedding.mean(-1, keepdim=True),
        "b_U": (last.b @ model.W_U + model.b_U) - (last.b @ model.W_U + model.b_U).mean(),
        "W_Q": folded(block.attn.W_Q, block.ln1),
        "b_Q": block.attn.b_Q + (block.ln1.b[:, None] * block.attn.W_Q).sum(-2),
        "W_O": centred(block.attn.W_O),
        "b_O": centred(block.attn.b_O + torch.einsum("hc,hcd->d", v_bias, block.attn.W_O)),
        "W_in": folded(block.mlp.W_in, block.ln2),
        "W_out": centred(block.mlp.W_out),
        "W_E": centred(model.W_E),
    }
    for name in ("hook_embed", "hook_pos_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"):
        if name in cache:
            found[name] = centred(cache[name])
    for name in ("blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"):
        found[name] = centred(cache[name])
    stack = cache.decompose_resid(pos_slice=-1)
    scaled = cache.apply_ln_to_stack(stack, pos_slice=-1)
    of_all = scaled @ (last.w[:, None] * model.W_U).mean(-1)  # what a component adds to every token's logit
    found["attributions"] = cache.logit_attrs(stack, habits.RIGHT, pos_slice=-1) - of_all
    found["attributions to a difference"] = cache.logit_attrs(stack, habits.RIGHT, habits.WRONG, pos_slice=-1)
    return found


def _difference(ours: Any, theirs: Any) -> str:
    """What is wrong; "" when they are equal."""
    if isinstance(theirs, str):
        return "" if ours == theirs else f"{ours!r}, not {theirs!r}"
    if ours.shape != theirs.shape:
        return f"of shape {list(ours.shape)}, not {list(theirs.shape)}"
    if not torch.equal(ours.isneginf(), theirs.isneginf()):
        return "masked elsewhere"
    ours, theirs = ours.float().masked_fill(ours.isneginf(), 0.0), theirs.float().masked_fill(theirs.isneginf(), 0.0)
    if not theirs.numel():
        return ""
    off = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
    return "" if off <= TOLERANCE else f"off by {off:.1e}"
