"""nnsight's patterns without gradients whose lines are the same in nnsight and in polytrace, as its pages write them.

The pages say GPT-2's names; here they are tinyworld's, a Llama's. Those that each writes in its own way are in
`patterns_nnsight` and `patterns_polytrace`.
"""

# ruff: noqa: RET504  the lines stand as the documentation has them: a trace, and behind it what it saved

from __future__ import annotations

from typing import Any

import torch
from peers.material import (
    EIFFEL,
    GALATA,
    HEAD,
    HEAD_DIM,
    LAYER,
    NUM_HEADS,
    REPEATED,
    SHORT,
    direction,
    sae,
)

# --- usage/trace, usage/access-and-modify, usage/save


def read_and_save(model: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = model.model.layers[-1].output.save()
        logits = model.lm_head.output.save()
    return hidden, logits


def token_ids_as_a_prompt(model: Any) -> Any:
    with model.trace([list(REPEATED)]):
        logits = model.lm_head.output.save()
    return logits


def read_an_input(model: Any) -> Any:
    with model.trace(EIFFEL):
        first = model.model.layers[LAYER].mlp.input.save()
        last = model.lm_head.input.save()
    return first, last


def replacement(model: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = model.model.layers[0].output
        model.model.layers[0].output = hidden * 0.5
        logits = model.lm_head.output.save()
    return logits


def replaced_input(model: Any) -> Any:
    with model.trace(EIFFEL):
        model.model.layers[LAYER].mlp.input = model.model.layers[LAYER].mlp.input * 0.5
        logits = model.lm_head.output.save()
    return logits


def tuple_output(model: Any) -> Any:
    with model.trace(EIFFEL):
        attn_out = model.model.layers[LAYER].self_attn.output[0]
        model.model.layers[LAYER].self_attn.output = (
            torch.zeros_like(attn_out),
            *model.model.layers[LAYER].self_attn.output[1:],
        )
        logits = model.lm_head.output.save()
    return logits


def tuple_output_in_place(model: Any) -> Any:
    with model.trace(EIFFEL):
        model.model.layers[LAYER].self_attn.output[0][:] = 0
        logits = model.lm_head.output.save()
    return logits


def model_output(model: Any) -> Any:
    with model.trace(EIFFEL):
        logits = model.output.logits.save()
    return logits


def modules_called(model: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].output
        logits = model.lm_head(model.model.norm(hidden)).save()
    return logits


# --- usage/invoke-and-batching, usage/barrier, patterns/multi-prompt-comparison


def two_invokes(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            out_paris = model.lm_head.output[:, -1].save()
        with tracer.invoke(SHORT):
            out_tokyo = model.lm_head.output[:, -1].save()
    return out_paris, out_tokyo


def batch_without_invokes(model: Any) -> Any:
    with model.trace([EIFFEL, SHORT]):
        last = model.lm_head.output[:, -1, :].save()
    return last


def baseline_and_ablated(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            baseline = model.lm_head.output[:, -1, :].save()
        with tracer.invoke(EIFFEL):
            model.model.layers[LAYER].mlp.output[:] = 0
            ablated = model.lm_head.output[:, -1, :].save()
    return baseline, ablated


# --- patterns/ablation


def zeroed_position(model: Any) -> Any:
    with model.trace(EIFFEL):
        model.model.layers[LAYER].mlp.output[:, -1, :] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return logits


def zeroed_neuron(model: Any) -> Any:
    with model.trace(EIFFEL):
        model.model.layers[LAYER].mlp.output[:, :, 123] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return logits


def zeroed_head_in_a_new_tuple(model: Any) -> Any:
    with model.trace(EIFFEL):
        attn_out = model.model.layers[LAYER].self_attn.output[0]
        batch, tokens, _ = attn_out.shape
        reshaped = attn_out.view(batch, tokens, NUM_HEADS, HEAD_DIM).clone()
        reshaped[:, :, HEAD, :] = 0
        new_attn = reshaped.view(batch, tokens, NUM_HEADS * HEAD_DIM)
        model.model.layers[LAYER].self_attn.output = (new_attn, *model.model.layers[LAYER].self_attn.output[1:])
        logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- patterns/steering


def steering(model: Any) -> Any:
    vector = direction()
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            baseline = model.lm_head.output[:, -1, :].save()
        with tracer.invoke(EIFFEL):
            model.model.layers[LAYER].output[:, -1, :] += vector * 4.0
            steered = model.lm_head.output[:, -1, :].save()
    return baseline, steered


def steering_everywhere(model: Any) -> Any:
    vector = direction()
    with model.trace(EIFFEL):
        model.model.layers[LAYER].output[:] += vector * 4.0
        steered = model.lm_head.output.save()
    return steered


def steering_a_span(model: Any) -> Any:
    vector = direction()
    with model.trace(EIFFEL):
        model.model.layers[LAYER].output[:, 2:5, :] += vector * 4.0
        steered = model.lm_head.output.save()
    return steered


def steering_several_layers(model: Any) -> Any:
    vector = direction()
    with model.trace(EIFFEL):
        for number in (2, 3, 4, 5):
            model.model.layers[number].output[:, -1, :] += vector * (4.0 / 4)
        steered = model.lm_head.output.save()
    return steered


def direction_projected_out(model: Any) -> Any:
    vector = direction()
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].output
        model.model.layers[LAYER].output = hidden - (hidden @ vector)[..., None] * vector
        logits = model.lm_head.output.save()
    return logits


# --- patterns/per-head-attention


def heads_read(model: Any) -> Any:
    with model.trace(EIFFEL):
        attn_out = model.model.layers[LAYER].self_attn.output[0]
        batch, tokens, _ = attn_out.shape
        heads = attn_out.view(batch, tokens, NUM_HEADS, HEAD_DIM).save()
    return heads


def head_zeroed_through_a_view(model: Any) -> Any:
    with model.trace(EIFFEL):
        attn_out = model.model.layers[LAYER].self_attn.output[0]
        batch, tokens, _ = attn_out.shape
        reshaped = attn_out.view(batch, tokens, NUM_HEADS, HEAD_DIM)
        reshaped[:, :, HEAD, :] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- patterns/sae-and-auxiliary-modules


def sae_inline(model: Any) -> Any:
    dictionary = sae()
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].output
        model.model.layers[LAYER].output[:] = dictionary(hidden)
        logits = model.lm_head.output[:, -1, :].save()
    return logits


def sae_features(model: Any) -> Any:
    dictionary = sae()
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].output
        features = torch.relu(dictionary.encoder(hidden)).save()
    return features


def sae_feature_ablated(model: Any) -> Any:
    dictionary = sae()
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].output
        features = torch.relu(dictionary.encoder(hidden))
        features[:, :, 17] = 0
        model.model.layers[LAYER].output[:] = dictionary.decoder(features)
        logits = model.lm_head.output[:, -1, :].save()
    return logits


