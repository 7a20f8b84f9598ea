"""Attribution patching: what every patch would do, by one gradient instead of a run for each.

A patch puts `given` in the place of `value`; to first order the metric then changes by `(given - value) . gradient`,
with the metric's gradient at `value` in the run that would be changed. Two forwards and one backward estimate all
layers, positions, heads and neurons. Nanda, "Attribution Patching: Activation Patching At Industrial Scale" (2023);
Syed et al. (2023, arXiv:2310.10348). Kramár et al. (2024, arXiv:2403.00745) say where the estimate fails: at scores
that a softmax has saturated, and in early layers, whose values the rest of the model does not take linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Part, Places, axis_of, places_in, texts_at
from polytrace.methods.metrics import Metric, Run, as_metric, logits_for, measure
from polytrace.methods.patching import check_lengths, copies, pairs_of, scale_of, sides
from polytrace.methods.places import GIVEN, OF_LAYERS, Prompts, heads_of, layers_of, value_of
from polytrace.methods.sweeps import Sweep, cell, numbers_of, sweep_of
from polytrace.points import DIMS

if TYPE_CHECKING:
    from polytrace.model import Model

_Pairs = Sequence[tuple[Part, Part]]  # of one step: the part that is changed, the part that gives
_ALL: Part = (slice(None), slice(None))
_POSITIONS = ("token", "query")  # dimensions of points that positions are of
_UNITS = ("head", "neuron")


def attribution_patching(
    model: Model,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    of: str = "resid_pre",
    by: str | Sequence[str] | None = None,
    layers: Any = None,
    heads: Any = None,
    positions: Any = None,
    direction: str = "denoise",
    normalise: bool = True,
) -> Sweep:
    """The first-order estimate of what `patch_activations` and `patch_heads` measure, of all places in one request.

    `of`: a named point with a row for each token, or what "attention" or "mlp" give. `by`: what is moved alone:
    "position" as in `patch_activations`, `effect` [layer, position]; "head" as in `patch_heads`, [layer, head], or
    "neuron" (of mlp_pre, mlp_post), [layer, neuron], both at all `positions` at once; ("position", "head"), [layer,
    position, head]. By default heads or neurons where `of` has them, else positions. `heads`: which of the heads, or of
    the neurons. All else is as there, and so is the result: 0 is the corrupt run's metric and 1 the clean one's, or
    with `normalise=False` the metric itself, as it is estimated.

    The gradient is that of the run which a patch changes: the corrupt one to "denoise". `divergence()` is least in the
    clean run, so that to "noise" its estimate is 0 everywhere.
    """
    clean_batch, corrupt_batch = pairs_of(model, clean, corrupt)
    base, _ = sides(direction, clean_batch, corrupt_batch)
    kept = _kept(of, by)
    numbers, measured = layers_of(model, layers), as_metric(metric)
    is_aligned = clean_batch.lengths == corrupt_batch.lengths
    if positions is None or "key" in dims_of(of):
        check_lengths(clean_batch, corrupt_batch)
    axis = axis_of(clean_batch, positions) if "position" in kept else None

    def visited(batch: Prompts) -> list[Places]:
        if axis is None:
            return [places_in(model, batch, positions)]
        return [axis.places(model, batch, step) for step in range(len(axis.labels))]

    places = visited(clean_batch)
    others = places if is_aligned else visited(corrupt_batch)
    steps = [copies(direction, clean_batch, one, corrupt_batch, two) for one, two in zip(places, others, strict=True)]
    with model.trace() as tracer:
        with tracer.invoke(clean_batch.ids):
            reference = logits_for(measured, model)
            best = measure(measured, Run(model, clean_batch))
            clean_values, clean_mask = {number: value_of(model, number, of) for number in numbers}, tracer.mask
        with tracer.invoke(corrupt_batch.ids):
            least = measure(measured, Run(model, corrupt_batch, reference.detach()))
            corrupt_values, corrupt_mask = {number: value_of(model, number, of) for number in numbers}, tracer.mask
        own_side, other_side = (best, clean_values, clean_mask), (least, corrupt_values, corrupt_mask)
        (start, values, mask), (_, given, _) = sides(direction, own_side, other_side)
        with start.sum().backward():
            mask = mask if base.are_ragged else None
            found = [_Changes(of, kept, values[number], given[number], mask) for number in numbers]
            for own in found:
                if axis is not None and is_aligned:
                    own.save_tokens()
                else:
                    own.save_steps(steps)
        best, least = best.save(), least.save()
    start, _ = sides(direction, best, least)
    labels: dict[str, Sequence[Any]] = {"layer": numbers}
    array = _stacked(found, base, places, has_axis=axis is not None)
    if axis is not None:
        labels["position"] = axis.labels
    if found[0].unit is not None:
        labels[found[0].unit] = heads_of(array.shape[-1], heads)
        array = array[..., labels[found[0].unit]]
    array = array.reshape(len(base), *map(len, labels.values()))
    return sweep_of(
        array + numbers_of(start, base).reshape(-1, *[1] * len(labels)),
        labels,
        clean_batch,
        name=measured.name,
        scale=scale_of(direction, normalise),
        receipt=tracer.receipt,
        clean=best,
        corrupt=least,
        tokens=None if axis is None else {"position": texts_at(model, clean_batch, axis)},
    )


class _Changes:
    """Of one layer: what each patch would change of each prompt's metric, in the open backward."""

    def __init__(self, of: str, kept: Sequence[str], value: Any, given: Any, mask: Any) -> None:
        self.of, self.value, self.given, self.gradient = of, value, given, value.grad.float()
        self.dims = dims_of(of)
        if mask is not None:  # pads of ragged prompts are 0 anyway; so it is known that a sum counts none
            rows = next(place for place, dim in enumerate(self.dims) if dim in _POSITIONS)
            shape = [1] * (rows - 1) + [mask.shape[1]] + [1] * (len(self.dims) - rows - 1)
            self.gradient = self.gradient * mask.reshape(mask.shape[0], *shape).float()
        self.kept = {dim for dim in self.dims if dim in kept or ("position" in kept and dim in _POSITIONS)}
        self.unit = next((dim for dim in _UNITS if dim in self.kept), None)
        self.tokens: Any = None  # [prompts, longest, units]: of each token, pads too
        self.steps: list[list[tuple[int | slice, Any]]] = []  # by step: prompts, and [prompts, units] or [units]

    def save_tokens(self) -> None:
        whole = self._products(_ALL, _ALL).sum(self._lost(self.dims, self.kept))
        order = [dim for dim in self.dims if dim in self.kept]
        if order and order[0] in _UNITS:  # of patterns heads come first
            whole = whole.transpose(1, 2)
        self.tokens = whole.save()

    def save_steps(self, steps: Sequence[_Pairs]) -> None:
        kept = self.kept - {*_POSITIONS}
        for pairs in steps:
            self.steps.append([])
            for ours, theirs in pairs:
                dims = self.dims[1:] if isinstance(ours[0], int) else self.dims
                self.steps[-1].append((ours[0], self._products(ours, theirs).sum(self._lost(dims, kept)).save()))

    def _products(self, ours: Part, theirs: Part) -> Any:
        given, value = self.given[cell(self.of, theirs)].float(), self.value[cell(self.of, ours)].float()
        difference = given - value
        if self.of == "scores":  # masked keys have -inf in both runs
            difference = difference.masked_fill(given == value, 0.0)
        return difference * self.gradient[cell(self.of, ours)]

    @staticmethod
    def _lost(dims: Sequence[str], kept: Collection[str]) -> list[int]:
        return [place for place, dim in enumerate(dims) if dim != "sequence" and dim not in kept]


