"""Ablation: what is the model worth without one part of it?

A part says nothing (zero), what it says on average (mean), or what it says of another prompt (resample). Olsson et al.,
"In-context Learning and Induction Heads" (2022, arXiv:2209.11895); Wang et al. (2022, arXiv:2211.00593), for means over
a dataset; Chan et al., "Causal Scrubbing" (2022), for resampling.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polytrace
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Part, parts_of, places_in
from polytrace.methods.metrics import Metric, Run, as_metric, logits_for, measure
from polytrace.methods.places import Prompts, heads_of, layers_of, prompts_of, value_of
from polytrace.methods.sweeps import Scale, Sweep, cell, collect

if TYPE_CHECKING:
    from polytrace.model import Model
    from polytrace.tracing import Tracer

PARTS = {"head": "z", "neuron": "mlp_post", "attention": "attention", "mlp": "mlp", "layer": "resid_post"}
_METHODS = ("zero", "mean", "resample")
_OVER = ("all", "prompts", "tokens")


def ablate(
    model: Model,
    prompts: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    of: str = "head",
    method: str = "mean",
    over: str = "all",
    reference: Any = None,
    layers: Any = None,
    units: Any = None,
    positions: Any = None,
    seed: int = 0,
) -> Sweep:
    """One part of the model at a time is replaced: `effect` [layer, head], [layer, neuron] or [layer].

    `of`: "head" (its z), "neuron" (its place in mlp_post; name some by `units`), "attention" or "mlp" (what they give),
    "layer" (all that it adds to the residual). `method`: "zero"; "mean", by default over all tokens of all prompts, or
    with `over="prompts"` at each position over prompts of equal length, with `over="tokens"` over each prompt's own;
    "resample", from other prompts at the same positions. `reference`: prompts that means are taken over, for
    `over="all"` any number of them (`model.map`, in requests of their own), or for "resample" one for each prompt, of
    its length; without it the prompts themselves, for "resample" in an order drawn from `seed` in which none stays at
    its place. `positions`:
    where the part is replaced, all at once; None is every token.

    `effect` is the change of the metric against the unchanged run.
    """
    if of not in PARTS or method not in _METHODS or over not in _OVER:
        raise GraphError(
            f"of is {', '.join(PARTS)}, method {', '.join(_METHODS)}, over {', '.join(_OVER)}; not {of!r}, {method!r}, "
            f"{over!r}",
            where=user_line(),
        )
    has_units = of in ("head", "neuron")
    if units is not None and not has_units:
        raise GraphError(f"units are heads or neurons, and of={of!r} has none: leave them out", where=user_line())
    if reference is not None and method == "zero":
        raise GraphError("method='zero' takes nothing from a reference: leave it out", where=user_line())
    batch, measured, numbers = prompts_of(model, prompts), as_metric(metric), layers_of(model, layers)
    places = places_in(model, batch, positions)
    others = _others(model, batch, method, over, reference, seed)
    pairs = [(part, part) for part in parts_of(batch.lengths, places)]
    given: Mapping[int, Any] = {}
    if method == "mean" and over == "all" and reference is not None:
        given = _means_of(model, reference, numbers, of)
    cells: dict[tuple[int, ...], Any] = {}
    with model.trace() as tracer:
        with tracer.invoke(batch.ids):
            clean = measure(measured, Run(model, batch)).save()
            logits = logits_for(measured, model)
            counts = {number: _count(model, number, of) for number in numbers}
        if method != "zero" and not given:
            with tracer.invoke(others.ids):
                said = {number: said_by(model, number, of) for number in numbers}
                given = said if method == "resample" else {n: _mean(tracer, v, others, over) for n, v in said.items()}
        chosen: list[int | None] = [*heads_of(max(counts.values()), units)] if has_units else [None]
        for row, number in enumerate(numbers):
            for place, unit in enumerate(chosen):
                if unit is None or unit < counts[number]:
                    with tracer.invoke(batch.ids):
                        _replace(model, number, of, method, given.get(number), pairs, unit)
                        spot = (row, place) if has_units else (row,)
                        cells[spot] = measure(measured, Run(model, batch, logits)).save()
    dims: dict[str, Sequence[Any]] = {"layer": numbers}
    return collect(
        cells,
        {**dims, of: chosen} if has_units else dims,
        batch,
        name=measured.name,
        scale=Scale.CHANGE,
        receipt=tracer.receipt,
        clean=clean,
    )


def said_by(model: Model, number: int, of: str) -> Any:
    """What a part of the model says, every head or neuron of it: `[prompts, tokens, ...]`."""
    value = value_of(model, number, PARTS[of])
    return value - value_of(model, number, "resid_pre") if of == "layer" else value


def _count(model: Model, number: int, of: str) -> int:
    """How many heads or neurons there are, in the open invoke."""
    return int(value_of(model, number, PARTS[of]).shape[2]) if of in ("head", "neuron") else 1


def _replace(
    model: Model, number: int, of: str, method: str, given: Any, pairs: Sequence[tuple[Part, Part]], unit: int | None
) -> None:
    """The edit of the open invoke."""
    point = PARTS[of]
    target = value_of(model, number, point)
    before = value_of(model, number, "resid_pre") if of == "layer" else None
    for part, theirs in pairs:
        spot = cell(point, part, unit)
        told = 0.0 if method == "zero" else _replacement(given, method, theirs, point, unit)
        target[spot] = told if before is None else before[spot] + told


def _replacement(given: Any, method: str, part: Part, point: str, unit: int | None) -> Any:
    """What is said instead, in the shape of the part or one that is spread over it."""
    if method == "resample":
        return given[cell(point, part, unit)]
    rows, columns = part
    if given.shape[0] == 1:
        rows = slice(None) if isinstance(rows, slice) else 0
    return given[cell(point, (rows, slice(0, 1) if given.shape[1] == 1 else columns), unit)]


def _mean(tracer: Tracer, value: Any, batch: Prompts, over: str) -> Any:
    """Of the open invoke's tokens, pads left out: `[1 or prompts, 1 or tokens, ...]`."""
    if over == "prompts":
        return value.mean(0, keepdim=True)
    dims = (0, 1) if over == "all" else (1,)
    if not batch.are_ragged:
        return value.mean(dims, keepdim=True)
    mask = tracer.mask.reshape(*value.shape[:2], *[1] * (len(value.shape) - 2))
    return (value * mask).sum(dims, keepdim=True) / mask.sum(dims, keepdim=True)


