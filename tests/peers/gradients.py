"""nnsight's patterns with gradients: attribution patching, gradient-based attribution, AtP*'s pieces.

The lines are the same in nnsight (`gradients_nnsight` runs them) and in polytrace, but for the library's own `save`.
"""

# ruff: noqa: RET504  a trace, and behind it what it saved

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peers.material import EIFFEL, GALATA, HEAD_DIM, LAYER, NUM_HEADS, NUM_LAYERS, SHORT

TARGET, OTHER = 1200, 700  # two tokens' logits are the metric


def metric(model: Any) -> Any:
    logits = model.lm_head.output[:, -1]
    return (logits[:, TARGET] - logits[:, OTHER]).sum()


def saliency_of_layers(model: Any, save: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = [layer.output for layer in model.model.layers]
        with metric(model).backward():
            grads = save([None] * NUM_LAYERS)
            for number in reversed(range(NUM_LAYERS)):
                grads[number] = hidden[number].grad
    return grads


def attribution_patching(model: Any) -> Any:
    clean, corrupt, grads = [None] * NUM_LAYERS, [None] * NUM_LAYERS, [None] * NUM_LAYERS
    with torch.no_grad(), model.trace(EIFFEL):
        for number in range(NUM_LAYERS):
            clean[number] = model.model.layers[number].output.save()
    with model.trace(GALATA):
        hidden = []
        for number in range(NUM_LAYERS):
            hidden.append(model.model.layers[number].output)
            corrupt[number] = hidden[number].save()
        with metric(model).backward():
            for number in reversed(range(NUM_LAYERS)):
                grads[number] = hidden[number].grad.save()
    found = [((a - b) * grad).sum(-1) for a, b, grad in zip(clean, corrupt, grads, strict=True)]
    return torch.cat(found)


def attribution_in_a_session(model: Any) -> Any:
    with model.session():
        with model.trace(EIFFEL):
            clean = model.model.layers[LAYER].output
        with model.trace(GALATA):
            hidden = model.model.layers[LAYER].output
            with metric(model).backward():
                found = ((clean - hidden) * hidden.grad).sum(-1).save()
    return found


def attribution_of_heads(model: Any) -> Any:
    with model.trace(EIFFEL):
        clean = model.model.layers[LAYER].self_attn.o_proj.input.save()
    with model.trace(GALATA):
        z = model.model.layers[LAYER].self_attn.o_proj.input
        corrupt = z.save()
        with metric(model).backward():
            grad = z.grad.save()
    return ((clean - corrupt) * grad).view(1, -1, NUM_HEADS, HEAD_DIM).sum((0, 1, 3))


def input_times_gradient(model: Any) -> Any:
    with model.trace(EIFFEL):
        embeddings = model.model.embed_tokens.output
        kept = embeddings.save()
        with metric(model).backward():
            grad = embeddings.grad.save()
    return (kept * grad).sum(-1).abs()


def integrated_gradients(model: Any) -> Any:
    alphas = (torch.arange(4) + 0.5) / 4
    with model.trace([EIFFEL] * 4):
        hidden = model.model.layers[LAYER].output
        scaled = (hidden * alphas[:, None, None]).detach()
        scaled.requires_grad_(True)
        model.model.layers[LAYER].output = scaled
        with metric(model).backward():
            found = (scaled.grad.mean(0) * hidden[:1]).sum(-1).save()
    return found


def integrated_gradients_in_place(model: Any) -> Any:
    alphas = (torch.arange(4) + 0.5) / 4
    with model.trace([EIFFEL] * 4):
        hidden = model.model.layers[LAYER].output
        hidden[:] = hidden * alphas[:, None, None]
        with metric(model).backward():
            found = hidden.grad.mean(0).save()
    return found


def doubled_gradient(model: Any) -> Any:
    with model.trace(EIFFEL):
        first, hidden = model.model.layers[1].output, model.model.layers[LAYER].output
        with metric(model).backward():
            original = hidden.grad.clone().save()
            hidden.grad = hidden.grad * 2
            doubled = hidden.grad.save()
            before = first.grad.save()
    return original, doubled, before


def two_losses(model: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].output
        logits = model.lm_head.output
        with logits[:, -1, TARGET].sum().backward(retain_graph=True):
            one = hidden.grad.clone().save()
        with logits[:, -1].pow(2).sum().backward():
            two = hidden.grad.clone().save()
    return one, two


def gradients_of_invokes(model: Any) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(EIFFEL):
            hidden = model.model.layers[LAYER].output
            with metric(model).backward(retain_graph=True):
                one = hidden.grad[:, -1].save()
        with tracer.invoke(SHORT):
            hidden = model.model.layers[LAYER].output
            with metric(model).backward():
                two = hidden.grad[:, -1].save()
    return one, two


def dropped_gradient(model: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = model.model.layers[1].output
        mlp = model.model.layers[LAYER].mlp.output
        loss = metric(model)
        with loss.backward(retain_graph=True):
            ordinary = hidden.grad.clone().save()
        with loss.backward():
            mlp.grad = torch.zeros_like(mlp.grad)
            dropped = hidden.grad.clone().save()
    return ordinary, dropped


def plain_backward(model: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].output
        hidden.retain_grad()
        metric(model).backward()
        grad = hidden.grad.save()
    return grad


def gradient_by_function(model: Any) -> Any:
    with model.trace(EIFFEL):
        first, hidden = model.model.layers[1].output, model.model.layers[LAYER].output
        one, two = torch.autograd.grad(metric(model), [first, hidden])
        one, two = one.save(), two.save()
    return one, two


def weighed_gradient(model: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = model.model.layers[LAYER].output
        logits = model.lm_head.output[:, -1]
        with logits.backward(gradient=torch.linspace(-1, 1, 3200)[None]):
            grad = hidden.grad.save()
    return grad


def frozen_attention(model: Any) -> Any:
    with model.trace(EIFFEL):
        hidden = model.model.layers[1].output
        added = model.model.layers[LAYER].self_attn.output[0]
        model.model.layers[LAYER].self_attn.output = (added.detach(), *model.model.layers[LAYER].self_attn.output[1:])
        with metric(model).backward():
            grad = hidden.grad.save()
    return grad


def steered_by_a_tensor_of_ones_own(model: Any) -> Any:
    vector = torch.zeros(256, requires_grad=True)
    with model.trace(EIFFEL):
        model.model.layers[LAYER].output[:, -1] += vector
        metric(model).backward()
    return vector.grad


def one_step_of_learning(model: Any) -> Any:
    vector = torch.zeros(256, requires_grad=True)
    optimiser = torch.optim.SGD([vector], lr=0.5)
    with model.trace(EIFFEL):
        model.model.layers[LAYER].output[:, -1] += vector
        metric(model).backward()
    optimiser.step()
    with model.trace(EIFFEL):
        model.model.layers[LAYER].output[:, -1] += vector
        logits = model.lm_head.output[:, -1].save()
    return vector, logits


def patterns(save: Callable[[Any], Any]) -> dict[str, Callable[[Any], Any]]:
    """All patterns by name, each of a model; `save` is the library's."""
    found = {
        name: function
        for name, function in globals().items()
        if getattr(function, "__module__", None) == __name__ and name not in ("metric", "patterns")
    }
    return found | {"saliency_of_layers": partial(saliency_of_layers, save=save)}
