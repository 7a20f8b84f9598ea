"""Steering: vectors added to the residual, at any layers and positions, by any factors, always or behind a gate.

Turner et al., Steering Language Models With Activation Engineering (2023, arXiv:2308.10248); Rimsky et al., Steering
Llama 2 via Contrastive Activation Addition (2023, arXiv:2312.06681); gates: Lee et al., Programming Refusal with
Conditional Activation Steering (2024, arXiv:2409.05907). Where the vectors come from: `polytrace.methods.directions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.directions import Vectors
from polytrace.methods.gates import AnyGate, Gate
from polytrace.methods.imports import needs_torch
from polytrace.methods.labels import labelled
from polytrace.methods.places import (
    Layers,
    Positions,
    Prompts,
    check_stream,
    check_top_k,
    layers_of,
    prompts_of,
    token_ids,
)
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.edits.block import EditedModel
    from polytrace.model import Model

RESIDUAL = ("resid_pre", "resid_mid", "resid_post")  # in the order of the forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """What prompts are answered with: arrays over prompt x factor x rank, or x token where tokens were asked for."""

    probability: DataArray
    logit: DataArray  # of the model's forward, caps and scales included
    token: DataArray | None  # texts, most likely first; None where tokens were asked for
    token_id: DataArray | None
    rank: DataArray | None  # of the tokens that were asked for: 0 is the most likely one of the vocabulary
    receipt: Receipt


def steer(
    model: Model,
    prompts: Any,
    vectors: Any,
    layers: Layers = None,
    positions: Positions = None,
    factor: float | Sequence[float] = 1.0,
    *,
    of: str | None = None,
    gate: AnyGate | None = None,
    position: int = -1,
    top_k: int = 5,
    tokens: Any = None,
) -> Steered:
    """What the model says at a position of each prompt while `factor * vector` is added: a list of factors is a sweep.

    One request with an invoke for each factor; 0.0 is the model as it is. `vectors`: `[hidden]` for all layers,
    `[layers, hidden]` with one for each, `[layers, positions, hidden]`, or `Vectors`, which have their own layers,
    positions and point where none are given. `positions`: where it is added, counted in each prompt; None: at every
    token. `of`: what it is added to, "resid_pre", "resid_mid" or "resid_post" (the default). `gate`: a `Gate`, or a
    function that gives a value of the trace `[sequences]` or `[sequences, tokens]`, open where it is above 0. At
    `position` the `top_k` most likely next tokens come back, or chosen `tokens`.
    """
    torch = needs_torch("steer")
    factors = torch.as_tensor(factor, dtype=torch.float64).reshape(-1).tolist()
    if not factors:
        raise GraphError("factor is a number or a list of numbers, and this one is empty", where=user_line())
    plan = _plan(model, vectors, layers, positions, gate, of)
    batch, ids = prompts_of(model, prompts), None if tokens is None else token_ids(model, tokens)
    top_k = check_top_k(model, top_k) if ids is None else 0
    saved = []
    with model.trace() as tracer:
        for one in factors:
            with tracer.invoke(batch.ids):
                plan.add(model, one)
                logits = model.output.logits.at(position).float()
                spread = logits.softmax(-1)
                if ids is None:
                    values, found = spread.topk(top_k)
                    kept = (values, logits.gather(1, found), found.int())
                else:
                    ranks = [(logits > logits[:, token : token + 1]).sum(-1).int() for token in ids]
                    kept = (spread[:, ids], logits[:, ids], torch.stack(ranks, -1))
                saved.append([value.save() for value in kept])
    parts = [torch.stack(list(part), 1) for part in zip(*saved, strict=True)]
    return _steered(model, batch, factors, ids, parts, tracer.receipt)


def steering_edit(
    model: Model,
    vectors: Any,
    layers: Layers = None,
    positions: Positions = None,
    factor: float = 1.0,
    *,
    of: str | None = None,
    gate: AnyGate | None = None,
    name: str | None = None,
    shared: bool = False,
) -> EditedModel:
    """The model whose every trace is steered; the arguments are those of `steer`.

    With a name the edit is kept where the model is served: `model.trace(prompt, edits=[name])`.
    """
    needs_torch("steering_edit")
    plan = _plan(model, vectors, layers, positions, gate, of)
    with model.edit(name, shared=shared) as edited:
        plan.add(model, float(factor))
    return edited


def ablate_direction(
    model: Model,
    direction: Any,
    layers: Layers = None,
    *,
    of: str | Sequence[str] = ("resid_pre", "attention_added", "mlp_added"),
    name: str | None = None,
    shared: bool = False,
) -> EditedModel:
    """The model without a direction: `x - (x . r) r` wherever the residual is read and written.

    Arditi et al., Refusal in Language Models Is Mediated by a Single Direction (2024, arXiv:2406.11717).

    `direction`: `[hidden]`, or `[directions, hidden]` for all that they span; of any length. `of`: points with the
    residual's features.
    """
    torch = needs_torch("ablate_direction")
    given = torch.as_tensor(direction, dtype=torch.float32)
    rows = given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or rows.shape[1] != model.description.hidden_size or not bool(rows.norm(dim=1).min() > 0):
        told = f"a direction is [{model.description.hidden_size}] or several of these, none of them 0"
        raise GraphError(f"{told}, not {list(given.shape)}", where=user_line())
    basis_DK = torch.linalg.qr(rows.T).Q
    chosen, points = layers_of(model, layers), [of] if isinstance(of, str) else list(of)
    for point in points:
        check_stream(point)
    with model.edit(name, shared=shared) as edited:
        for number in chosen:
            for point in points:
                value = getattr(model.layers[number], point)
                value[:] = value - ((value.float() @ basis_DK) @ basis_DK.T)
    return edited


# --- what is added where


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Checked arguments."""

    vectors: Any  # [layers, hidden] or [layers, positions, hidden]
    layers: list[int]
    positions: Positions
    gate: AnyGate | None
    of: str

    def add(self, model: Model, factor: float) -> None:
        """Records the change in the open trace, or edit."""
        score = None
        if self.gate is not None:
            score = self.gate.score(model) - self.gate.threshold if isinstance(self.gate, Gate) else self.gate()
        for number, vector in zip(self.layers, self.vectors, strict=True):
            residual = getattr(model.layers[number], self.of)
            added = factor * vector
            if score is not None:
                added = added * _opened(score, self.positions, residual)
            rows = residual if self.positions is None else residual.at(self.positions)
            rows[:] = rows + added


