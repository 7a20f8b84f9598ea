"""What nnterp gives of the same weights, polytrace gives, name by name, in every class that nnterp names.

nnterp runs in an environment of its own (`bench.environments`). Where nobody made it these tests are skipped; make it
with `python -c "from bench.environments import NNTERP; NNTERP.make()"`. What is different: `docs/methods/nnterp.md`.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peers import nnterp_methods, nnterp_program
from peers.nnterp_models import make, make_all
from peers.nnterp_program import OF_LAYERS, PROMPTS, STEERED
from safetensors import safe_open

import polytrace
from bench.environments import NNTERP
from polytrace.errors import RunError

TESTS = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-5  # of max(1, max|nnterp|), float32

# every result of nnterp's: what polytrace's is called
CALLED = {
    **{name: f"model.{name}" for name in (*nnterp_program.FACTS, "input_size", "input_ids", "attention_mask")},
    **{name: f"model.{name}" for name in ("token_embeddings", "embed_tokens.output", "ln_final.output")},
    **{name: f"model.{name}" for name in ("lm_head.output", "logits", "next_token_probs")},
    **{f"{name}[{layer}]": f"model.{name}[{layer}]" for name in OF_LAYERS for layer in (0, 1, -1)},
    **{f"{name} changed in place": f"model.{name}[0][...] *= x" for name in OF_LAYERS},
    **{f"{name} assigned": f"model.{name}[1] = x" for name in OF_LAYERS},
    "attention_probabilities without the first token": "model.attention_probabilities[i][...] = x",
    "token_embeddings assigned": "model.token_embeddings = x",
    "project_on_vocab": "model.project_on_vocab",
    "get_topk_closest_tokens": "model.get_topk_closest_tokens",
    "get_topk_closest_tokens of one": "model.get_topk_closest_tokens",
    "probs_to_dict": "model.probs_to_dict",
    "skip_layer": "model.skip_layer",
    "skip_layer with a tensor": "model.skip_layer",
    "skip_layers": "model.skip_layers",
    **{f"steer, {name}": f"model.steer({', '.join(given)})" for name, given in STEERED.items()},
    "get_num_layers": "model.num_layers",
    "get_embed_tokens": "model.embed_tokens",
    "get_layer_input": "model.layers_input[i]",
    "get_attention_output": "model.attentions_output[i]",
    "get_mlp_output": "model.mlps_output[i]",
    "get_layer_output": "model.layers_output[i]",
    "set_layer_output": "model.layers_output[i] = x",
    "get_unembed_norm": "model.ln_final",
    "get_unembed": "model.lm_head",
    "get_logits": "model.logits",
    "get_next_token_probs": "model.next_token_probs",
    "compute_next_token_probs": "model.next_token_probs",
    "get_token_activations": "torch.stack([value[:, -1] for value in model.layers_output])",
    "get_token_activations of layers": "model.layers_output[i][:, -1]",
    "get_token_activations of attention": "model.attentions_output[i][:, -2]",
    "collect_token_activations_batched": "methods.collect_activations",
    "collect_last_token_activations_session": "methods.collect_activations",
    "ModuleAccessor.get_embed_tokens": "model.embed_tokens.weight",
    "ModuleAccessor.get_unembed_norm": "model.ln_final.weight",
    "ModuleAccessor.get_unembed": "model.lm_head.weight",
    "ModuleAccessor.get_layers": "model.layers",
    "logit_lens": "methods.logit_lens",
    "logit_lens of one prompt": "methods.logit_lens",
    "logit_lens, return_inv_logits": "methods.logit_lens(negated=True)",
    "patchscope_lens": "methods.patchscope",
    "patchscope_lens of a layer": "methods.patchscope(layers=)",
    "patchscope_lens with the repeat prompt": "methods.patchscope(methods.repeat_target())",
    "patchscope_lens, latents": "methods.patchscope(mapping=)",
    "patchscope_lens in the middle": "methods.patchscope",
    "patchscope_lens, a target each": "methods.patchscope, a call a target",
    "patchscope_generate": "methods.patchscope(generate=)",
    "repeat_prompt": "methods.repeat_target",
    "repeat_prompt of words": "methods.repeat_target(between=, separator=)",
    "patch_object_attn_lens, 1 layers": "methods.object_attention_lens(window=1)",
    "patch_object_attn_lens, 5 layers": "methods.object_attention_lens(window=5)",
    "get_first_tokens of king": "methods.target_tokens",
    "get_first_tokens of ['cat', 'dog']": "methods.target_tokens",
    "Prompt.target_tokens": "methods.target_sets",
    "has_no_collisions": "methods.collisions",
    "has_no_collisions, ignored": "methods.collisions",
    "Prompt.run": "methods.run_battery(lens='logit')",
    "run_prompts": "methods.run_battery",
    "run_prompts under a lens": "methods.run_battery(lens='logit')",
    "next_token_probs_unsqueeze": "model.next_token_probs[:, None]",
    "ragged logits in a batch": "model.logits",
    "ragged logits one by one": "model.logits",
}
PROBABILITIES = {name for name in CALLED if name.startswith("attention_probabilities")}
MLPS = {name for name in CALLED if "mlp" in name}
# what nnterp does not give of a class, and what it gives that is wrong
MISSING = {"GptOssForCausalLM": PROBABILITIES, "OPTForCausalLM": MLPS}
LEARNED_POSITIONS = ("GPT2LMHeadModel", "GPTBigCodeForCausalLM")
ASSIGNED = "attentions_input assigned"  # nnsight passes it by place beside the name that transformers passes


@dataclass
class Sides:
    """One class's results: nnterp's, ours, and ours asked for otherwise where nnterp's mean something else."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    otherwise: dict[str, Any]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sides]:
    python = NNTERP.made()
    if python is None:
        pytest.skip("nnterp has no environment here")
    folders = make_all(tmp_path_factory.mktemp("models"))
    outs = {name: folder / "nnterp.safetensors" for name, folder in folders.items()}
    variables = os.environ | {"PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    pairs = [str(path) for name in folders for path in (folders[name], outs[name])]
    command = [str(python), "-m", "peers.nnterp_program", *pairs]
    ran = subprocess.run(command, cwd=TESTS, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {name: _sides(name, folder, outs[name]) for name, folder in folders.items()}


def _sides(name: str, folder: Path, out: Path) -> Sides:
    with safe_open(out, "pt") as file:
        theirs = {**file.metadata(), **{key: file.get_tensor(key) for key in list(file.keys())}}
    with polytrace.load(str(folder), threads=1) as model:
        ours = nnterp_program.run(model, (*nnterp_program.PROGRAM, *nnterp_methods.FUNCTIONS))
        otherwise = nnterp_methods.OTHERWISE.get(name)
        return Sides(theirs, ours, dict(otherwise(model)) if otherwise else {})


@pytest.mark.parametrize("name", CALLED, ids=[f"{name} is {ours}" for name, ours in CALLED.items()])
def test_numbers_are_nnterps(classes: dict[str, Sides], name: str) -> None:
    wrong = {}
    for kind, own in classes.items():
        if name in own.otherwise:
            told = _difference(own.otherwise[name], own.theirs[name])
            assert _difference(own.ours[name], own.theirs[name]), f"{kind}: no difference to tell of"
        elif name not in own.theirs:
            told = "" if name in own.ours else "on neither side"
            is_known = name in MISSING.get(kind, ()) or (name == ASSIGNED and _told(own, "multiple values"))
            assert is_known, f"{kind}: nnterp does not give it: {own.theirs}"
        elif name == "ragged logits in a batch" and kind in LEARNED_POSITIONS:
            told = _difference(own.ours[name], own.theirs["ragged logits one by one"])
            assert _difference(own.theirs[name], own.theirs["ragged logits one by one"])
        elif name == "attn_probs_available" and kind in MISSING and kind != "OPTForCausalLM":
            told = "" if own.ours[name] and not own.theirs[name] else "attention probabilities are there"
        else:
            told = _difference(own.ours.get(name), own.theirs[name])
        if told:
            wrong[kind] = told
    assert not wrong


def test_every_number_of_nnterps_is_compared(classes: dict[str, Sides]) -> None:
    for kind, own in classes.items():
        failed = {key: told for key, told in own.ours.items() if key.startswith("failed")}
        assert not failed, kind
        assert own.ours.keys() == CALLED.keys()
        assert {key for key in own.theirs if not key.startswith(("failed", "no ", "refused"))} <= CALLED.keys()
        count = len(CALLED.keys() & own.theirs.keys())
        assert count >= len(CALLED) - len(MISSING.get(kind, ())) - 1, kind


def test_edits_change_what_the_models_say(classes: dict[str, Sides]) -> None:
    edits = [name for name in CALLED if name.startswith(("steer", "skip")) or name.endswith(("assigned", "in place"))]
    assert len(edits) > 25
    for kind, own in classes.items():
        for name in edits:
            change = (own.ours[name] - own.ours["logits"]).abs().max()
            assert change > 20 * TOLERANCE * own.ours["logits"].abs().max(), (kind, name)


def test_what_nnterp_refuses_of_these_classes(classes: dict[str, Sides]) -> None:
    """As `docs/methods/nnterp.md` says it."""
    assert _told(classes["GptOssForCausalLM"], "do not sum to 1")
    assert _told(classes["OPTForCausalLM"], "no attribute mlp")
    assert _told(classes["Gemma3ForConditionalGeneration"], "registered with AutoModelForImageTextToText")
    assert _told(classes["GPT2LMHeadModel"], "no attribute 'module_attn_dropout_0'")
    refused = [kind for kind, own in classes.items() if ASSIGNED not in own.theirs]
    assert len(refused) == len(classes) - 3
    sums = classes["GptOssForCausalLM"].ours["attention_probabilities[0]"].sum(-1)
    assert (sums < 1).all() and (sums > 0).all(), "what the sink does not take"


def test_lookahead_that_nnterps_own_test_writes_is_refused(tmp_path: Path) -> None:
    make("LlamaForCausalLM", tmp_path)
    model = polytrace.load(str(tmp_path), threads=1)
    with pytest.raises(RunError, match="which comes later: that must stay 0"), model.trace(PROMPTS):
        shares = model.attention_probabilities[0]
        shares[:, :, :, 1] += shares[:, :, :, 0]
        shares[:, :, :, 0] = 0
        model.logits.save()


def _told(own: Sides, text: str) -> bool:
    return any(text in told for told in own.theirs.values() if isinstance(told, str))


def _difference(ours: Any, theirs: Any) -> str:
    """What is wrong; "" when they are equal."""
    if isinstance(theirs, str) or isinstance(ours, str):
        return "" if ours == theirs else f"{ours!r}, not {theirs!r}"
    if ours is None or ours.shape != theirs.shape:
        return f"of shape {None if ours is None else list(ours.shape)}, not {list(theirs.shape)}"
    off = float((ours.double() - theirs.double()).abs().max()) / max(1.0, float(theirs.double().abs().max()))
    return "" if off <= TOLERANCE else f"off by {off:.1e}"
