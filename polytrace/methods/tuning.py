"""Training a tuned lens: residuals come from the service in parts, translators are fitted here, by torch.

The loss is worked out on the client, with its own copy of final norm and unembedding: each residual travels once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polytrace
from polytrace import functions
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.labels import labelled
from polytrace.methods.places import Of, layers_of, point_of, residual_leaf
from polytrace.methods.tuned import TunedLens, as_tuned_lens
from polytrace.methods.unembedding import FinalNorm, behind_head, final_norm, prepare_unembedding, unembed

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.model import Model

_CHUNK_BYTES = 256 << 20  # of the unembedding, which comes in such requests


def train_tuned_lens(
    model: Model,
    prompts: Sequence[Any],
    *,
    layers: Any = None,
    epochs: int = 1,
    batch_tokens: int = 512,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[int, Sequence[float]], None] | None = None,
) -> TunedLens:
    """Fits a translator to each layer, so that the lens says what the model says (Belrose et al., arXiv:2303.08112).

    The loss of a token is KL(the model's last distribution || the lens's), of all positions of all prompts. Translators
    begin as nothing and are added to the residual, so that weight decay draws them to the logit lens. Adam with a rate
    that falls to 0 in a line; the paper's own recipe is SGD with momentum over far more tokens a step. `layers`: whose
    inputs get a translator, others keep the logit lens. `report(step, losses)`: the KL of each of these layers.

    Prompts come in an order of the seed, are cut into steps of `batch_tokens`, whatever requests they came in, and the
    same call gives the same lens. The client holds the unembedding, `layers * features^2` numbers four times, and a few
    parts of residuals; nothing grows with the dataset. Needs torch.
    """
    import torch

    if not isinstance(prompts, Sequence) or isinstance(prompts, str) or not prompts:
        raise GraphError("prompts to train on are a list of several", where=user_line())
    if epochs < 1 or batch_tokens < 1 or not learning_rate > 0:
        raise GraphError(
            f"epochs and batch_tokens are at least 1 and learning_rate above 0, not {epochs}, {batch_tokens} and "
            f"{learning_rate}",
            where=user_line(),
        )
    chosen, count, width = layers_of(model, layers), len(model.layers), residual_leaf(model).tail[-1]
    prepare_unembedding(model)
    head = _head(model, device)
    weights = [torch.zeros(width, width, device=device, requires_grad=True) for _ in chosen]
    biases = [torch.zeros(width, device=device, requires_grad=True) for _ in chosen]
    optimizer = torch.optim.AdamW([*weights, *biases], lr=learning_rate, weight_decay=weight_decay)
    for step, (share, rows) in enumerate(_batches(model, prompts, chosen, epochs, batch_tokens, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - share)
        residual = rows.to(device=device, dtype=torch.float32)
        with torch.no_grad():
            wanted = head(residual[:, -1]).log_softmax(-1)
        losses = []
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):  # one after another: memory
            hidden = residual[:, place]
            read = head(hidden + torch.nn.functional.linear(hidden, weight, bias)).log_softmax(-1)
            loss = (wanted.exp() * (wanted - read)).sum(-1).mean()
            loss.backward()
            losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
        if report is not None:
            report(step, losses)
    weight, bias = torch.zeros(count, width, width), torch.zeros(count, width)
    for number, own, shift in zip(chosen, weights, biases, strict=True):
        weight[number], bias[number] = own.detach().cpu(), shift.detach().cpu()
    return TunedLens(weight=weight, bias=bias, config=_config(model, count, width))


def lens_divergence(
    model: Model, prompts: Iterable[Any], lens: TunedLens | None = None, layers: Any = None, *, of: Of = "resid_post"
) -> DataArray:
    """How far what a lens reads is from what the model says: KL(model || lens) in nats, by layer.

    The mean over all positions of all prompts, combined on the service in float64. Without `lens` the logit lens.
    """
    numbers = layers_of(model, layers)
    prepare_unembedding(model)
    translate = as_tuned_lens(lens).translation(model, of) if lens is not None else None

    def body() -> dict[str, Any]:
        said = behind_head(model, model.lm_head.output).float().log_softmax(-1)
        apart = []
        for number in numbers:
            hidden = point_of(model.layers[number], of)
            read = unembed(model, translate(hidden, number) if translate else hidden).float().log_softmax(-1)
            apart.append((said.exp() * (said - read)).sum(-1))
        return {"apart": polytrace.mean(functions.stack(apart, -1), over="tokens")}

    return labelled(model.map(prompts, body).run()["apart"], {"layer": numbers}, name="kl")


def _batches(
    model: Model, prompts: Sequence[Any], layers: Sequence[int], epochs: int, batch_tokens: int, seed: int
) -> Iterator[tuple[float, Any]]:
    """Steps: the share of prompts that lies behind; rows `[tokens, layers + 1, features]`, the last one's output."""
    import torch

    def body() -> dict[str, Any]:
        residuals = [model.layers[number].resid_pre for number in layers]
        return {"residuals": functions.stack([*residuals, model.layers[-1].resid_post], 2)}

    waiting: list[Any] = []
    num_waiting = num_steps = 0
    for epoch in range(epochs):
        order = list(range(len(prompts)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        parts = model.map([prompts[place] for place in order], body)
        for number, rows in enumerate(row for part in parts for row in part.rows("residuals")):
            waiting.append(rows)
            num_waiting += len(rows)
            if num_waiting < batch_tokens:
                continue
            whole = torch.cat(waiting)
            share = (epoch + number / len(prompts)) / epochs
            for first in range(0, num_waiting - batch_tokens + 1, batch_tokens):
                yield share, whole[first : first + batch_tokens]
                num_steps += 1
            waiting = [whole[num_waiting - num_waiting % batch_tokens :]]
            num_waiting %= batch_tokens
    if num_steps == 0:  # fewer tokens than a step has
        yield 0.0, torch.cat(waiting)


def _config(model: Model, count: int, width: int) -> dict[str, Any]:
    """As the `tuned-lens` package writes it; no hash of the unembedding, which that package then does not compare."""
    return {
        "base_model_name_or_path": str(model.config.get("_name_or_path") or model.description.name),
        "d_model": width,
        "num_hidden_layers": count,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": None,
        "lens_type": "linear_tuned_lens",
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Head:
    """The client's own copy of what makes logits of residuals."""

    norm: FinalNorm
    weight: Any  # [features, vocabulary]
    bias: Any  # [vocabulary], or None
    model: Model

    def __call__(self, hidden: Any) -> Any:
        logits = self.norm(hidden) @ self.weight
        return behind_head(self.model, logits if self.bias is None else logits + self.bias)


def _head(model: Model, device: str) -> _Head:
    import torch

    norm = final_norm(model)
    vocabulary = model.description.vocab_size
    step = max(1, _CHUNK_BYTES // (4 * residual_leaf(model).tail[-1]))
    parts, bias = [], None
    for first in range(0, vocabulary, step):
        with model.base.trace([[0]]):
            parts.append(model.W_U[:, first : first + step].float().save())
            if first == 0 and "b_U" in model._index.own_parameters.get("", ()):
                bias = model.b_U.float().save()
    return _Head(
        norm=FinalNorm(
            gain=norm.gain.to(device),
            shift=norm.shift.to(device),
            is_centred=norm.is_centred,
            epsilon=norm.epsilon,
        ),
        weight=torch.cat(parts, 1).to(device),
        bias=None if bias is None else bias.to(device),
        model=model,
    )
