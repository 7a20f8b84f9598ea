"""Activation patching: a value of one run is put into another, and a metric tells how much of the answer came with it.

Vig et al., "Investigating Gender Bias in Language Models Using Causal Mediation Analysis" (2020, arXiv:2004.12265);
Meng et al. (2022, arXiv:2202.05262); Heimersheim and Nanda, "How to use and interpret activation patching" (2024,
arXiv:2404.15255). All runs are invokes of one trace, so rows that are equal run once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Part, Places, absent_in, axis_of, paired_parts, places_in, texts_at
from polytrace.methods.metrics import Metric, Run, as_metric, logits_for, measure
from polytrace.methods.places import GIVEN, OF_LAYERS, Prompts, heads_of, layers_of, prompts_of, value_of
from polytrace.methods.sweeps import Scale, Sweep, collect, copy_parts
from polytrace.points import DIMS

if TYPE_CHECKING:
    from polytrace.model import Model
    from polytrace.tracing import Tracer

T = TypeVar("T")

DIRECTIONS = ("denoise", "noise")
_STREAMS = (*GIVEN, *(name for name in OF_LAYERS if DIMS[name][1] == "token" and name != "router"))
_NOT_PATCHED = {"head_out", "keys", "values"}
_OF_HEADS = tuple(name for name, dims in DIMS.items() if "head" in dims and name not in _NOT_PATCHED)


def patch_activations(
    model: Model,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    of: str = "resid_pre",
    layers: Any = None,
    positions: Any = None,
    direction: str = "denoise",
    normalise: bool = True,
) -> Sweep:
    """One value at a time, at every layer and position, moved from one run to the other: `effect` [layer, position].

    `clean`, `corrupt`: prompts, or equally many of each, pair by pair. `metric`: of the last token's logits
    (`polytrace.methods.metrics`). `of`: a point with a row for each token (resid_pre, resid_mid, resid_post, q, k, v,
    z, mlp_post, ...), all heads of it, or what "attention" or "mlp" give. `direction`: "denoise" puts a value of the
    clean run into the corrupt one, and asks what suffices; "noise" puts one of the corrupt run into the clean one, and
    asks what is needed. `normalise`: 0 is the corrupt run's metric and 1 the clean one's, whatever the direction; else
    the metric itself.

    `positions`: None is each token, a list a step each, a dict names steps, `{"subject": "Eiffel Tower", "last": -1}`:
    a text or positions, or a list of these for each pair. Texts are looked for in the clean prompt; in the corrupt one
    the same tokens are meant, or, where it is of another length, it is looked for again.

    Raises GraphError where pairs differ in length and positions would not be the same tokens.
    """
    clean_batch, corrupt_batch = pairs_of(model, clean, corrupt)
    is_aligned = clean_batch.lengths == corrupt_batch.lengths
    base, giver = sides(direction, clean_batch, corrupt_batch)
    if of not in _STREAMS:
        raise GraphError(f"{of!r} has no row for each token; these have: {', '.join(_STREAMS)}", where=user_line())
    numbers, axis, measured = layers_of(model, layers), axis_of(clean_batch, positions), as_metric(metric)
    if positions is None:
        check_lengths(clean_batch, corrupt_batch)
    visited = [axis.places(model, clean_batch, step) for step in range(len(axis.labels))]
    steps = []
    for step, places in enumerate(visited):
        others = places if is_aligned else axis.places(model, corrupt_batch, step)
        steps.append(copies(direction, clean_batch, places, corrupt_batch, others))
    cells: dict[tuple[int, ...], Any] = {}
    with model.trace() as tracer:
        ends = record_ends(tracer, model, clean_batch, corrupt_batch, measured)
        values = record_values(tracer, model, giver, numbers, of)
        for row, number in enumerate(numbers):
            for step, pairs in enumerate(steps):
                if pairs:
                    with tracer.invoke(base.ids):
                        copy_parts(value_of(model, number, of), values[number], of, pairs)
                        cells[row, step] = measure(measured, Run(model, base, ends.reference)).save()
    return collect(
        cells,
        {"layer": numbers, "position": axis.labels},
        clean_batch,
        name=measured.name,
        scale=scale_of(direction, normalise),
        receipt=tracer.receipt,
        clean=ends.clean,
        corrupt=ends.corrupt,
        tokens={"position": texts_at(model, clean_batch, axis)},
        absent=absent_in(visited),
    )


def patch_heads(
    model: Model,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    of: str = "z",
    layers: Any = None,
    heads: Any = None,
    positions: Any = None,
    direction: str = "denoise",
    normalise: bool = True,
) -> Sweep:
    """One head at a time moved from one run to the other: `effect` [layer, head].

    `of`: what the head found (z), where it looks (pattern, scores; `positions` are queries then), or what it takes (q,
    k, v, q_rot, k_rot). Of k and v, heads are key/value heads: several query heads may share one. `positions`: the
    tokens at which it is moved, all at once: None is all, or an int, several, a text, or a list of these for each pair.
    The rest is as in `patch_activations`. Layers with fewer heads have NaN.
    """
    clean_batch, corrupt_batch = pairs_of(model, clean, corrupt)
    is_aligned = clean_batch.lengths == corrupt_batch.lengths
    base, giver = sides(direction, clean_batch, corrupt_batch)
    if of not in _OF_HEADS:
        raise GraphError(f"{of!r} is of no head; these are: {', '.join(_OF_HEADS)}", where=user_line())
    numbers, measured = layers_of(model, layers), as_metric(metric)
    if positions is None or "key" in DIMS[of]:
        check_lengths(clean_batch, corrupt_batch)
    places = places_in(model, clean_batch, positions)
    others = places if is_aligned else places_in(model, corrupt_batch, positions)
    pairs = copies(direction, clean_batch, places, corrupt_batch, others)
    cells: dict[tuple[int, ...], Any] = {}
    with model.trace() as tracer:
        ends = record_ends(tracer, model, clean_batch, corrupt_batch, measured)
        values = record_values(tracer, model, giver, numbers, of)
        counts = {number: int(values[number].shape[DIMS[of].index("head")]) for number in numbers}
        chosen = heads_of(max(counts.values()), heads)
        for row, number in enumerate(numbers):
            for place, head in enumerate(chosen):
                if head < counts[number]:
                    with tracer.invoke(base.ids):
                        copy_parts(value_of(model, number, of), values[number], of, pairs, head)
                        cells[row, place] = measure(measured, Run(model, base, ends.reference)).save()
    return collect(
        cells,
        {"layer": numbers, "head": chosen},
        clean_batch,
        name=measured.name,
        scale=scale_of(direction, normalise),
        receipt=tracer.receipt,
        clean=ends.clean,
        corrupt=ends.corrupt,
    )


class Ends(NamedTuple):
    """The runs that others are measured by: the metric in both, saved, and the clean run's logits."""

    clean: Any
    corrupt: Any
    reference: Any


