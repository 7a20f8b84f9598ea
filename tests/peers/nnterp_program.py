"""One program for both: what nnterp's StandardizedTransformer has, asked of it and of polytrace, each result by a name.

As a command it is nnterp's side: `python -m peers.nnterp_program FOLDER OUT ...` loads each FOLDER as nnterp does, with
attention probabilities where it has them, and writes what the program and nnterp's own functions (`FUNCTIONS`) give.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

PROMPTS = ["the king sat on the mat", "the queen saw on the dog", "the cat sat near the hat"]  # of one length
RAGGED = ["the king", "the queen saw on the dog"]
LAYERS = (0, 1)
OF_LAYERS = (
    *("layers_input", "attentions_input", "attention_probabilities", "attentions_output"),
    *("mlps_input", "mlps_output", "layers_output"),
)
FACTS = ("num_layers", "num_heads", "hidden_size", "vocab_size", "attn_probs_available")
STEERED: dict[str, dict[str, Any]] = {
    "one layer": {"layers": 0},
    "layers": {"layers": [1, 0], "factor": 0.5},
    "a position": {"layers": 0, "token_positions": 1},
    "positions": {"layers": 1, "token_positions": [0, -1], "factor": -2.0},
    "positions in a tensor": {"layers": 0, "token_positions": torch.tensor([1, 3])},
    "a prompt": {"layers": 0, "batch_index": 1},
    "prompts": {"layers": [0, 1], "batch_index": [0, 2]},
    "prompts in a tensor": {"layers": 0, "batch_index": torch.tensor([2])},
    "places": {"layers": 0, "batch_index": [0, 1], "token_positions": [2, -1]},
    "a position of prompts": {"layers": 0, "batch_index": [0, 2], "token_positions": 1},
}

Part = Callable[[Any], Iterator[tuple[str, Any]]]


def facts(model: Any) -> Iterator[tuple[str, Any]]:
    for name in FACTS:
        yield name, torch.tensor(int(getattr(model, name)))


def inputs(model: Any) -> Iterator[tuple[str, Any]]:
    size: list[int] = []
    with model.trace(PROMPTS):
        size.extend(model.input_size)
        ids = model.input_ids.clone().save()
        mask = model.attention_mask.clone().save()
        embeddings = model.token_embeddings.clone().save()
        same = model.embed_tokens.output.clone().save()
    yield from (("input_size", torch.tensor(size)), ("input_ids", ids), ("attention_mask", mask))
    yield from (("token_embeddings", embeddings), ("embed_tokens.output", same))


def outputs(model: Any) -> Iterator[tuple[str, Any]]:
    with model.trace(PROMPTS):
        norm = model.ln_final.output.clone().save()
        head = model.lm_head.output.clone().save()
        logits = model.logits.clone().save()
        shares = model.next_token_probs.save()
    yield from (("ln_final.output", norm), ("lm_head.output", head), ("logits", logits), ("next_token_probs", shares))


def reads(name: str) -> Part:
    """One name of every layer, and of the last by -1."""

    def read(model: Any) -> Iterator[tuple[str, Any]]:
        accessor = getattr(model, name)
        found = []
        with model.trace(PROMPTS):
            for layer in LAYERS:
                value = accessor[layer].clone().save()
                found.append(value)
        with model.trace(PROMPTS):
            last = accessor[-1].clone().save()
        for layer, value in zip(LAYERS, found, strict=True):
            yield f"{name}[{layer}]", value
        yield f"{name}[-1]", last

    return read


def changes(name: str) -> Part:
    """What logits become when the first layer's is changed in place."""

    def change(model: Any) -> Iterator[tuple[str, Any]]:
        accessor = getattr(model, name)
        with model.trace(PROMPTS):
            value = accessor[0]
            if name == "attention_probabilities":
                value[:, :, -1, 0] *= 0.25
            else:
                value[:, :, -1] *= -2.0
            logits = model.logits.save()
        yield f"{name} changed in place", logits

    return change


def assigns(name: str) -> Part:
    """What they become when the second layer's is assigned."""

    def assign(model: Any) -> Iterator[tuple[str, Any]]:
        accessor = getattr(model, name)
        with model.trace(PROMPTS):
            value = accessor[1]
            accessor[1] = value * value
            logits = model.logits.save()
        yield f"{name} assigned", logits

    return assign


