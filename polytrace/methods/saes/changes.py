"""Changes by an SAE as edits, for any trace: its reconstruction spliced in, features ablated, features steered.

Templeton et al., *Scaling Monosemanticity* (2024), for steering by clamped features; Marks et al., *Sparse Feature
Circuits* (2024, arXiv:2403.19647), for the error term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.imports import needs_torch
from polytrace.methods.saes.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from polytrace.edits.block import EditedModel
    from polytrace.model import Model

Positions = int | Sequence[int] | None
MODES = ("add", "set", "scale")


def splice_sae(
    model: Model,
    sae: SparseAutoencoder,
    *,
    error: bool = False,
    change: Callable[[Any], Any] | None = None,
    positions: Positions = None,
    name: str | None = None,
    shared: bool = False,
) -> EditedModel:
    """The model in which an activation is its reconstruction; a transcoder stands in for what it was trained to give.

    `error=True` adds what the reconstruction of the unchanged features lacks, so that without a `change` nothing but
    rounding is different. `change`: a function of the recorded features `[sequences, tokens, F]` that returns others.
    `positions`: where, counted in each prompt; None: at every token. With a `name` the edit is kept where the model is
    served, as `model.edit` does.
    """
    with model.edit(name, shared=shared) as edited:
        put_spliced(model, sae, error=error, change=change, positions=positions)
    return edited


def ablate_features(
    model: Model,
    sae: SparseAutoencoder,
    features: Sequence[int] | int,
    *,
    error: bool = True,
    positions: Positions = None,
    name: str | None = None,
    shared: bool = False,
) -> EditedModel:
    """The model without what some features add: they are 0. The other arguments are those of `steer_features`."""
    return steer_features(
        model, sae, features, 0.0, mode="set", error=error, positions=positions, name=name, shared=shared
    )


def steer_features(
    model: Model,
    sae: SparseAutoencoder,
    features: Sequence[int] | int,
    values: float | Sequence[float],
    *,
    mode: str = "set",
    error: bool = True,
    positions: Positions = None,
    name: str | None = None,
    shared: bool = False,
) -> EditedModel:
    """The model in which some features have other activations, by `values`, one for all or one each.

    `mode`: "set" them, "add" to them, whether they are active or not, or "scale" them. With `error=True` the activation
    changes by the difference alone, and of the weights only these features' rows and columns are used and sent ("topk"
    needs all columns to encode); without, all of it is the reconstruction of the changed features. Of an SAE that norms
    its input a value is in the norm's units.
    """
    numbers = sae.numbers(features)
    torch = needs_torch("steer_features")
    given = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
    if mode not in MODES or len(given) not in (1, len(numbers)):
        told = f"mode is one of {', '.join(MODES)}, with a value or {len(numbers)} of them"
        raise GraphError(f"{told}, not {mode!r} with {len(given)}", where=user_line())
    own = given.expand(len(numbers)).to(sae.W_enc.dtype).contiguous()

    def moved(active: Any) -> Any:
        if mode == "add":
            return active + own
        return active * own if mode == "scale" else active * 0 + own

    def of_all(active: Any) -> Any:
        active = active.clone()
        active[..., numbers] = moved(active[..., numbers])
        return active

    with model.edit(name, shared=shared) as edited:
        if not error:
            put_spliced(model, sae, error=False, change=of_all, positions=positions)
        else:
            taken, given_at = (_rows(one, positions) for one in (sae.taken(model), sae.given(model)))
            change = own
            if mode != "add":  # which needs no encoder
                active = sae.encode(taken, numbers)
                change = moved(active) - active
            given_at[:] = given_at + sae.difference(change, numbers, taken)
    return edited


def put_spliced(
    model: Model,
    sae: SparseAutoencoder,
    *,
    error: bool = False,
    change: Callable[[Any], Any] | None = None,
    positions: Positions = None,
) -> None:
    """Records the splice in the open trace, or edit."""
    taken = _rows(sae.taken(model), positions)
    given = _rows(sae.given(model), positions)
    features = sae.encode(taken)
    own = sae.decode(features if change is None else change(features), like=taken)
    given[:] = own + (given - sae.decode(features, like=taken)) if error else own


def _rows(value: Any, positions: Positions) -> Any:
    return value if positions is None else value.at(positions)
