"""polytrace's calls that stand where nnterp has functions, each result by the name of nnterp's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peers.nnterp_program import HOLE, LAYERS, PROMPTS, TARGET, TARGETS, Part, ragged

from polytrace import methods


def _tensor(array: Any) -> Any:
    return torch.from_numpy(array.values.copy())


def _all(model: Any) -> list[int]:
    """Every token, so that a method returns the whole vocabulary as nnterp's do."""
    return list(range(model.vocab_size))


def nnsight_functions(model: Any) -> Iterator[tuple[str, Any]]:
    yield "get_num_layers", torch.tensor(model.num_layers)
    with model.trace(PROMPTS):
        found = {
            "get_embed_tokens": model.embed_tokens.output.save(),
            "get_layer_input": model.layers_input[0].save(),
            "get_attention_output": model.attentions_output[0].save(),
            "get_layer_output": model.layers_output[0].save(),
            "get_unembed_norm": model.ln_final.output.save(),
            "get_unembed": model.lm_head.output.save(),
            "get_logits": model.logits.save(),
            "get_next_token_probs": model.next_token_probs.save(),
        }
    yield from found.items()
    with model.trace(PROMPTS):
        model.layers_output[0] = model.layers_output[0] * 0.5
        logits = model.logits.save()
    yield "set_layer_output", logits
    with model.trace(PROMPTS):
        shares = model.next_token_probs.save()
    yield "compute_next_token_probs", shares


def mlp_function(model: Any) -> Iterator[tuple[str, Any]]:
    with model.trace(PROMPTS):
        value = model.mlps_output[1].save()
    yield "get_mlp_output", value


def collected(model: Any) -> Iterator[tuple[str, Any]]:
    with model.trace(PROMPTS):
        whole = torch.stack([value[:, -1] for value in model.layers_output]).save()
        last = torch.stack([model.layers_output[1][:, -1]]).save()
        attention = torch.stack([value[:, -2] for value in model.attentions_output]).save()
    yield from (("get_token_activations", whole), ("get_token_activations of layers", last))
    yield "get_token_activations of attention", attention
    with TemporaryDirectory() as folder:
        kept = methods.collect_activations(model, PROMPTS, to=Path(folder) / "kept", of="resid_post", positions=-1)
        batched = torch.stack([kept.array(f"resid_post.{layer}") for layer in LAYERS])
    yield from (("collect_token_activations_batched", batched), ("collect_last_token_activations_session", batched))


def modules(model: Any) -> Iterator[tuple[str, Any]]:
    with model.trace([[0]]):
        embedding, norm = model.embed_tokens.weight.save(), model.ln_final.weight.save()
        head = model.lm_head.weight.save()
    yield "ModuleAccessor.get_embed_tokens", embedding
    yield "ModuleAccessor.get_unembed_norm", norm
    yield "ModuleAccessor.get_unembed", head
    yield "ModuleAccessor.get_layers", torch.tensor(len(model.layers))


def lenses(model: Any) -> Iterator[tuple[str, Any]]:
    for name, more in (("logit_lens", {}), ("logit_lens, return_inv_logits", {"negated": True})):
        yield name, _tensor(methods.logit_lens(model, PROMPTS, tokens=_all(model), **more).probability)[:, :, 0]
    one = methods.logit_lens(model, PROMPTS[0], tokens=_all(model)).probability
    yield "logit_lens of one prompt", _tensor(one)[:, :, 0]


def _scope(model: Any, prompts: Any, target: Any, **more: Any) -> Any:
    return _tensor(methods.patchscope(model, prompts, target, tokens=_all(model), **more).probability)[:, :, 0]


def scopes(model: Any) -> Iterator[tuple[str, Any]]:
    target = methods.Target(prompt=TARGET, position=HOLE)
    yield "patchscope_lens", _scope(model, PROMPTS, target)
    yield "patchscope_lens of a layer", _scope(model, PROMPTS, target, layers=1)
    yield "patchscope_lens with the repeat prompt", _scope(model, PROMPTS[:1], methods.repeat_target())
    latents = torch.linspace(-1, 1, 2 * model.hidden_size).view(2, 1, -1)
    given = _scope(model, PROMPTS[:1], target, mapping=lambda _state, layer, _goal: latents[layer])
    yield "patchscope_lens, latents", given
    earlier = methods.Target(prompt=TARGET, position=2)
    yield "patchscope_lens in the middle", _scope(model, PROMPTS, earlier)
    each = [_scope(model, prompt, own) for prompt, own in zip(PROMPTS, (target, earlier, earlier), strict=True)]
    yield "patchscope_lens, a target each", torch.cat(each)
    yield "repeat_prompt", methods.repeat_target().prompt
    words = methods.repeat_target(["cat", "dog"], "X", between="->", separator=" | ")
    yield "repeat_prompt of words", words.prompt


def scope_texts(model: Any) -> Iterator[tuple[str, Any]]:
    texts = methods.patchscope(model, PROMPTS, methods.Target(prompt=TARGET, position=HOLE), generate=4).text
    yield "patchscope_generate", json.dumps([texts.values[:, layer, 0].tolist() for layer in LAYERS])


def object_lens(model: Any) -> Iterator[tuple[str, Any]]:
    for count in (1, 5):
        found = methods.object_attention_lens(model, PROMPTS[::-1], PROMPTS, 2, window=count, tokens=_all(model))
        yield f"patch_object_attn_lens, {count} layers", _tensor(found.probability)