def first_token_knocked_out(model: Any) -> Iterator[tuple[str, Any]]:
    """As nnterp's own test does it, but for the first query, which would look ahead."""
    with model.trace(PROMPTS):
        for layer in range(model.num_layers):
            shares = model.attention_probabilities[layer]
            shares[:, :, 1:, 1] += shares[:, :, 1:, 0]
            shares[:, :, 1:, 0] = 0
        logits = model.logits.save()
    yield "attention_probabilities without the first token", logits


def embeddings_assigned(model: Any) -> Iterator[tuple[str, Any]]:
    with model.trace(PROMPTS):
        model.token_embeddings = model.token_embeddings * model.token_embeddings
        logits = model.logits.save()
    yield "token_embeddings assigned", logits


def projected(model: Any) -> Iterator[tuple[str, Any]]:
    with model.trace(PROMPTS):
        found = model.project_on_vocab(model.layers_output[0]).save()
    yield "project_on_vocab", found
    rows = torch.linspace(-1, 1, 2 * model.hidden_size).view(2, -1)
    yield "get_topk_closest_tokens", _table(model.get_topk_closest_tokens(rows, k=4))
    yield "get_topk_closest_tokens of one", _table([model.get_topk_closest_tokens(rows[0], k=4)])
    yield "probs_to_dict", _table([model.probs_to_dict(torch.tensor([65, 70]), torch.tensor([0.5, 0.25]))])


def _table(found: Any) -> str:
    return json.dumps([{text: round(share, 5) for text, share in sorted(own.items())} for own in found])


def skipped(model: Any) -> Iterator[tuple[str, Any]]:
    other = torch.linspace(-1, 1, model.hidden_size).expand(len(PROMPTS), 6, -1).clone()
    with model.trace(PROMPTS):
        model.skip_layer(1)
        one = model.logits.save()
    with model.trace(PROMPTS):
        model.skip_layers(0, 1)
        both = model.logits.save()
    with model.trace(PROMPTS):
        model.skip_layer(1, skip_with=other)
        given = model.logits.save()
    yield from (("skip_layer", one), ("skip_layers", both), ("skip_layer with a tensor", given))


def steered(name: str) -> Part:
    def steer(model: Any) -> Iterator[tuple[str, Any]]:
        vector = torch.linspace(-1, 1, model.hidden_size)
        with model.trace(PROMPTS):
            model.steer(steering_vector=vector, **STEERED[name])
            logits = model.logits.save()
        yield f"steer, {name}", logits

    return steer


PROGRAM: tuple[Part, ...] = (
    *(facts, inputs, outputs),
    *(reads(name) for name in OF_LAYERS),
    *(changes(name) for name in OF_LAYERS),
    *(assigns(name) for name in OF_LAYERS),
    *(first_token_knocked_out, embeddings_assigned, projected, skipped),
    *(steered(name) for name in STEERED),
)


def run(model: Any, parts: tuple[Part, ...] = PROGRAM) -> dict[str, Any]:
    """Every result by its name; a part that failed has its error, under `failed PLACE`."""
    found: dict[str, Any] = {}
    for place, part in enumerate(parts):
        try:
            found |= dict(part(model))
        except Exception as error:  # noqa: BLE001  of either library: which parts a family has is compared
            found[f"failed {place}"] = f"{part.__qualname__}: {str(error).strip().splitlines()[-1]}"
    return found


# What follows is nnterp's alone.

TARGETS = {"animal": "cat", "person": ["king", "queen"]}
TARGET, HOLE = "king king queen queen ?", -1


