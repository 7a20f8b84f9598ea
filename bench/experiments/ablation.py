"""Head ablation: every head of every layer silenced by itself, in one trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.experiments.experiment import INDIRECT_OBJECTS, Answer, Values, first_token, heads, layer_names
from bench.plain import Plain


def ask(model: Any, turn: int) -> Answer:
    """Every head of every layer silenced by itself: what is left of the indirect object's lead."""
    prompt, right, wrong = INDIRECT_OBJECTS[turn % len(INDIRECT_OBJECTS)]
    good, bad = first_token(model, right), first_token(model, wrong)
    num_heads, width = heads(model.config)
    left = []
    with model.trace() as tracer:
        with tracer.invoke(prompt):
            whole = (model.lm_head.output[:, -1, good] - model.lm_head.output[:, -1, bad]).save()
        for layer in model.model.layers:
            for head in range(num_heads):
                with tracer.invoke(prompt):
                    layer.self_attn.o_proj.input[..., head * width : (head + 1) * width] = 0
                    logits = model.lm_head.output[:, -1]
                    left.append((logits[:, good] - logits[:, bad]).save())
    return Answer(values={"whole": whole, "left": torch.cat(left).view(-1, num_heads)}, receipts=(tracer.receipt,))


def check(plain: Plain, turn: int) -> Values:
    """One forward a head, with a hook that zeroes its slice before the output projection."""
    prompt, right, wrong = INDIRECT_OBJECTS[turn % len(INDIRECT_OBJECTS)]
    good, bad = plain.first_token(right), plain.first_token(wrong)
    ids = plain.ids(prompt)
    num_heads, width = heads(plain.model.config.to_dict())

    def gap(logits: Tensor) -> Tensor:
        return logits[:, -1, good] - logits[:, -1, bad]

    def silence(head: int) -> Callable[[Tensor], Tensor]:
        def edit(mixed: Tensor) -> Tensor:
            mixed = mixed.clone()
            mixed[..., head * width : (head + 1) * width] = 0
            return mixed

        return edit

    left = [
        gap(plain.logits(ids, inputs={f"{layer}.self_attn.o_proj": silence(head)}))
        for layer in layer_names(plain)
        for head in range(num_heads)
    ]
    return {"whole": gap(plain.logits(ids)), "left": torch.cat(left).view(-1, num_heads)}


def tell(values: Values, model: Any, turn: int) -> str:
    """The head whose loss costs most."""
    layer, head = divmod(int(values["left"].argmin()), values["left"].shape[1])
    whole, least = float(values["whole"]), float(values["left"].min())
    return f"without head {head} of layer {layer} the right name's lead falls from {whole:.1f} to {least:.1f}"