def dims_of(of: str) -> tuple[str, ...]:
    """Of what is read of a layer. Raises GraphError for what has no row for each token."""
    point = GIVEN.get(of, of)
    if point not in OF_LAYERS or point == "router":
        known = ", ".join((*GIVEN, *(name for name in OF_LAYERS if name != "router")))
        raise GraphError(f"{of!r} has no row for each token; these have: {known}", where=user_line())
    return DIMS[point]


def _kept(of: str, by: str | Sequence[str] | None) -> tuple[str, ...]:
    """What is moved alone."""
    dims = dims_of(of)
    unit = next((dim for dim in _UNITS if dim in dims), None)
    known = [("position",), *([(unit,), ("position", unit)] if unit is not None else [])]
    if by is None:
        return known[min(1, len(known) - 1)]
    given = (by,) if isinstance(by, str) else tuple(by)
    for one in known:
        if set(given) == set(one) and len(given) == len(one):
            return one
    told = ", ".join(repr(one[0] if len(one) == 1 else one) for one in known)
    raise GraphError(f"patches of {of!r} are by {told}, not {by!r}", where=user_line())


def _stacked(found: Sequence[_Changes], base: Prompts, places: Sequence[Places], *, has_axis: bool) -> Any:
    """Changes `[prompts, layers, steps, units]`, float64; NaN where a layer has no such unit or a prompt no token."""
    import numpy as np

    layers = [_steps_of(own, base, places, np.nan if has_axis else 0.0) for own in found]
    array = np.full((len(base), len(found), len(places), max(own.shape[-1] for own in layers)), np.nan)
    for row, own in enumerate(layers):
        array[:, row, :, : own.shape[-1]] = own
    return array


def _steps_of(own: _Changes, base: Prompts, places: Sequence[Places], nothing: float) -> Any:
    """`[prompts, steps, units]` of a layer."""
    import numpy as np

    if own.tokens is not None:
        tokens = np.array(own.tokens.tolist(), dtype=float).reshape(len(base), base.longest, -1)
        array = np.full((len(base), len(places), tokens.shape[-1]), nothing)
        for step, wheres in enumerate(places):
            for prompt, where in enumerate(wheres):
                if where:
                    first = base.longest - base.lengths[prompt]
                    array[prompt, step] = tokens[prompt, [first + place for place in where]].sum(0)
        return array
    pieces = [
        (step, rows, np.array(value.tolist(), dtype=float).reshape(len(base) if isinstance(rows, slice) else 1, -1))
        for step, saved in enumerate(own.steps)
        for rows, value in saved
    ]
    array = np.full((len(base), len(own.steps), pieces[0][2].shape[-1]), nothing)
    for step, rows, value in pieces:
        array[rows, step] = value if isinstance(rows, slice) else value[0]
    return array
