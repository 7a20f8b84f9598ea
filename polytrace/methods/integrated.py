"""Integrated gradients: what each token adds to a metric along a straight way from a baseline.

Sundararajan et al., "Axiomatic Attribution for Deep Networks" (2017, arXiv:1703.01365). The integral over the way is
taken by Gauss and Legendre's rule, each of whose points is an invoke; one backward serves them all. The parts add up to
the difference of the metric's ends (completeness) as far as the points are enough: the result says by how much not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.cells import axis_of
from polytrace.methods.imports import needs
from polytrace.methods.metrics import Metric, Run, logits_for, measure
from polytrace.methods.patching import check_lengths
from polytrace.methods.places import Prompts, prompts_of
from polytrace.methods.sweeps import numbers_of, of_prompts
from polytrace.methods.token_rows import EMBEDDING, token_rows

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.model import Model

MAX_STEPS = 512
_ENOUGH = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Integrated:
    """Of one prompt, arrays have no dimension "prompt"; of a list of prompts it is the first."""

    effect: DataArray  # [position], or [layer, position]
    clean: DataArray  # the metric of the prompts as they are
    baseline: DataArray  # ... with the baseline in place of the value; [layer] where there are layers
    gap: DataArray  # clean - baseline - the sum of the effects of all tokens: 0 when completeness holds
    receipt: Receipt

    @property
    def is_complete(self) -> bool:
        """Whether every gap is at most 5% of what there is to explain; else take more steps."""
        return bool((abs(self.gap) <= _ENOUGH * abs(self.clean - self.baseline)).all())


def integrated_gradients(
    model: Model,
    prompts: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    of: str = EMBEDDING,
    layers: Any = None,
    positions: Any = None,
    baseline: Any,
    steps: int = 16,
) -> Integrated:
    """What each token's row adds to a metric between a baseline and what is there.

    `of`, `layers`, `positions`, `metric` as in `saliency`. `baseline`: a number, or an array `[features]` or of the
    value's whole shape without prompts, `[tokens, features]`; or prompts of the same lengths, whose values at the same
    place are taken. `steps`: points on the way, 1 to 512; each is a run of every prompt, for every layer. One request.

    Ways from 0 are hard for models whose norms only divide (RMS norms): all of the change is close to 0, and the gap
    shows it. A prompt that asks the same about something else is a question that they can answer.
    """
    np = needs("numpy")
    count = scalar(steps)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_STEPS:
        raise GraphError(f"steps are 1-{MAX_STEPS}, not {steps!r}", where=user_line())
    rows = token_rows(model, prompts, metric, of=of, layers=layers, positions=positions)
    batch, measured, numbers = rows.batch, rows.measured, rows.numbers
    other = _baseline_prompts(model, batch, baseline)
    nodes, weights = np.polynomial.legendre.leggauss(count)  # of -1 to 1
    with model.trace() as tracer:
        with tracer.invoke(batch.ids):
            reference = logits_for(measured, model).detach()
            best = measure(measured, Run(model, batch)).save()
        starts: list[Any] = [baseline] * len(numbers)
        if other is not None:
            with tracer.invoke(other.ids):
                starts = [rows.value(number) for number in numbers]

        def run(number: int | None, start: Any, share: float) -> tuple[Any, Any, Any]:
            """An invoke a part of the way: the metric, what was put in, and the whole way."""
            with tracer.invoke(batch.ids):
                site = rows.value(number)
                _check_shape(start, site, of)
                way = site.float() - start
                value = site.float() - way * (1.0 - share)
                site[:] = value
                return measure(measured, Run(model, batch, reference)), value, way

        least, runs = [], []
        total: Any = 0.0
        for number, start in zip(numbers, starts, strict=True):
            least.append(run(number, start, 0.0)[0].save())
            runs.append([run(number, start, point) for point in ((nodes + 1) / 2).tolist()])
            for (own, _, _), weight in zip(runs[-1], (weights / 2).tolist(), strict=True):
                total = own.float().sum() * weight + total
        saved = []
        with total.backward():
            for of_layer in runs:
                gradient = sum(value.grad for _, value, _ in of_layer)
                way = of_layer[0][2]
                saved.append((gradient * way).sum(list(range(2, len(way.shape)))).save())
    ends = np.stack([numbers_of(own, batch) for own in least], 1)
    added = np.nansum(rows.by_step(saved, axis_of(batch, None)), -1)
    gap = numbers_of(best, batch)[:, None] - ends - added
    found = rows.sweep(saved, f"part of {measured.name}", clean=best, receipt=tracer.receipt)
    dims = rows.layer_dims
    shape = (len(batch), *map(len, dims.values()))
    return Integrated(
        effect=found.effect,
        clean=found.clean,
        baseline=of_prompts(ends.reshape(shape), dims, batch, measured.name),
        gap=of_prompts(gap.reshape(shape), dims, batch, "gap"),
        receipt=tracer.receipt,
    )


def _baseline_prompts(model: Model, batch: Prompts, baseline: Any) -> Prompts | None:
    """None where it is numbers."""
    is_number = scalar(baseline) is not None and not isinstance(baseline, str)
    if is_number or hasattr(baseline, "shape"):
        return None
    other = prompts_of(model, baseline)
    if len(other) != len(batch):
        raise GraphError(f"{len(other)} baseline prompts for {len(batch)}: give as many", where=user_line())
    check_lengths(batch, other, ("given", "baseline"))
    return other


def _check_shape(baseline: Any, site: Any, of: str) -> None:
    """GraphError for numbers that are not of the rows' shape, `[sequences, tokens, ...]`, as they broadcast."""
    own, shape = tuple(getattr(baseline, "shape", ())), tuple(site.shape)
    fits = len(own) <= len(shape) and all(one in (1, size) for one, size in zip(own[::-1], shape[::-1], strict=False))
    if not fits:
        told = f"the baseline has the shape {list(own)}, and what each prompt has at {of} {list(shape[1:])}"
        raise GraphError(f"{told}: give a number, an array {list(shape[2:])}, or one of all of it", where=user_line())