# --- usage/access-and-modify, usage/conditionals-and-loops, usage/session, usage/edit, usage/source


def all_inputs(model: Any) -> Any:
    with model.trace(EIFFEL):
        _, kwargs = model.model.layers[LAYER].self_attn.inputs
        hidden = kwargs["hidden_states"].save()
        cos = kwargs["position_embeddings"][0].save()
    return hidden, cos


def session(model: Any) -> Any:
    with model.session():
        with model.trace(EIFFEL):
            hidden = model.model.layers[LAYER].output[:, -1, :]
        with model.trace(GALATA):
            model.model.layers[LAYER].output[:, -1, :] = hidden
            logits = model.lm_head.output[:, -1, :].save()
    return logits


def source_read(model: Any) -> Any:
    with model.trace(EIFFEL):
        queries = model.model.layers[LAYER].self_attn.source.self_q_proj_0.output.save()
        activated = model.model.layers[LAYER].mlp.source.self_act_fn_0.output.save()
    return queries, activated


def source_changed(model: Any) -> Any:
    with model.trace(EIFFEL):
        model.model.layers[LAYER].mlp.source.self_act_fn_0.output[:] = 0
        logits = model.lm_head.output[:, -1, :].save()
    return logits


PATTERNS = {
    name: function for name, function in list(globals().items()) if getattr(function, "__module__", None) == __name__
}
