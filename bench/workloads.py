"""Small requests of many users, mixed: what the benchmarks send.

Eight kinds, each with the same values by hand on plain Hugging Face (`check`). A user's number picks kind, prompt,
layer, head and neuron, so every user's request differs. Written for Llama-shaped models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.experiments.experiment import FACTS, INDIRECT_OBJECTS, Values, heads
from bench.plain import Plain

PROMPTS = tuple(prompt for prompt, *_ in (*FACTS, *INDIRECT_OBJECTS))
_OPENINGS = ("", "In fact, ", "As everyone knows, ", "My teacher told me that ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one user's request is about."""

    prompt: str
    other: str
    layer: int
    head: int
    neuron: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One small request, in polytrace and by hand; both return the same named values."""

    name: str
    ask: Callable[[Any, Choice], Values]
    check: Callable[[Plain, Choice], Values]


def choice(user: int, plain: Plain) -> Choice:
    """What a user works on; neighbours in number differ in all of it."""
    config = plain.model.config
    prompt = _OPENINGS[user // len(KINDS) % len(_OPENINGS)] + PROMPTS[user % len(PROMPTS)]
    return Choice(
        prompt=prompt,
        other=PROMPTS[(user + 1) % len(PROMPTS)],
        layer=user * 5 % config.num_hidden_layers,
        head=user * 3 % config.num_attention_heads,
        neuron=user * 7 % config.intermediate_size,
    )


# ------------------------------------------------------------------------------------------------------ the eight kinds


def _ask_residual(model: Any, at: Choice) -> Values:
    with model.trace(at.prompt):
        residual = model.model.layers[at.layer].output[0][:, -1].save()
    return {"residual": residual}


def _check_residual(plain: Plain, at: Choice) -> Values:
    name = f"model.layers.{at.layer}"
    return {"residual": plain.read(plain.ids(at.prompt), outputs=[name])[name][:, -1]}


def _ask_lens(model: Any, at: Choice) -> Values:
    with model.trace(at.prompt):
        hidden = model.model.layers[at.layer].output[0][:, -1]
        top = model.lm_head(model.model.norm(hidden)).softmax(-1).topk(5)[0].save()
    return {"top": top}


def _check_lens(plain: Plain, at: Choice) -> Values:
    root: Any = plain.model
    hidden = _check_residual(plain, at)["residual"]
    with torch.inference_mode():
        return {"top": root.lm_head(root.model.norm(hidden)).softmax(-1).topk(5).values}


def _ask_steering(model: Any, at: Choice) -> Values:
    added = direction(model.config["hidden_size"], at)
    with model.trace(at.prompt):
        model.model.layers[at.layer].output[0][:, -1] += added
        logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


def _check_steering(plain: Plain, at: Choice) -> Values:
    added = direction(plain.model.config.hidden_size, at).to(plain.device)

    def add(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] += added
        return hidden

    return {"logits": plain.logits(plain.ids(at.prompt), outputs={f"model.layers.{at.layer}": add})[:, -1]}


def _ask_patch(model: Any, at: Choice) -> Values:
    layer = model.model.layers[at.layer]
    with model.trace() as tracer:
        with tracer.invoke(at.prompt):
            residual = layer.output[0][:, -1]
        with tracer.invoke(at.other):
            layer.output[0][:, -1] = residual
            best = model.lm_head.output[:, -1].amax(-1).save()
    return {"best": best}


def _check_patch(plain: Plain, at: Choice) -> Values:
    residual = _check_residual(plain, at)["residual"]

    def put(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, -1] = residual
        return hidden

    logits = plain.logits(plain.ids(at.other), outputs={f"model.layers.{at.layer}": put})
    return {"best": logits[:, -1].amax(-1)}


def _ask_ablation(model: Any, at: Choice) -> Values:
    _, width = heads(model.config)
    with model.trace(at.prompt):
        model.model.layers[at.layer].self_attn.o_proj.input[..., at.head * width : (at.head + 1) * width] = 0
        logits = model.lm_head.output[:, -1].save()
    return {"logits": logits}


def _check_ablation(plain: Plain, at: Choice) -> Values:
    _, width = heads(plain.model.config.to_dict())

    def silence(mixed: Tensor) -> Tensor:
        mixed = mixed.clone()
        mixed[..., at.head * width : (at.head + 1) * width] = 0
        return mixed

    name = f"model.layers.{at.layer}.self_attn.o_proj"
    return {"logits": plain.logits(plain.ids(at.prompt), inputs={name: silence})[:, -1]}


def _ask_neuron(model: Any, at: Choice) -> Values:
    with model.trace([at.prompt, at.other]):
        activation = model.model.layers[at.layer].mlp.down_proj.input[..., at.neuron].save()
    return {"activation": activation}


def _check_neuron(plain: Plain, at: Choice) -> Values:
    name = f"model.layers.{at.layer}.mlp.down_proj"
    rows = [plain.read(plain.ids(text), inputs=[name])[name][0, :, at.neuron] for text in (at.prompt, at.other)]
    longest = max(len(row) for row in rows)
    return {"activation": torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])}


def _ask_no_mlp(model: Any, at: Choice) -> Values:
    with model.trace(at.prompt):
        mlp = model.model.layers[at.layer].mlp
        mlp.output = mlp.output * 0
        spread = model.lm_head.output[:, -1].std(-1).save()
    return {"spread": spread}


def _check_no_mlp(plain: Plain, at: Choice) -> Values:
    name = f"model.layers.{at.layer}.mlp"
    logits = plain.logits(plain.ids(at.prompt), outputs={name: torch.zeros_like})
    return {"spread": logits[:, -1].std(-1)}


def _ask_surprise(model: Any, at: Choice) -> Values:
    ids = torch.tensor(model.tokenizer.encode(at.prompt).ids)
    with model.trace(at.prompt):
        log_probabilities = model.lm_head.output[:, :-1].log_softmax(-1)
        surprise = log_probabilities.gather(-1, ids[None, 1:, None]).neg().mean().save()
    return {"surprise": surprise}


def _check_surprise(plain: Plain, at: Choice) -> Values:
    ids = plain.ids(at.prompt)
    log_probabilities = plain.logits(ids)[:, :-1].log_softmax(-1)
    return {
        "surprise": log_probabilities.gather(-1, torch.tensor(ids, device=plain.device)[None, 1:, None]).neg().mean()
    }


KINDS: tuple[Kind, ...] = (
    Kind(name="residual", ask=_ask_residual, check=_check_residual),
    Kind(name="logit lens", ask=_ask_lens, check=_check_lens),
    Kind(name="steering", ask=_ask_steering, check=_check_steering),
    Kind(name="patch", ask=_ask_patch, check=_check_patch),
    Kind(name="head ablation", ask=_ask_ablation, check=_check_ablation),
    Kind(name="neuron", ask=_ask_neuron, check=_check_neuron),
    Kind(name="MLP ablation", ask=_ask_no_mlp, check=_check_no_mlp),
    Kind(name="surprise", ask=_ask_surprise, check=_check_surprise),
)


def direction(hidden_size: int, at: Choice) -> Tensor:
    return torch.randn(hidden_size, generator=torch.Generator().manual_seed(at.neuron))
