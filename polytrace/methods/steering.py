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
from polytrace.methods.choices import Layers, Token, chosen_layers, needs_torch, texts_of, token_id
from polytrace.methods.directions import Vectors
from polytrace.methods.gates import AnyGate, Gate
from polytrace.methods.labels import labelled
from polytrace.methods.sublayers import find_sublayers, tensor_of

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.edits.block import EditedModel
    from polytrace.model import Model
    from polytrace.modules import Module

Positions = int | Sequence[int] | None
STREAM = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True, slots=True, kw_only=True)
class Steered:
    """What the prompts are answered with, for each factor."""

    top: DataArray  # [prompt, factor, rank] probabilities, with the coordinates "token" and "text"
    probabilities: DataArray  # [prompt, factor, token] of the tokens that were asked for
    logits: DataArray  # [prompt, factor, token] of these
    receipt: Receipt


def steer(
    model: Model,
    prompts: Any,
    vectors: Any,
    layers: Layers = None,
    positions: Positions = None,
    factor: float | Sequence[float] = 1.0,
    *,
    gate: AnyGate | None = None,
    site: str | None = None,
    tokens: Sequence[Token] = (),
    top_k: int = 5,
    position: int = -1,
) -> Steered:
    """What the model says at a position of each prompt while `factor * vector` is added: a list of factors is a sweep.

    One request with an invoke for each factor; 0.0 is the model as it is. `vectors`: `[hidden]` for all layers,
    `[layers, hidden]` with one for each, `[layers, positions, hidden]`, or `Vectors`, which have their own layers,
    positions and site where none are given. `positions`: where it is added, counted in each prompt; None: at every
    token. `gate`: a `Gate`, or a function that gives a value of the trace `[sequences]` or `[sequences, tokens]`, open
    where it is above 0. `site`: "resid_pre", "resid_mid" or "resid_post" (the default). `tokens`: whose probabilities
    are told.
    """
    torch = needs_torch("steer")
    factors = torch.as_tensor(factor, dtype=torch.float64).reshape(-1).tolist()
    if not factors:
        raise GraphError("factor is a number or a list of numbers, and this one is empty", where=user_line())
    plan = _plan(model, vectors, layers, positions, gate, site)
    ids = [token_id(model, one) for one in tokens]
    best, logits, likely = [], [], []
    with model.trace() as tracer:
        for one in factors:
            with tracer.invoke(prompts):
                plan.add(model, one)
                found = model.lm_head.output.at(position).float()
                spread = found.softmax(-1)
                top = spread.topk(top_k)
                best.append((top.values.save(), top.indices.save()))
                if ids:
                    logits.append(found[:, ids].save())
                    likely.append(spread[:, ids].save())
    return _steered(model, factors, ids, best, logits, likely, tracer.receipt)


def steering_edit(
    model: Model,
    vectors: Any,
    layers: Layers = None,
    positions: Positions = None,
    factor: float = 1.0,
    *,
    gate: AnyGate | None = None,
    site: str | None = None,
    name: str | None = None,
    shared: bool = False,
) -> EditedModel:
    """The model whose every trace is steered; the arguments are those of `steer`.

    With a name the edit is kept where the model is served: `model.trace(prompt, edits=[name])`.
    """
    needs_torch("steering_edit")
    plan = _plan(model, vectors, layers, positions, gate, site)
    with model.edit(name, shared=shared) as edited:
        plan.add(model, float(factor))
    return edited