def _means_of(model: Model, reference: Any, layers: Sequence[int], of: str) -> dict[int, Any]:
    """Means over all tokens of any number of other prompts, in requests of their own: as `_mean` gives them."""

    def body() -> dict[str, Any]:
        return {str(number): polytrace.mean(said_by(model, number, of), over="tokens") for number in layers}

    mapping = model.map([reference] if isinstance(reference, str) else reference, body)
    for _ in mapping:
        pass
    if not mapping.results:
        raise GraphError("there are no prompts in reference=", where=user_line())
    return {number: mapping.results[str(number)][None, None] for number in layers}


def _others(model: Model, batch: Prompts, method: str, over: str, reference: Any, seed: int) -> Prompts:
    """The prompts that are read for what is said instead, in one view."""
    if method == "mean" and over == "prompts":
        others = batch if reference is None else prompts_of(model, reference)
        if len({*others.lengths, *batch.lengths}) > 1:
            raise GraphError(
                f"prompts of {', '.join(map(str, sorted({*others.lengths, *batch.lengths})))} tokens have no mean at "
                "each position: over='all', or prompts of equal length",
                where=user_line(),
            )
        return others
    if method == "mean" and over == "tokens" and reference is not None:
        raise GraphError("a mean over each prompt's own tokens takes no reference", where=user_line())
    if method != "resample":
        return batch
    if reference is not None:
        others = prompts_of(model, reference)
        if others.lengths != batch.lengths:
            raise GraphError(
                f"resampling takes one other prompt for each, of its length: {len(others)} of {others.lengths} tokens "
                f"for {len(batch)} of {batch.lengths}",
                where=user_line(),
            )
        return others
    rng, order = random.Random(seed), list(range(len(batch)))
    for length in sorted(set(batch.lengths)):
        alike = [prompt for prompt, own in enumerate(batch.lengths) if own == length]
        if len(alike) == 1:
            raise GraphError(
                f"prompt {alike[0]} is the only one of {length} tokens, so there is none to resample from: give "
                "reference= one other prompt for each, of its length",
                where=user_line(),
            )
        shuffled = alike[:]
        rng.shuffle(shuffled)
        for one, other in zip(shuffled, [*shuffled[1:], shuffled[0]], strict=True):  # one circle: none stays
            order[one] = other
    return batch[order]