def record_ends(tracer: Tracer, model: Model, clean: Prompts, corrupt: Prompts, metric: Metric) -> Ends:
    """Two invokes."""
    with tracer.invoke(clean.ids):
        reference = logits_for(metric, model)
        best = measure(metric, Run(model, clean)).save()
    with tracer.invoke(corrupt.ids):
        least = measure(metric, Run(model, corrupt, reference)).save()
    return Ends(best, least, reference)


def record_values(tracer: Tracer, model: Model, batch: Prompts, layers: Sequence[int], of: str) -> dict[int, Any]:
    """What a point has in an unchanged run, by layer."""
    with tracer.invoke(batch.ids):
        return {number: value_of(model, number, of) for number in layers}


def pairs_of(
    model: Model, clean: Any, corrupt: Any, names: tuple[str, str] = ("clean", "corrupt")
) -> tuple[Prompts, Prompts]:
    """Two batches of as many prompts. Raises GraphError else, in which they are called so."""
    one, other = prompts_of(model, clean), prompts_of(model, corrupt)
    if len(one) != len(other):
        raise GraphError(
            f"{len(one)} {names[0]} prompts and {len(other)} {names[1]} ones: they are pairs, so give as many",
            where=user_line(),
        )
    return one, other


def check_lengths(clean: Prompts, corrupt: Prompts, names: tuple[str, str] = ("clean", "corrupt")) -> None:
    """Raises GraphError for a pair whose positions are not the same tokens."""
    for prompt, (one, other) in enumerate(zip(clean.lengths, corrupt.lengths, strict=True)):
        if one != other:
            raise GraphError(
                f"pair {prompt} has {one} tokens in the {names[0]} prompt and {other} in the {names[1]} one, so "
                "positions do not mean the same in both: give prompts of equal length, or positions such as -1 or a "
                "text",
                where=user_line(),
            )


def sides(direction: str, clean: T, corrupt: T) -> tuple[T, T]:
    """Of the run that is changed, and of the one that gives."""
    if direction not in DIRECTIONS:
        raise GraphError(f"the direction is 'denoise' or 'noise', not {direction!r}", where=user_line())
    return (corrupt, clean) if direction == "denoise" else (clean, corrupt)


def scale_of(direction: str, normalise: bool) -> Scale:
    """Of the effects of patches."""
    if not normalise:
        return Scale.VALUE
    return Scale.RESTORED if direction == "denoise" else Scale.KEPT


def copies(direction: str, clean: Prompts, places: Places, corrupt: Prompts, others: Places) -> list[tuple[Part, Part]]:
    """Parts of the run that is changed, beside those of the run that gives."""
    pairs = paired_parts(clean, places, corrupt, others)
    return [(two, one) for one, two in pairs] if direction == "denoise" else pairs