def ablate_direction(
    model: Model,
    direction: Any,
    layers: Layers = None,
    sites: Sequence[str] = ("resid_pre", "attention", "mlp"),
    *,
    name: str | None = None,
    shared: bool = False,
) -> EditedModel:
    """The model without a direction: `x - (x . r) r` wherever the residual is read and written.

    Arditi et al., Refusal in Language Models Is Mediated by a Single Direction (2024, arXiv:2406.11717).

    `direction`: `[hidden]`, or `[directions, hidden]` for all that they span; of any length. `sites`: names of the
    residual ("resid_pre", "resid_mid", "resid_post"), "attention" and "mlp" for what these add to it (behind a norm of
    their own).
    """
    torch = needs_torch("ablate_direction")
    given = torch.as_tensor(direction, dtype=torch.float32)
    rows = given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or rows.shape[1] != model.description.hidden_size or not bool(rows.norm(dim=1).min() > 0):
        told = f"a direction is [{model.description.hidden_size}] or several of these, none of them 0"
        raise GraphError(f"{told}, not {list(given.shape)}", where=user_line())
    basis_DK = torch.linalg.qr(rows.T).Q
    chosen = chosen_layers(model, layers)
    with model.edit(name, shared=shared) as edited:
        for number in chosen:
            for site in sites:
                value = _written(model.layers[number], site)
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
    site: str

    def add(self, model: Model, factor: float) -> None:
        """Records the change in the open trace, or edit."""
        score = None
        if self.gate is not None:
            score = self.gate.score(model) - self.gate.threshold if isinstance(self.gate, Gate) else self.gate()
        for number, vector in zip(self.layers, self.vectors, strict=True):
            residual = getattr(model.layers[number], self.site)
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
    elif not is_of_tokens and (positions is None or not isinstance(positions, int)):
        is_open = is_open[:, None]
    return is_open[..., None]


def _plan(
    model: Model, vectors: Any, layers: Layers, positions: Positions, gate: AnyGate | None, site: str | None
) -> _Plan:
    torch = needs_torch("steering")
    own: Any = vectors
    if isinstance(vectors, Vectors):
        chosen = list(vectors.layers) if layers is None else chosen_layers(model, layers)
        own = torch.stack([vectors[number] for number in chosen])
        positions = vectors.positions if positions is None else positions
        site = site or vectors.site
    else:
        chosen = chosen_layers(model, layers)
        own = torch.as_tensor(vectors, dtype=torch.float32)
    site = site or "resid_post"
    _check_site(site)
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
        _check_gate(model, gate, chosen, site)
    return _Plan(vectors=own.float(), layers=chosen, positions=positions, gate=gate, site=site)


def _check_gate(model: Model, gate: Gate, layers: Sequence[int], site: str) -> None:
    own = chosen_layers(model, gate.layer)[0]
    _check_site(gate.site)
    first = min(layers)
    if (own, STREAM.index(gate.site)) > (first, STREAM.index(site)):
        raise GraphError(
            f"the gate looks at {gate.site} of layer {own}, behind {site} of layer {first} that it "
            "decides about: look at an earlier layer",
            where=user_line(),
        )


def _written(layer: Module, site: str) -> Any:
    if site in STREAM:
        return getattr(layer, site)
    if site not in ("attention", "mlp"):
        raise GraphError(
            f"a site is one of {', '.join((*STREAM, 'attention', 'mlp'))}, not {site!r}", where=user_line()
        )
    return tensor_of(find_sublayers(layer).adding()[site].output)


def _check_site(site: str) -> None:
    if site not in STREAM:
        raise GraphError(f"a site of the residual is one of {', '.join(STREAM)}, not {site!r}", where=user_line())


# --- what comes back


def _steered(
    model: Model,
    factors: Sequence[float],
    ids: Sequence[int],
    best: Sequence[tuple[Any, Any]],
    logits: Sequence[Any],
    likely: Sequence[Any],
    receipt: Receipt,
) -> Steered:
    import numpy as np

    torch = needs_torch("steer")
    values, indices = (torch.stack(list(one), 1) for one in zip(*best, strict=True))
    words = {token: text for token in set(indices.flatten().tolist()) for text in texts_of(model, [token])}
    texts = np.vectorize(words.__getitem__, otypes=[object])(indices.numpy())
    dims = ("prompt", "factor", "rank")
    top = labelled(values, {"prompt": None, "factor": factors, "rank": None}, name="probability")
    empty = torch.zeros(values.shape[0], len(factors), 0)
    told = [
        labelled(
            torch.stack(list(rows), 1) if rows else empty,
            {"prompt": None, "factor": factors, "token": list(ids)},
            name=name,
            tokens={"token": texts_of(model, ids)},
        )
        for name, rows in (("probability", likely), ("logit", logits))
    ]
    return Steered(
        top=top.assign_coords(token=(dims, indices.numpy()), text=(dims, texts)),
        probabilities=told[0],
        logits=told[1],
        receipt=receipt,
    )