def prompts(model: Any) -> Iterator[tuple[str, Any]]:
    for words in ("king", ["cat", "dog"]):
        yield f"get_first_tokens of {words}", json.dumps(sorted(methods.target_tokens(model, words)))
    sets = methods.target_sets(model, TARGETS)
    yield "Prompt.target_tokens", json.dumps({name: sorted(own) for name, own in sets.items()})
    both = methods.target_sets(model, {"one": "cat", "two": ["dog", "cat"]}, may_collide=True)
    yield "has_no_collisions", json.dumps([not methods.collisions(sets), not methods.collisions(both)])
    kept = {name: own for name, own in both.items() if name != "two"}
    yield "has_no_collisions, ignored", json.dumps(not methods.collisions(kept))
    asked = [methods.Prompt(text=text, answers=TARGETS) for text in PROMPTS]
    for name, lens in (("", None), (" under a lens", "logit")):
        found = _tensor(methods.run_battery(model, asked, lens=lens).probability)
        yield f"run_prompts{name}", found if lens else found[:, None]
    yield "Prompt.run", _tensor(methods.run_battery(model, asked[:1], lens="logit").probability)[0]
    with model.trace(PROMPTS):
        shares = model.next_token_probs.save()
    yield "next_token_probs_unsqueeze", shares[:, None]


FUNCTIONS: tuple[Part, ...] = (
    *(nnsight_functions, mlp_function, collected, modules, lenses, scopes, scope_texts, object_lens, prompts, ragged),
)


# Where nnterp's number is another than that of the name, and how it is asked for.


def _lens_in_place(model: Any, attentions: Any) -> Iterator[tuple[str, Any]]:
    """The object lens, changing in place what attention modules are given, and so for everyone who holds it."""
    with model.trace(PROMPTS):
        states = [attentions[layer].input[:, -1].save() for layer in LAYERS]
    rows = []
    for layer in LAYERS:
        with model.trace(PROMPTS[::-1]):
            attentions[layer].input[:, 2] = states[layer]
            shares = model.next_token_probs.save()
        rows.append(shares)
    yield "patch_object_attn_lens, 1 layers", torch.stack(rows, 1)


def with_the_residual(model: Any) -> Iterator[tuple[str, Any]]:
    """BLOOM's modules add the residual themselves; nnterp gives what they give."""
    outputs = {
        "attentions_output": lambda layer: model.layers[layer].self_attention.output[0],
        "mlps_output": lambda layer: model.layers[layer].mlp.output,
    }
    yield from _of_modules(model, outputs)
    with model.trace(PROMPTS):
        mlp = model.layers[1].mlp.output.save()
    yield "get_mlp_output", mlp


def with_the_norms(model: Any) -> Iterator[tuple[str, Any]]:
    """DBRX has a module around attention and both norms, which nnterp takes for attention."""
    outputs = {"attentions_output": lambda layer: model.layers[layer].norm_attn_norm.output[0]}
    yield from _of_modules(model, outputs)
    with model.trace(PROMPTS):
        first, last = (model.layers[layer].norm_attn_norm.input.save() for layer in LAYERS)
    yield from (("attentions_input[0]", first), ("attentions_input[1]", last), ("attentions_input[-1]", last))
    with model.trace(PROMPTS):
        model.layers[0].norm_attn_norm.input[:, :, -1] *= -2.0
        logits = model.logits.save()
    yield "attentions_input changed in place", logits
    yield from _lens_in_place(model, [layer.norm_attn_norm for layer in model.layers])


def _of_modules(model: Any, outputs: Any) -> Iterator[tuple[str, Any]]:
    for name, output in outputs.items():
        with model.trace(PROMPTS):
            first, last = (output(layer).save() for layer in LAYERS)
        yield from ((f"{name}[0]", first), (f"{name}[1]", last), (f"{name}[-1]", last))
        with model.trace(PROMPTS):
            output(0)[:, :, -1] *= -2.0
            logits = model.logits.save()
        yield f"{name} changed in place", logits
        with model.trace(PROMPTS):
            value = output(1)
            value[:] = value * value
            logits = model.logits.save()
        yield f"{name} assigned", logits
        if name == "attentions_output":
            yield "get_attention_output", first
            yield "get_token_activations of attention", torch.stack([first, last])[:, :, -2]


def shared_norm(model: Any) -> Iterator[tuple[str, Any]]:
    """GPT-J's MLP is given what attention is given, so nnterp's lens changes it too."""
    yield from _lens_in_place(model, model.attentions)


def without_the_cap(model: Any) -> Iterator[tuple[str, Any]]:
    """Gemma 2's forward caps its logits behind the head; nnterp's lens stops at the head."""
    with model.trace(PROMPTS):
        last = torch.stack([value[:, -1] for value in model.layers_output], 1)
        shares = model.project_on_vocab(last).softmax(-1).save()
        against = model.lm_head(-model.ln_final(last)).softmax(-1).save()
    yield from (("logit_lens", shares), ("logit_lens, return_inv_logits", against))
    yield "logit_lens of one prompt", shares[:1]
    sets = methods.target_sets(model, TARGETS).values()
    summed = torch.stack([shares[:, :, own].sum(-1) for own in sets], -1)
    yield from (("run_prompts under a lens", summed), ("Prompt.run", summed[0]))


OTHERWISE: dict[str, Part] = {
    "BloomForCausalLM": with_the_residual,
    "DbrxForCausalLM": with_the_norms,
    "GPTJForCausalLM": shared_norm,
    "Gemma2ForCausalLM": without_the_cap,
}
