"""Distributed alignment search: which subspace of a value holds a variable, found by gradients.

Geiger et al., "Finding Alignments Between Interpretable Causal Variables and Distributed Neural Representations" (2023,
arXiv:2303.02536). A rotation whose first directions are the variable: where a base run gets these from a source run, it
should say what a change of that variable alone would make it say. Only the directions that are put in matter, so only
these are learnt, `[size, hidden]`; they are the Q of a QR decomposition of a free matrix in every step, so they are
orthonormal all along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.cells import Part, paired_parts, places_in
from polytrace.methods.descent import Descent, Goal
from polytrace.methods.imports import needs_torch
from polytrace.methods.labels import labelled
from polytrace.methods.metrics import Metric, Run, as_metric, measure
from polytrace.methods.patching import pairs_of, record_ends
from polytrace.methods.places import Prompts, check_stream, layers_of, value_of
from polytrace.methods.sweeps import Scale, Sweep, collect

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.model import Model

_Pairs = list[tuple[Part, Part]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotation:
    """Directions of a value that are moved from one run to another; `interchange` does it."""

    tensor: Any  # [size, hidden], float32, orthonormal; `ablate_direction` takes it too
    layer: int
    of: str
    positions: Any  # as they were given
    losses: DataArray  # [step]: before each step, and after the last
    share: float | None  # of the base runs that end with saying their target; None where a metric was the goal
    receipt: Receipt

    def swap(self, ours: Any, theirs: Any) -> Any:
        """Rows `[..., hidden]` with what others have along the directions; of a trace, or tensors."""
        return swapped(ours, theirs, self.tensor.T)


def learn_rotation(
    model: Model,
    bases: Any,
    sources: Any,
    targets: Any,
    *,
    layer: int,
    of: str = "resid_post",
    size: int = 1,
    positions: Any = -1,
    steps: int = 50,
    lr: float = 0.02,
    optimiser: str = "adam",
    seed: int = 0,
    start: Any = None,
) -> Rotation:
    """The `size` directions at a layer that carry what makes a base run say the target of its pair.

    `bases`, `sources`: prompts, pair by pair; `targets`: what a base is to say when the directions come from its
    source: a token for all, or one each, or a metric that is made large. `positions`: the tokens whose values are
    mixed, all at once, as in `patch_heads`. `of`: a point with the residual's features. `optimiser`, `lr`, `steps` as
    in `learn_steering_vector`; it begins with directions drawn from `seed`, or with `start` `[size, hidden]`.
    """
    torch = needs_torch("learn_rotation")
    check_stream(of)
    (number,) = layers_of(model, layer)
    base, source = pairs_of(model, bases, sources, ("base", "source"))
    hidden, count = model.description.hidden_size, scalar(size)
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= hidden:
        raise GraphError(f"size is 1-{hidden} directions, not {size!r}", where=user_line())
    pairs = _pairs(model, base, source, positions)
    goal, descent = Goal.of(model, base, targets), Descent.of(steps, lr, optimiser)
    first_DK = _start(start, hidden, count, seed)
    with model.trace() as tracer:
        with tracer.invoke(source.ids):
            given = value_of(model, number, of).detach()
        put = _putting(model, number, of, given, pairs)
        free_DK, losses, said = descent.run(tracer, goal, first_DK, lambda free_DK: put(torch.linalg.qr(free_DK).Q))
        found_DK, losses = torch.linalg.qr(free_DK).Q.save(), torch.stack(losses).save()
        said = None if said is None else said.save()
    return Rotation(
        tensor=found_DK.T.contiguous(),
        layer=number,
        of=of,
        positions=positions,
        losses=labelled(losses, {"step": None}, name="loss"),
        share=goal.share(said),
        receipt=tracer.receipt,
    )


def interchange(
    model: Model,
    bases: Any,
    sources: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    rotation: Rotation,
    positions: Any = None,
) -> Sweep:
    """The metric of base runs that have what their source runs have along a rotation's directions: `effect` [prompt].

    `clean` is the bases' own metric, `corrupt` the sources'. `positions`: other ones than the rotation's.
    """
    needs_torch("interchange")
    base, source = pairs_of(model, bases, sources, ("base", "source"))
    measured, pairs = (
        as_metric(metric),
        _pairs(model, base, source, rotation.positions if positions is None else positions),
    )
    with model.trace() as tracer:
        ends = record_ends(tracer, model, base, source, measured)
        with tracer.invoke(source.ids):
            given = value_of(model, rotation.layer, rotation.of)
        with tracer.invoke(base.ids):
            _putting(model, rotation.layer, rotation.of, given, pairs)(rotation.tensor.T)
            changed = measure(measured, Run(model, base, ends.reference)).save()
    return collect(
        {(): changed},
        {},
        base,
        name=measured.name,
        scale=Scale.VALUE,
        receipt=tracer.receipt,
        clean=ends.clean,
        corrupt=ends.corrupt,
    )


def swapped(ours: Any, theirs: Any, basis_DK: Any) -> Any:
    """Rows with others' parts along orthonormal columns, float32."""
    ours = ours.float()
    return ours + ((theirs.float() - ours) @ basis_DK) @ basis_DK.T


def _putting(model: Model, number: int, of: str, given: Any, pairs: _Pairs) -> Callable[[Any], None]:
    """What edits an open invoke with directions `[hidden, size]`."""

    def put(basis_DK: Any) -> None:
        value = value_of(model, number, of)
        for ours, theirs in pairs:
            value[ours] = swapped(value[ours], given[theirs], basis_DK)

    return put


def _pairs(model: Model, base: Prompts, source: Prompts, positions: Any) -> _Pairs:
    places = places_in(model, base, positions)
    others = places if base.lengths == source.lengths else places_in(model, source, positions)
    return paired_parts(base, places, source, others)


def _start(start: Any, hidden: int, size: int, seed: int) -> Any:
    """`[hidden, size]`, orthonormal."""
    torch = needs_torch("learn_rotation")
    if start is None:
        drawn = torch.randn(hidden, size, generator=torch.Generator().manual_seed(seed))
    else:
        drawn = torch.as_tensor(start, dtype=torch.float32).T
        if tuple(drawn.shape) != (hidden, size):
            told = f"directions to begin with are [{size}, {hidden}], not {list(drawn.T.shape)}"
            raise GraphError(told, where=user_line())
    return torch.linalg.qr(drawn).Q
