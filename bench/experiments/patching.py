"""Activation patching: where in layers x tokens a fact lives, all patches in one trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.experiments.experiment import FACTS, Answer, Values, first_token, layer_names, pieces
from bench.plain import Plain


def ask(model: Any, turn: int) -> Answer:
    """One residual of the clean run put into the corrupt run: every layer x token, in one trace."""
    clean, corrupt, right, wrong = patching_pair(lambda text: model.tokenizer.encode(text).ids, turn)
    good, bad = (first_token(model, word) for word in (right, wrong))
    num_tokens = len(model.tokenizer.encode(clean).ids)
    patched = []
    with model.trace() as tracer:
        with tracer.invoke(clean):
            residuals = [layer.output[0] for layer in model.model.layers]
            clean_difference = (model.lm_head.output[:, -1, good] - model.lm_head.output[:, -1, bad]).save()
        with tracer.invoke(corrupt):
            corrupt_difference = (model.lm_head.output[:, -1, good] - model.lm_head.output[:, -1, bad]).save()
        for layer, residual in zip(model.model.layers, residuals, strict=True):
            for position in range(num_tokens):
                with tracer.invoke(corrupt):
                    layer.output[0][:, position] = residual[:, position]
                    logits = model.lm_head.output[:, -1]
                    patched.append((logits[:, good] - logits[:, bad]).save())
    values = {
        "clean": clean_difference,
        "corrupt": corrupt_difference,
        "patched": torch.cat(patched).view(-1, num_tokens),
    }
    return Answer(values=values, receipts=(tracer.receipt,))


def check(plain: Plain, turn: int) -> Values:
    """One forward a patch, with a hook that sets one row."""
    clean, corrupt, right, wrong = patching_pair(plain.ids, turn)
    good, bad = plain.first_token(right), plain.first_token(wrong)
    ids = plain.ids(corrupt)
    names = layer_names(plain)
    residuals = plain.read(plain.ids(clean), outputs=names)

    def gap(logits: Tensor) -> Tensor:
        return logits[:, -1, good] - logits[:, -1, bad]

    def put(residual: Tensor, position: int) -> Callable[[Tensor], Tensor]:
        def edit(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            hidden[:, position] = residual[:, position]
            return hidden

        return edit

    patched = [
        gap(plain.logits(ids, outputs={name: put(residuals[name], position)}))
        for name in names
        for position in range(len(ids))
    ]
    return {
        "clean": gap(plain.logits(plain.ids(clean))),
        "corrupt": gap(plain.logits(ids)),
        "patched": torch.cat(patched).view(-1, len(ids)),
    }


def tell(values: Values, model: Any, turn: int) -> str:
    """Where the fact is still with its subject, and from where on the last token has it."""
    restored = restored_share(values)
    last = restored[:, -1]
    arrived = int((last > 0.5).nonzero()[0]) if bool((last > 0.5).any()) else len(last)
    subject = int(restored[0, 1:-1].argmax()) + 1
    token = pieces(model, patching_pair(lambda text: model.tokenizer.encode(text).ids, turn)[0])[subject]
    return f"after layer 0 the fact still sits on {token!r}; after layer {arrived} the last token has it"


def restored_share(values: Values) -> Tensor:
    """`[layers, tokens]`: 0 where the patched run answers as the corrupt one, 1 where as the clean one."""
    return (values["patched"] - values["corrupt"]) / (values["clean"] - values["corrupt"])


def patching_pair(ids: Callable[[str], Sequence[int]], turn: int) -> tuple[str, str, str, str]:
    """A clean and a corrupt prompt of equal length, the clean answer and the corrupt answer."""
    clean, right = FACTS[turn % len(FACTS)]
    for other in range(1, len(FACTS)):
        corrupt, wrong = FACTS[(turn + other) % len(FACTS)]
        if len(ids(corrupt)) == len(ids(clean)):
            return clean, corrupt, right, wrong
    raise ValueError(f"no other fact has as many tokens as {clean!r}")
