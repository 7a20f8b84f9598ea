"""The patterns of `patterns_nnsight` in polytrace, where users write them otherwise: the same names and values."""

# ruff: noqa: RET504  the lines stand as the documentation has them: a trace, and behind it what it saved

from __future__ import annotations

from typing import Any

import torch
from peers import patterns
from peers.material import (
    EIFFEL,
    GALATA,
    HEAD,
    LAYER,
    NEGATIVE,
    POSITIVE,
    PROMPTS,
    REPEATED,
    SHORT,
    lenses,
    sae,
)

# --- usage/trace, usage/access-and-modify, usage/save


def in_place(model: Any) -> Any:
    with model.trace(EIFFEL):
        before = model.model.layers[0].output.save()  # a read is a snapshot: no clone
        model.model.layers[0].output[:] = 0
        after = model.model.layers[0].output.save()
        logits = model.lm_head.output.save()
    return before, after, logits


def helper_functions_and_loops(model: Any) -> Any:
    def normalize(x: Any) -> Any:
        return (x - x.mean()) / x.std()

    with model.trace(EIFFEL):
        means = torch.stack([layer.output.mean() for layer in model.model.layers]).save()
        normal = normalize(model.lm_head.output).save()
    return means, normal


def loop_over_prompts(model: Any) -> Any:
    results = []
    with model.trace() as tracer:  # one request, one pass
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                results.append(model.lm_head.output.argmax(dim=-1).save())
    return results


# --- usage/invoke-and-batching, usage/barrier, patterns/multi-prompt-comparison


def sweep_over_prompts(model: Any) -> Any:
    with model.trace() as tracer:
        last_logits = []
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                last_logits.append(model.lm_head.output[:, -1, :].save())
    return last_logits


def mean_difference(model: Any) -> Any:
    with model.trace() as tracer:  # the mean is made at the service: one vector comes back
        with tracer.invoke(POSITIVE):
            pos = model.model.layers[LAYER].output[:, -1, :].mean(0)
        with tracer.invoke(NEGATIVE):
            difference = (pos - model.model.layers[LAYER].output[:, -1, :].mean(0)).save()
    return difference


def values_between_invokes(model: Any) -> Any:
    with model.trace() as tracer:  # no barrier
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].output[:, -1, :]
        with tracer.invoke(SHORT):
            model.model.layers[LAYER].output[:, -1, :] = clean
            patched = model.lm_head.output[:, -1].save()
    return patched


def one_intervention_for_all_prompts(model: Any) -> Any:
    with model.trace([EIFFEL, GALATA]):
        model.model.layers[LAYER].mlp.output[:] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- patterns/logit-lens


def logit_lens(model: Any) -> Any:
    with model.trace(EIFFEL):
        tops = []
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output))
            tops.append(logits[:, -1, :].argmax(dim=-1).save())
    return tops


def logit_lens_top_k(model: Any) -> Any:
    with model.trace(EIFFEL):
        tops = []
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output))
            tops.append(logits[:, -1, :].topk(5, dim=-1).indices.save())
    return tops


def logit_lens_of_a_token(model: Any) -> Any:
    target = model.tokenizer.encode(" Paris", add_special_tokens=False).ids[0]
    with model.trace(EIFFEL):
        probabilities = []
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output))
            probabilities.append(logits[:, -1, :].softmax(dim=-1)[:, target].save())
    return probabilities


def tuned_lens(model: Any) -> Any:
    maps = lenses()
    with model.trace(EIFFEL):
        tuned = []
        for number, layer in enumerate(model.model.layers):
            tuned.append(model.lm_head(maps[number](layer.output))[:, -1, :].save())
    return tuned


def lens_of_attention_and_mlp(model: Any) -> Any:
    with model.trace(EIFFEL):
        parts = []
        for layer in model.model.layers:
            parts.append(model.lm_head(model.model.norm(layer.self_attn.output[0]))[:, -1].save())
            parts.append(model.lm_head(model.model.norm(layer.mlp.output))[:, -1].save())
    return parts


# --- patterns/activation-patching


def patching(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].output[:, -1, :]
        with tracer.invoke(GALATA):
            model.model.layers[LAYER].output[:, -1, :] = clean
            patched = model.lm_head.output[:, -1, :].save()
        with tracer.invoke(GALATA):
            baseline = model.lm_head.output[:, -1, :].save()
    return patched, baseline


def patching_each_layer(model: Any) -> Any:
    results = []
    with model.trace() as tracer:  # one trace for all layers
        with tracer.invoke(EIFFEL):
            clean = [layer.output[:, -1, :] for layer in model.model.layers]
        for layer, hidden in zip(model.model.layers, clean, strict=True):
            with tracer.invoke(GALATA):
                layer.output[:, -1, :] = hidden
                results.append(model.lm_head.output[:, -1, :].softmax(-1).save())
    return results


