"""Direct attribution: what each layer's attention and MLP write into the answer."""

from __future__ import annotations

from typing import Any

import torch

from bench.experiments.experiment import FACTS, Answer, Values, first_token, layer_names
from bench.plain import Plain


def ask(model: Any, turn: int) -> Answer:
    """What each layer's attention and MLP write straight into the answer's lead over another answer."""
    prompt, right = FACTS[turn % len(FACTS)]
    good, bad = first_token(model, right), first_token(model, FACTS[(turn + 1) % len(FACTS)][1])
    parts = []
    with model.trace(prompt) as tracer:
        direction = (model.lm_head.weight[good] - model.lm_head.weight[bad]) * model.model.norm.weight
        for layer in model.model.layers:
            parts.append((layer.self_attn.o_proj.output[:, -1] @ direction).save())
            parts.append((layer.mlp.output[:, -1] @ direction).save())
        final = model.model.norm.input[:, -1]
        scale = (final.pow(2).mean(-1) + model.config["rms_norm_eps"]).rsqrt().save()
    return Answer(values={"parts": torch.stack(list(parts)) * scale}, receipts=(tracer.receipt,))


def check(plain: Plain, turn: int) -> Values:
    """Kept outputs and the model's own parameters."""
    prompt, right = FACTS[turn % len(FACTS)]
    good, bad = plain.first_token(right), plain.first_token(FACTS[(turn + 1) % len(FACTS)][1])
    root: Any = plain.model
    names = [f"{layer}.{part}" for layer in layer_names(plain) for part in ("self_attn.o_proj", "mlp")]
    ids = plain.ids(prompt)
    kept = plain.read(ids, outputs=names)
    final = plain.read(ids, inputs=["model.norm"])["model.norm"][:, -1]
    with torch.inference_mode():
        direction = (root.lm_head.weight[good] - root.lm_head.weight[bad]) * root.model.norm.weight
        scale = (final.pow(2).mean(-1) + root.config.rms_norm_eps).rsqrt()
        return {"parts": torch.stack([kept[name][:, -1] @ direction for name in names]) * scale}


def tell(values: Values, model: Any, turn: int) -> str:
    """The part that writes most of the answer."""
    right = FACTS[turn % len(FACTS)][1]
    layer, part = divmod(int(values["parts"].argmax()), 2)
    kind = ("attention", "MLP")[part]
    return f"the {kind} of layer {layer} writes most of {right!r}: {float(values['parts'].max()):+.1f} of its lead"