def nnsight_functions(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import nnsight_utils as utils

    yield "get_num_layers", torch.tensor(utils.get_num_layers(model))
    with model.trace(PROMPTS):
        embedded = utils.get_embed_tokens(model).output.clone().save()
        taken = utils.get_layer_input(model, 0).clone().save()
        attention = utils.get_attention_output(model, 0).clone().save()
        given = utils.get_layer_output(model, 0).clone().save()
        norm = utils.get_unembed_norm(model).output.clone().save()
        head = utils.get_unembed(model).output.clone().save()
        logits = utils.get_logits(model).clone().save()
        shares = utils.get_next_token_probs(model).save()
    yield from (("get_embed_tokens", embedded), ("get_layer_input", taken), ("get_attention_output", attention))
    yield from (("get_layer_output", given), ("get_unembed_norm", norm), ("get_unembed", head))
    yield from (("get_logits", logits), ("get_next_token_probs", shares))
    with model.trace(PROMPTS):
        utils.set_layer_output(model, 0, utils.get_layer_output(model, 0) * 0.5)
        logits = model.logits.save()
    yield "set_layer_output", logits
    yield "compute_next_token_probs", utils.compute_next_token_probs(model, PROMPTS)


def mlp_function(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import nnsight_utils as utils

    with model.trace(PROMPTS):
        value = utils.get_mlp_output(model, 1).clone().save()
    yield "get_mlp_output", value


def collected(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import nnsight_utils as utils

    yield "get_token_activations", utils.get_token_activations(model, PROMPTS)
    yield "get_token_activations of layers", utils.get_token_activations(model, PROMPTS, layers=[1])
    yield (
        "get_token_activations of attention",
        utils.get_token_activations(model, PROMPTS, get_activations=utils.get_attention_output, idx=-2),
    )
    yield "collect_token_activations_batched", utils.collect_token_activations_batched(model, PROMPTS, batch_size=2)
    yield (
        "collect_last_token_activations_session",
        utils.collect_last_token_activations_session(model, PROMPTS, batch_size=1),
    )


def modules(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import ModuleAccessor

    accessor = ModuleAccessor(model._model)
    yield "ModuleAccessor.get_embed_tokens", accessor.get_embed_tokens().weight
    yield "ModuleAccessor.get_unembed_norm", accessor.get_unembed_norm().weight
    yield "ModuleAccessor.get_unembed", accessor.get_unembed().weight
    yield "ModuleAccessor.get_layers", torch.tensor(len(accessor.get_layers()))


def lenses(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import interventions

    shares, inverse = interventions.logit_lens(model, PROMPTS, return_inv_logits=True)
    yield from (("logit_lens", shares), ("logit_lens, return_inv_logits", inverse))
    yield "logit_lens of one prompt", interventions.logit_lens(model, PROMPTS[0])


def scopes(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import interventions

    target = interventions.TargetPrompt(TARGET, HOLE)
    yield "patchscope_lens", interventions.patchscope_lens(model, PROMPTS, target)
    yield "patchscope_lens of a layer", interventions.patchscope_lens(model, PROMPTS, target, layers=1)
    yield "patchscope_lens with the repeat prompt", interventions.patchscope_lens(model, PROMPTS[:1])
    latents = torch.linspace(-1, 1, 2 * model.hidden_size).view(2, 1, -1)
    yield "patchscope_lens, latents", interventions.patchscope_lens(model, None, target, latents=latents)
    earlier = interventions.TargetPrompt(TARGET, 2)
    yield "patchscope_lens in the middle", interventions.patchscope_lens(model, PROMPTS, earlier)
    targets = [target, earlier, earlier]
    yield "patchscope_lens, a target each", interventions.patchscope_lens(model, PROMPTS, targets)
    texts = {
        "repeat_prompt": interventions.repeat_prompt(),
        "repeat_prompt of words": interventions.repeat_prompt(["cat", "dog"], rel="->", sep=" | ", placeholder="X"),
    }
    for name, made in texts.items():
        yield name, made.prompt


def scope_texts(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import interventions

    target = interventions.TargetPrompt(TARGET, HOLE)
    start = len(model.tokenizer(TARGET).input_ids)
    said = interventions.patchscope_generate(model, PROMPTS, target, max_length=4)
    texts = {
        layer: model.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True) for layer, ids in said.items()
    }
    yield "patchscope_generate", json.dumps([texts[layer] for layer in LAYERS])


def object_lens(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import interventions

    for count in (1, 5):
        yield (
            f"patch_object_attn_lens, {count} layers",
            interventions.patch_object_attn_lens(model, PROMPTS, PROMPTS[::-1], 2, num_patches=count),
        )


def prompts(model: Any) -> Iterator[tuple[str, Any]]:
    from nnterp import interventions, prompt_utils

    for words in ("king", ["cat", "dog"]):
        yield f"get_first_tokens of {words}", json.dumps(sorted(prompt_utils.get_first_tokens(words, model)))
    asked = [prompt_utils.Prompt.from_strings(text, TARGETS, model) for text in PROMPTS]
    yield "Prompt.target_tokens", json.dumps({name: sorted(own) for name, own in asked[0].target_tokens.items()})
    both = prompt_utils.Prompt.from_strings(PROMPTS[0], {"one": "cat", "two": ["dog", "cat"]}, model)
    yield "has_no_collisions", json.dumps([asked[0].has_no_collisions(), both.has_no_collisions()])
    yield "has_no_collisions, ignored", json.dumps(both.has_no_collisions(ignore_targets="two"))
    shares = asked[0].run(model, interventions.logit_lens)
    yield "Prompt.run", torch.stack([shares[name][0] for name in TARGETS], -1)
    for name, function in (("", None), (" under a lens", _lens)):
        found = prompt_utils.run_prompts(model, asked, batch_size=2, get_probs_func=function, tqdm=_quiet)
        yield f"run_prompts{name}", torch.stack([found[target] for target in TARGETS], -1)
    yield "next_token_probs_unsqueeze", prompt_utils.next_token_probs_unsqueeze(model, PROMPTS)


def _lens(model: Any, texts: list[str], **_: Any) -> Any:
    from nnterp import interventions

    return interventions.logit_lens(model, texts)


def _quiet(numbers: Any, **_: Any) -> Any:
    return numbers


def ragged(model: Any) -> Iterator[tuple[str, Any]]:
    """Prompts of different lengths, in one batch and one by one."""
    with model.trace(RAGGED):
        together = model.logits[:, -1].save()
    yield "ragged logits in a batch", together
    alone = []
    for prompt in RAGGED:
        with model.trace(prompt):
            logits = model.logits[:, -1].save()
        alone.append(logits)
    yield "ragged logits one by one", torch.cat(alone)


FUNCTIONS: tuple[Part, ...] = (
    *(nnsight_functions, mlp_function, collected, modules, lenses, scopes, scope_texts, object_lens, prompts, ragged),
)


def load(folder: str, told: dict[str, str]) -> Any:
    """As nnterp loads it; what it does not do by itself is told."""
    from nnterp import StandardizedTransformer
    from nnterp.rename_utils import AttnProbFunction, RenameConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Source(AttnProbFunction):  # type: ignore[misc]
        """Where this version of transformers drops out: in one function for all, which DBRX calls a module deeper."""

        def get_attention_prob_source(self, attention_module: Any, return_module_source: bool = False) -> Any:
            module = attention_module.attn if "NormAttentionNorm" in str(attention_module) else attention_module
            source = module.source.attention_interface_0.source
            return source if return_module_source else source.nn_functional_dropout_0

    model: Any = folder
    given: dict[str, Any] = {"device_map": "cpu", "dtype": torch.float32}
    try:
        StandardizedTransformer(folder, **given, check_renaming=False)
    except ValueError as error:  # a class that nnsight's LanguageModel has no way to load
        told["refused by name"] = str(error)
        model = AutoModelForCausalLM.from_pretrained(folder, **given, attn_implementation="eager")
        given = {"tokenizer": AutoTokenizer.from_pretrained(folder)}
    config = RenameConfig(attn_prob_source=Source())
    for label, more in (
        ("attention probabilities", {"enable_attention_probs": True}),
        ("attention probabilities found for it", {"enable_attention_probs": True, "rename_config": config}),
        ("standard names", {"attn_implementation": "eager"}),
    ):
        try:
            return StandardizedTransformer(model, **given, **more)
        except Exception as error:  # noqa: BLE001  nnsight makes its own as it raises them
            told[f"no {label}"] = str(error).strip().splitlines()[-1]
    raise RuntimeError(f"nnterp loads {folder} in no way: {told}")


def main() -> None:
    from safetensors.torch import save_file

    torch.set_grad_enabled(False)
    for folder, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        told: dict[str, str] = {}
        found = run(load(folder, told), (*PROGRAM, *FUNCTIONS))
        tensors = {name: value.contiguous().clone() for name, value in found.items() if not isinstance(value, str)}
        save_file(tensors, out, told | {name: value for name, value in found.items() if isinstance(value, str)})


if __name__ == "__main__":
    main()