def patching_a_token(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[0].output[:, 2, :]
        with tracer.invoke(GALATA):
            model.model.layers[0].output[:, 2, :] = clean
            patched = model.lm_head.output[:, -1, :].save()
    return patched


def patching_attention(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].self_attn.output[0][:, -1, :]
        with tracer.invoke(GALATA):
            model.model.layers[LAYER].self_attn.output[0][:, -1, :] = clean
            patched = model.lm_head.output[:, -1, :].save()
    return patched


def patching_an_mlp(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].mlp.output[:, -1, :]
        with tracer.invoke(GALATA):
            model.model.layers[LAYER].mlp.output[:, -1, :] = clean
            patched = model.lm_head.output[:, -1, :].save()
    return patched


def patching_a_head(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].self_attn.z[:, :, HEAD]
        with tracer.invoke(GALATA):
            model.model.layers[LAYER].self_attn.z[:, :, HEAD] = clean
            patched = model.lm_head.output[:, -1, :].save()
    return patched


def noising(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(GALATA):
            corrupt = model.model.layers[LAYER].output[:, -1, :]
        with tracer.invoke(EIFFEL):
            model.model.layers[LAYER].output[:, -1, :] = corrupt
            noised = model.lm_head.output[:, -1, :].save()
    return noised


# --- patterns/ablation


def mean_ablation(model: Any) -> Any:
    with model.trace() as tracer:  # one trace: the mean never leaves the service
        with tracer.invoke(PROMPTS):
            mean = model.model.layers[LAYER].mlp.output[:, -1, :].mean(dim=0, keepdim=True).save()
        with tracer.invoke(EIFFEL):
            model.model.layers[LAYER].mlp.output[:, -1, :] = mean
            logits = model.lm_head.output[:, -1, :].save()
    return mean, logits


def resampling_ablation(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            noise = model.model.layers[LAYER].mlp.output[:, -1, :]
        with tracer.invoke(EIFFEL):
            model.model.layers[LAYER].mlp.output[:, -1, :] = noise
            logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- patterns/per-head-attention


def head_before_the_projection(model: Any) -> Any:
    with model.trace(EIFFEL):
        model.model.layers[LAYER].self_attn.z[:, :, HEAD] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- patterns/attention-patterns, usage/source


def attention_weights(model: Any) -> Any:
    with model.trace(EIFFEL):
        weights = model.model.layers[LAYER].self_attn.pattern.save()
    return weights


def attention_weights_of_all_layers(model: Any) -> Any:
    with model.trace(EIFFEL):
        patterns = [layer.self_attn.pattern.save() for layer in model.model.layers]
    return patterns


def attention_over_prompts(model: Any) -> Any:
    pieces = []
    with model.trace() as tracer:
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                pieces.append(model.model.layers[LAYER].self_attn.pattern.save())
    return pieces


def what_attention_gives_zeroed(model: Any) -> Any:
    with model.trace(EIFFEL):
        model.model.layers[LAYER].self_attn.z[:] = 0
        logits = model.lm_head.output.save()
    return logits


def induction_scores(model: Any) -> Any:
    half = (len(REPEATED) - 1) // 2
    rows = torch.arange(1 + half, len(REPEATED))
    with model.trace([list(REPEATED)]):  # one number a head comes back
        scores = [layer.self_attn.pattern[0, :, rows, rows - half + 1].mean(-1).save() for layer in model.model.layers]
    return scores


# --- patterns/sae-and-auxiliary-modules


def transcoder_for_an_mlp(model: Any) -> Any:
    transcoder = sae()
    with model.trace(EIFFEL):
        model.model.layers[LAYER].mlp.output = transcoder(model.model.layers[LAYER].mlp.input)
        logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- usage/skip, usage/stop-and-early-exit


def skipped_layer(model: Any) -> Any:
    with model.trace(EIFFEL):
        model.model.layers[LAYER].output = model.model.layers[LAYER - 1].output
        after = model.model.layers[LAYER].output.save()
        logits = model.lm_head.output.save()
    return after, logits


def stopped_early(model: Any) -> Any:
    with model.trace(EIFFEL):  # nothing runs behind the last value that is saved
        hidden = model.model.layers[0].output.save()
    return hidden


# --- usage/access-and-modify, usage/conditionals-and-loops, usage/session, usage/edit, usage/source


def condition_on_a_value(model: Any) -> Any:
    with model.trace(EIFFEL, peek=True):
        norm = model.model.layers[LAYER].output.norm(dim=-1).mean().save()
        if norm > 1.0:
            model.model.layers[LAYER + 1].output[:, -1] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return norm, logits


def edited_model(model: Any) -> Any:
    with model.edit() as edited:
        edited.model.layers[1].output[:, 1] = 0
    with model.trace(EIFFEL):
        plain = model.model.layers[1].output.save()
    with edited.trace(EIFFEL):
        changed = edited.model.layers[1].output.save()
        logits = edited.lm_head.output[:, -1, :].save()
    return plain, changed, logits


PATTERNS = patterns.PATTERNS | {
    name: function for name, function in list(globals().items()) if getattr(function, "__module__", None) == __name__
}
