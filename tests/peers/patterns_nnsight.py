"""Every pattern of nnsight's documentation that needs no gradient, in nnsight, as its pages write it.

Run with the Python of nnsight's own environment, `python -m peers.patterns_nnsight OUT`: writes what each pattern gave
into one safetensors file. Those whose lines are polytrace's too are in `patterns`, and `patterns_polytrace` has the
others under the same names.
"""

# ruff: noqa: RET504  the lines stand as the documentation has them: a trace, and behind it what it saved

from __future__ import annotations

import importlib
from typing import Any

import torch
from peers import patterns
from peers.in_nnsight import write_values
from peers.material import (
    EIFFEL,
    GALATA,
    HEAD,
    HEAD_DIM,
    LAYER,
    NEGATIVE,
    NUM_HEADS,
    POSITIVE,
    PROMPTS,
    REPEATED,
    SHORT,
    lenses,
    sae,
)

nnsight: Any = importlib.import_module("nnsight")


# --- usage/trace, usage/access-and-modify, usage/save


def in_place(model: Any) -> Any:
    with model.trace(EIFFEL):
        before = model.model.layers[0].output.clone().save()
        model.model.layers[0].output[:] = 0
        after = model.model.layers[0].output.save()
        logits = model.lm_head.output.save()
    return before, after, logits


def helper_functions_and_loops(model: Any) -> Any:
    def normalize(x: Any) -> Any:
        return (x - x.mean()) / x.std()

    with model.trace(EIFFEL):
        means = [layer.output.mean() for layer in model.model.layers]
        means = nnsight.save(torch.stack(means))
        normal = normalize(model.lm_head.output).save()
    return means, normal


def loop_over_prompts(model: Any) -> Any:
    results = []
    for prompt in PROMPTS:
        with model.trace(prompt):
            best = model.lm_head.output.argmax(dim=-1).save()
        results.append(best)
    return results


# --- usage/invoke-and-batching, usage/barrier, patterns/multi-prompt-comparison


def sweep_over_prompts(model: Any) -> Any:
    with model.trace() as tracer:
        last_logits = nnsight.save([])
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                last_logits.append(model.lm_head.output[:, -1, :].clone())
    return list(last_logits)


def mean_difference(model: Any) -> Any:
    with model.trace() as tracer:
        pos, neg = nnsight.save([]), nnsight.save([])
        for prompt in POSITIVE:
            with tracer.invoke(prompt):
                pos.append(model.model.layers[LAYER].output[:, -1, :].clone())
        for prompt in NEGATIVE:
            with tracer.invoke(prompt):
                neg.append(model.model.layers[LAYER].output[:, -1, :].clone())
    return torch.cat(list(pos)).mean(0) - torch.cat(list(neg)).mean(0)


def values_between_invokes(model: Any) -> Any:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].output[:, -1, :].clone()
            barrier()
        with tracer.invoke(SHORT):
            barrier()
            model.model.layers[LAYER].output[:, -1, :] = clean
            patched = model.lm_head.output[:, -1].save()
    return patched


def one_intervention_for_all_prompts(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            pass
        with tracer.invoke(GALATA):
            pass
        with tracer.invoke():
            model.model.layers[LAYER].mlp.output[:] = 0
            logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- patterns/logit-lens


def logit_lens(model: Any) -> Any:
    with model.trace(EIFFEL):
        tops = nnsight.save([])
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output))
            tops.append(logits[:, -1, :].argmax(dim=-1))
    return list(tops)


def logit_lens_top_k(model: Any) -> Any:
    with model.trace(EIFFEL):
        tops = nnsight.save([])
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output))
            tops.append(logits[:, -1, :].topk(5, dim=-1).indices)
    return list(tops)


def logit_lens_of_a_token(model: Any) -> Any:
    target = model.tokenizer.encode(" Paris", add_special_tokens=False)[0]
    with model.trace(EIFFEL):
        probabilities = nnsight.save([])
        for layer in model.model.layers:
            logits = model.lm_head(model.model.norm(layer.output))
            probabilities.append(logits[:, -1, :].softmax(dim=-1)[:, target])
    return list(probabilities)