def _opened(score: Any, positions: Positions, residual: Any) -> Any:
    """1.0 where the gate is open, shaped for the rows that are steered."""
    is_of_tokens = len(score.shape) == 2
    if not is_of_tokens and len(score.shape) != 1:
        told = f"a gate gives [sequences] or [sequences, tokens], not {list(score.shape)}"
        raise GraphError(told, where=user_line())
    is_open = (score > 0).float()
    if is_of_tokens and positions is not None:
        is_open = is_open.at(positions)
    elif not is_of_tokens and scalar(positions) is None:
        is_open = is_open[:, None]
    return is_open[..., None]


def _plan(
    model: Model, vectors: Any, layers: Layers, positions: Positions, gate: AnyGate | None, of: str | None
) -> _Plan:
    torch = needs_torch("steering")
    own: Any = vectors
    if isinstance(vectors, Vectors):
        chosen = list(vectors.layers) if layers is None else layers_of(model, layers)
        own = torch.stack([vectors[number] for number in chosen])
        positions = vectors.positions if positions is None else positions
        of = of or vectors.of
    else:
        chosen = layers_of(model, layers)
        own = _tensor(vectors)
    of = of or "resid_post"
    check_stream(of, RESIDUAL)
    hidden = model.description.hidden_size
    own = own.expand(len(chosen), hidden) if own.ndim == 1 and own.shape[0] == hidden else own
    shapes: set[tuple[int, ...]] = {(len(chosen), hidden)}
    if isinstance(positions, Sequence):
        shapes.add((len(chosen), len(positions), hidden))
    if tuple(own.shape) not in shapes:
        told = " or ".join(str(list(shape)) for shape in sorted(shapes, key=len))
        raise GraphError(
            f"vectors for {len(chosen)} layers are [{hidden}] or {told}, not {list(own.shape)}", where=user_line()
        )
    if isinstance(gate, Gate):
        _check_gate(model, gate, chosen, of)
    return _Plan(vectors=own.float(), layers=chosen, positions=positions, gate=gate, of=of)


def _tensor(vectors: Any) -> Any:
    torch = needs_torch("steering")
    try:
        return torch.as_tensor(vectors, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        told = f"vectors are a tensor or Vectors, not {type(vectors).__name__}"
        raise GraphError(told, where=user_line()) from error


def _check_gate(model: Model, gate: Gate, layers: Sequence[int], of: str) -> None:
    own = layers_of(model, gate.layer)[0]
    check_stream(gate.of, RESIDUAL)
    first = min(layers)
    if (own, RESIDUAL.index(gate.of)) > (first, RESIDUAL.index(of)):
        raise GraphError(
            f"the gate looks at {gate.of} of layer {own}, behind {of} of layer {first} that it "
            "decides about: look at an earlier layer",
            where=user_line(),
        )


# --- what comes back


def _steered(
    model: Model,
    batch: Prompts,
    factors: Sequence[float],
    ids: Sequence[int] | None,
    parts: Sequence[Any],
    receipt: Receipt,
) -> Steered:
    """Of values `[prompts, factors, rank or token]`."""
    import numpy as np

    last = {"rank": None} if ids is None else {"token": list(token_texts(model.tokenizer, ids))}
    dims: dict[str, Any] = {"prompt": None, "factor": factors, **last}

    def array(values: Any, name: str) -> DataArray:
        made = labelled(values, dims, name=name, prompts=batch.labels)
        return made if ids is None else made.assign_coords(token_id=("token", list(ids)))

    words = None
    if ids is None:
        words = np.array(token_texts(model.tokenizer, parts[2].flatten().tolist()), dtype=object)
    return Steered(
        probability=array(parts[0], "probability"),
        logit=array(parts[1], "logit"),
        token=None if words is None else array(words.reshape(parts[2].shape), "token"),
        token_id=None if ids is not None else array(parts[2], "token_id"),
        rank=None if ids is None else array(parts[2], "rank"),
        receipt=receipt,
    )
