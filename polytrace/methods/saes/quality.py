"""How well an SAE stands in for an activation: how few features, how much variance, and what the model loses by it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.labels import labelled
from polytrace.methods.places import prompts_of
from polytrace.methods.saes.autoencoder import SparseAutoencoder
from polytrace.methods.saes.changes import put_spliced

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.model import Model

_TOGETHER = 16  # prompts of one length in an invoke
_ONE_REQUEST = 256  # prompts
_SUMS = ("tokens", "features", "squares", "lacking", "predicted", "loss", "loss_spliced", "loss_without", "kl")
MEASURES = ("tokens", "l0", "explained_variance", "mse", "loss", "loss_spliced", "loss_without", "recovered", "kl")


def sae_quality(model: Model, prompts: Any, sae: SparseAutoencoder, *, start: int = 0) -> DataArray:
    """Measures over all tokens of some prompts, from token `start` on (1 leaves out a begin-of-sequence token).

    The array `[measure]` has "l0", features that are active at a token; "explained_variance", 1 - the squared error of
    the reconstruction by the variance over tokens; "mse", the error a number; "loss", of the model's next tokens in
    nats, "loss_spliced" with the reconstruction in the place of the activation at all of these tokens, "loss_without"
    with 0 there; "recovered", (loss_without - loss_spliced) / (loss_without - loss), 1 is perfect; "kl", KL(model ||
    spliced) of the next token's distributions in nats; and "tokens", over how many all that is. As in Gao et al. 2024
    (arXiv:2406.04093) and Lieberum et al. 2024 (arXiv:2408.05147). Summed on the service in float64; a request takes
    256 prompts.
    """
    batch = prompts_of(model, prompts)
    if start < 0 or min(map(len, batch.sequences)) < start + 2:
        shortest = min(map(len, batch.sequences))
        told = f"a prompt needs two tokens from `start` on, and the shortest has {shortest}"
        raise GraphError(f"{told} with start={start}", where=user_line())
    total, mean = dict.fromkeys(_SUMS, 0.0), 0.0
    for first in range(0, len(batch), _ONE_REQUEST):
        saved = []
        with model.trace() as tracer:
            for group in _groups(batch.sequences[first : first + _ONE_REQUEST]):
                saved.append(_measured(model, tracer, group, sae, start))
        for sums, vector in saved:
            total = {name: total[name] + float(one) for name, one in zip(_SUMS, sums.tolist(), strict=True)}
            mean = mean + vector
    tokens, predicted = total["tokens"], total["predicted"]
    variance = total["squares"] - float((mean * mean).sum()) / tokens  # type: ignore[attr-defined]
    losses = {name: total[name] / predicted for name in ("loss", "loss_spliced", "loss_without")}
    values = {
        "tokens": tokens,
        "l0": total["features"] / tokens,
        "explained_variance": 1 - total["lacking"] / variance,
        "mse": total["lacking"] / tokens / int(sae.W_dec.shape[1]),
        **losses,
        "recovered": (losses["loss_without"] - losses["loss_spliced"]) / (losses["loss_without"] - losses["loss"]),
        "kl": total["kl"] / tokens,
    }
    return labelled([values[name] for name in MEASURES], {"measure": list(MEASURES)}, name="quality")


def _groups(sequences: Any) -> Iterator[list[list[int]]]:
    """Prompts of one length, a few at a time: views without pads."""
    for _, own in groupby(sorted(sequences, key=len), key=len):
        alike = [list(sequence) for sequence in own]
        for first in range(0, len(alike), _TOGETHER):
            yield alike[first : first + _TOGETHER]


def _measured(model: Model, tracer: Any, group: list[list[int]], sae: SparseAutoencoder, start: int) -> tuple[Any, Any]:
    """Sums over the group's tokens, in the order of the names, and the sum of activations `[E]`; saved."""
    import torch

    places = list(range(start, len(group[0])))
    answers = torch.tensor(group)[:, start + 1 :, None]
    with tracer.invoke(group):
        taken, given = sae.taken(model), sae.given(model)[:, start:]
        features = sae.encode(taken[:, start:])
        wide = given.flatten(2).double()
        lacking = (wide - sae.decode(features, like=taken[:, start:]).flatten(2)).square().sum()
        plain = model.output.logits[:, start:].float().log_softmax(-1)
        sums = [(features > 0).double().sum(), wide.square().sum(), lacking]
        vector = wide.sum((0, 1)).save()
    with tracer.invoke(group):
        put_spliced(model, sae, positions=places)
        spliced = model.output.logits[:, start:].float().log_softmax(-1)
        kl = (plain.exp() * (plain - spliced)).sum(-1).double().sum()
    with tracer.invoke(group):
        value = sae.given(model)
        value[:, start:] = value[:, start:] * 0
        without = model.output.logits[:, start:].float().log_softmax(-1)
        losses = [-one[:, :-1].gather(-1, answers).double().sum() for one in (plain, spliced, without)]
        size = len(group) * len(places)
        counts = torch.tensor([size, size - len(group)], dtype=torch.float64)
        measured: list[Any] = [counts[0], *sums, counts[1], *losses, kl]
        found: Any = torch.stack(measured)
        found = found.save()
    return found, vector