def tuned_lens(model: Any) -> Any:
    maps = lenses()
    with model.trace(EIFFEL):
        tuned = nnsight.save([])
        for number, layer in enumerate(model.model.layers):
            tuned.append(model.lm_head(maps[number](layer.output))[:, -1, :])
    return list(tuned)


def lens_of_attention_and_mlp(model: Any) -> Any:
    with model.trace(EIFFEL):
        parts = nnsight.save([])
        for layer in model.model.layers:
            parts.append(model.lm_head(model.model.norm(layer.self_attn.output[0]))[:, -1])
            parts.append(model.lm_head(model.model.norm(layer.mlp.output))[:, -1])
    return list(parts)


# --- patterns/activation-patching


def patching(model: Any) -> Any:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].output[:, -1, :].clone()
            barrier()
        with tracer.invoke(GALATA):
            barrier()
            model.model.layers[LAYER].output[:, -1, :] = clean
            patched = model.lm_head.output[:, -1, :].save()
        with tracer.invoke(GALATA):
            baseline = model.lm_head.output[:, -1, :].save()
    return patched, baseline


def patching_each_layer(model: Any) -> Any:
    results = []
    for layer in range(len(model.model.layers)):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(EIFFEL):
                hidden = model.model.layers[layer].output[:, -1, :].clone()
                barrier()
            with tracer.invoke(GALATA):
                barrier()
                model.model.layers[layer].output[:, -1, :] = hidden
                logits = model.lm_head.output[:, -1, :].save()
        results.append(logits.softmax(-1))
    return results


def patching_a_token(model: Any) -> Any:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[0].output[:, 2, :].clone()
            barrier()
        with tracer.invoke(GALATA):
            barrier()
            model.model.layers[0].output[:, 2, :] = clean
            patched = model.lm_head.output[:, -1, :].save()
    return patched


def patching_attention(model: Any) -> Any:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].self_attn.output[0][:, -1, :].clone()
            barrier()
        with tracer.invoke(GALATA):
            barrier()
            model.model.layers[LAYER].self_attn.output[0][:, -1, :] = clean
            patched = model.lm_head.output[:, -1, :].save()
    return patched


def patching_an_mlp(model: Any) -> Any:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(EIFFEL):
            clean = model.model.layers[LAYER].mlp.output[:, -1, :].clone()
            barrier()
        with tracer.invoke(GALATA):
            barrier()
            model.model.layers[LAYER].mlp.output[:, -1, :] = clean
            patched = model.lm_head.output[:, -1, :].save()
    return patched


def patching_a_head(model: Any) -> Any:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(EIFFEL):
            z = model.model.layers[LAYER].self_attn.o_proj.input
            clean = z.view(*z.shape[:2], NUM_HEADS, HEAD_DIM)[:, :, HEAD].clone()
            barrier()
        with tracer.invoke(GALATA):
            barrier()
            z = model.model.layers[LAYER].self_attn.o_proj.input
            z.view(*z.shape[:2], NUM_HEADS, HEAD_DIM)[:, :, HEAD] = clean
            patched = model.lm_head.output[:, -1, :].save()
    return patched


def noising(model: Any) -> Any:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(GALATA):
            corrupt = model.model.layers[LAYER].output[:, -1, :].clone()
            barrier()
        with tracer.invoke(EIFFEL):
            barrier()
            model.model.layers[LAYER].output[:, -1, :] = corrupt
            noised = model.lm_head.output[:, -1, :].save()
    return noised


# --- patterns/ablation


def mean_ablation(model: Any) -> Any:
    with model.trace() as tracer:
        activations = nnsight.save([])
        for prompt in PROMPTS:
            with tracer.invoke(prompt):
                activations.append(model.model.layers[LAYER].mlp.output[:, -1, :].clone())
    mean = torch.stack(list(activations), dim=0).mean(dim=0)
    with model.trace(EIFFEL):
        model.model.layers[LAYER].mlp.output[:, -1, :] = mean
        logits = model.lm_head.output[:, -1, :].save()
    return mean, logits


def resampling_ablation(model: Any) -> Any:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(SHORT):
            noise = model.model.layers[LAYER].mlp.output[:, -1, :].clone()
            barrier()
        with tracer.invoke(EIFFEL):
            barrier()
            model.model.layers[LAYER].mlp.output[:, -1, :] = noise
            logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- patterns/per-head-attention


def head_before_the_projection(model: Any) -> Any:
    with model.trace(EIFFEL):
        z = model.model.layers[LAYER].self_attn.o_proj.input
        heads = list(z.view(*z.shape[:2], NUM_HEADS, HEAD_DIM).unbind(dim=2))
        heads[HEAD][:] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- patterns/attention-patterns, usage/source


def attention_weights(model: Any) -> Any:
    with model.trace(EIFFEL):
        _, weights = model.model.layers[LAYER].self_attn.source.attention_interface_1.output
        weights = weights.save()
    return weights


def attention_weights_of_all_layers(model: Any) -> Any:
    with model.trace(EIFFEL):
        patterns = nnsight.save([])
        for layer in model.model.layers:
            _, weights = layer.self_attn.source.attention_interface_1.output
            patterns.append(weights)
    return list(patterns)


def attention_over_prompts(model: Any) -> Any:
    pieces = []
    for prompt in PROMPTS:
        with model.trace(prompt):
            _, weights = model.model.layers[LAYER].self_attn.source.attention_interface_1.output
            weights = weights.save()
        pieces.append(weights)
    return pieces


def what_attention_gives_zeroed(model: Any) -> Any:
    with model.trace(EIFFEL):
        out = model.model.layers[LAYER].self_attn.source.attention_interface_1.output
        new = (torch.zeros_like(out[0]), *out[1:])
        model.model.layers[LAYER].self_attn.source.attention_interface_1.output = new
        logits = model.lm_head.output.save()
    return logits


def induction_scores(model: Any) -> Any:
    half = (len(REPEATED) - 1) // 2
    rows = torch.arange(1 + half, len(REPEATED))
    with model.trace([list(REPEATED)]):
        scores = nnsight.save([])
        for layer in model.model.layers:
            _, weights = layer.self_attn.source.attention_interface_1.output
            scores.append(weights[0, :, rows, rows - half + 1].mean(-1))
    return list(scores)


# --- patterns/sae-and-auxiliary-modules


def transcoder_for_an_mlp(model: Any) -> Any:
    transcoder = sae()
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].mlp.input
        model.model.layers[LAYER].mlp.skip(transcoder(hidden))
        logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- usage/skip, usage/stop-and-early-exit


def skipped_layer(model: Any) -> Any:
    with model.trace(EIFFEL):
        before = model.model.layers[LAYER - 1].output
        model.model.layers[LAYER].skip(before)
        after = model.model.layers[LAYER].output.save()
        logits = model.lm_head.output.save()
    return after, logits


def stopped_early(model: Any) -> Any:
    with model.trace(EIFFEL) as tracer:
        hidden = model.model.layers[0].output.save()
        tracer.stop()
    return hidden


# --- usage/access-and-modify, usage/conditionals-and-loops, usage/session, usage/edit, usage/source


def condition_on_a_value(model: Any) -> Any:
    with model.trace(EIFFEL):
        norm = model.model.layers[LAYER].output.norm(dim=-1).mean().save()
        if norm > 1.0:
            model.model.layers[LAYER + 1].output[:, -1] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return norm, logits


def edited_model(model: Any) -> Any:
    with model.edit() as (_, edited):  # 0.8: a pair, which its documentation does not have yet
        edited.model.layers[1].output[:, 1] = 0
    with model.trace(EIFFEL):
        plain = model.model.layers[1].output.save()
    with edited.trace(EIFFEL):
        changed = edited.model.layers[1].output.save()
        logits = edited.lm_head.output[:, -1, :].save()
    return plain, changed, logits


PATTERNS = patterns.PATTERNS | {
    name: function
    for name, function in list(globals().items())
    if getattr(function, "__module__", None) == __name__ and not name.startswith("_")
}

if __name__ == "__main__":
    with torch.no_grad():
        write_values(PATTERNS)
