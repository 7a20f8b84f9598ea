"""Path patching: what does one part of the model tell another one, along the direct path between them alone?

Wang et al., "Interpretability in the Wild" (2022, arXiv:2211.00593, appendix B); Goldowsky-Dill et al., "Localizing
Model Behavior with Path Patching" (2023, arXiv:2304.05969). As here:

1. In the clean run the sender gives what it gave in the corrupt run. Between it and the receivers every attention keeps
   its clean output, at the positions that are sent from, so that nothing goes from token to token or through other
   heads. `mlps="recomputed"` lets MLPs in between see the change (Wang et al.); `mlps="frozen"` keeps their clean
   output too, which leaves the residual stream alone (an edge of Goldowsky-Dill et al.).
2. What the receivers take in this run is put into a second clean run, in which all else is free, and the metric is
   measured there. Where the receiver is the logits, it is measured in the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Part, paired_parts, places_in
from polytrace.methods.metrics import Metric, Run, as_metric, measure
from polytrace.methods.patching import check_lengths, pairs_of, record_ends
from polytrace.methods.places import Prompts, heads_of, layers_of, num_heads, value_of
from polytrace.methods.sweeps import Scale, Sweep, collect, copy_parts

if TYPE_CHECKING:
    from polytrace.model import Model
    from polytrace.tracing import Tracer

_TAKEN = {
    "q": "q_rot",
    "k": "k_rot",
    "v": "v",
    "mlp": "mlp_input",
}  # a receiver's input -> the point that it is read and written at
_SENDERS = "'heads', 'mlps', or a list of (layer, head) and (layer, 'mlp')"
_RECEIVERS = "'logits', 'q', 'k', 'v', or a list of (layer, head, 'q'), (layer, 'q') and (layer, 'mlp')"
_Pairs = list[tuple[Part, Part]]


@dataclass(frozen=True, slots=True)
class _Sender:
    layer: int
    head: int | None  # None: the MLP

    @property
    def point(self) -> str:
        return "mlp" if self.head is None else "z"


@dataclass(frozen=True, slots=True)
class _Receiver:
    layer: int
    head: int | None  # None: the MLP, or every head
    taken: str  # "q", "k", "v" or "mlp"


def patch_paths(
    model: Model,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    senders: Any = "heads",
    receivers: Any = "logits",
    layers: Any = None,
    positions: Any = None,
    mlps: str = "recomputed",
) -> Sweep:
    """What senders of the corrupt run change in the clean one, along their direct paths to the receivers.

    `senders`: "heads", each alone: `effect` [layer, head]; "mlps", each alone: [layer]; or a list of `(layer, head)`
    and `(layer, "mlp")` that send together: no dimension. `layers`: of the senders.

    `receivers`: "logits"; "q", "k" or "v" of all later heads; or a list of `(layer, head, "q")` (or "k", "v": of
    key/value heads), `(layer, "q")` for all heads of a layer, and `(layer, "mlp")`, which receive together.

    `positions`: where senders send, all at once; None is every token. `mlps`: "recomputed" or "frozen", as above. Pairs
    of prompts have equal lengths.

    `effect` is the change of the metric against the clean run; 0 where no receiver stands behind a sender.
    """
    if mlps not in ("recomputed", "frozen"):
        raise GraphError(f"mlps are 'recomputed' or 'frozen', not {mlps!r}", where=user_line())
    base, other = pairs_of(model, clean, corrupt)
    check_lengths(base, other)
    measured, numbers = as_metric(metric), layers_of(model, layers)
    places = places_in(model, base, positions)
    pairs = paired_parts(base, places, other, places)
    cells: dict[tuple[int, ...], Any] = {}
    with model.trace() as tracer:
        ends = record_ends(tracer, model, base, other, measured)
        with tracer.invoke(base.ids):  # shapes are of an invoke
            dims, groups = _groups(model, senders, numbers)
            wanted = _receivers(model, receivers)
        if wanted is not None and not any(_is_behind(one, group) for group in groups.values() for one in wanted):
            raise GraphError("no receiver stands behind a sender, so nothing can reach one", where=user_line())
        paths = _Paths(tracer, model, base, other, pairs, mlps == "frozen")
        paths.record_sources({sender for group in groups.values() for sender in group})
        for place, group in groups.items():
            reached = None if wanted is None else [one for one in wanted if _is_behind(one, group)]
            cells[place] = ends.clean
            if reached is None or reached:
                with paths.run(group, reached):
                    cells[place] = measure(measured, Run(model, base, ends.reference)).save()
    return collect(
        cells,
        dims,
        base,
        name=measured.name,
        scale=Scale.CHANGE,
        receipt=tracer.receipt,
        clean=ends.clean,
        corrupt=ends.corrupt,
    )


class _Paths:
    """The runs of one trace."""

    def __init__(
        self, tracer: Tracer, model: Model, base: Prompts, other: Prompts, pairs: _Pairs, is_frozen: bool
    ) -> None:
        self.tracer, self.model, self.base, self.other, self.pairs = tracer, model, base, other, pairs
        self.is_frozen = is_frozen  # of MLPs in between
        self.sent: dict[tuple[str, int], Any] = {}  # what heads or the MLP of a layer give in the corrupt run
        self.kept: dict[tuple[str, int], Any] = {}  # ... of every layer in the clean one

    def record_sources(self, senders: Iterable[_Sender]) -> None:
        """What all runs take their values from."""
        with self.tracer.invoke(self.other.ids):
            for key in {(sender.point, sender.layer) for sender in senders}:
                self.sent[key] = value_of(self.model, key[1], key[0])
        with self.tracer.invoke(self.base.ids):
            for number in range(len(self.model.layers)):
                for point in ("z", "mlp") if self.is_frozen else ("z",):
                    self.kept[point, number] = value_of(self.model, number, point)

    @contextmanager
    def run(self, senders: Sequence[_Sender], receivers: Sequence[_Receiver] | None) -> Iterator[None]:
        """The invoke in which the metric is measured."""
        if receivers is None:
            with self.tracer.invoke(self.base.ids):
                self._send(senders, len(self.model.layers))
                yield
            return
        with self.tracer.invoke(self.base.ids):
            last = max(receiver.layer for receiver in receivers)
            self._send(senders, last)
            if any(receiver.taken == "mlp" and receiver.layer == last for receiver in receivers):
                self._send_heads(senders, last)
            taken = [self._input(receiver) for receiver in receivers]
        with self.tracer.invoke(self.base.ids):
            same = [(ours, ours) for ours, _ in self.pairs]
            for receiver, value in zip(receivers, taken, strict=True):
                copy_parts(self._input(receiver), value, _TAKEN[receiver.taken], same, receiver.head)
            yield

    def _send(self, senders: Sequence[_Sender], until: int) -> None:
        """The senders' corrupt values, and what stands between them and layer `until` as it was."""
        start = min(sender.layer for sender in senders)
        for number in range(start, until):
            self._send_heads(senders, number)
            if _Sender(number, None) in senders:
                copy_parts(value_of(self.model, number, "mlp"), self.sent["mlp", number], "mlp", self.pairs)
            elif self.is_frozen:
                self._keep("mlp", number)

    def _send_heads(self, senders: Sequence[_Sender], number: int) -> None:
        if number > min(sender.layer for sender in senders):
            self._keep("z", number)
        for sender in senders:
            if sender.layer == number and sender.head is not None:
                copy_parts(value_of(self.model, number, "z"), self.sent["z", number], "z", self.pairs, sender.head)

    def _keep(self, point: str, number: int) -> None:
        same = [(ours, ours) for ours, _ in self.pairs]
        copy_parts(value_of(self.model, number, point), self.kept[point, number], point, same)

    def _input(self, receiver: _Receiver) -> Any:
        return value_of(self.model, receiver.layer, _TAKEN[receiver.taken])


def _groups(
    model: Model, senders: Any, layers: Sequence[int]
) -> tuple[dict[str, Sequence[Any]], dict[tuple[int, ...], list[_Sender]]]:
    """The dimensions of the effect, and by place in them who sends together."""
    if senders == "heads":
        counts = {number: num_heads(model, number, "z") for number in layers}
        groups: dict[tuple[int, ...], list[_Sender]] = {
            (row, head): [_Sender(number, head)] for row, number in enumerate(layers) for head in range(counts[number])
        }
        return {"layer": layers, "head": range(max(counts.values()))}, groups
    if senders == "mlps":
        return {"layer": layers}, {(row,): [_Sender(number, None)] for row, number in enumerate(layers)}
    if isinstance(senders, str) or not isinstance(senders, Iterable):
        raise GraphError(f"senders are {_SENDERS}, not {senders!r}", where=user_line())
    together: list[_Sender] = []
    for one in senders:
        if not isinstance(one, (tuple, list)) or len(one) != 2:
            raise GraphError(f"senders are {_SENDERS}, not {one!r}", where=user_line())
        (number,) = layers_of(model, one[0])
        together.append(
            _Sender(number, None if one[1] == "mlp" else heads_of(num_heads(model, number, "z"), one[1])[0])
        )
    if not together:
        raise GraphError(f"senders are {_SENDERS}; there are none", where=user_line())
    return {}, {(): together}


def _receivers(model: Model, receivers: Any) -> list[_Receiver] | None:
    """None: the logits."""
    if receivers == "logits":
        return None
    if receivers in ("q", "k", "v"):
        return [_Receiver(number, None, receivers) for number in range(len(model.layers))]
    found = []
    for one in receivers if isinstance(receivers, (list, tuple)) else [receivers]:
        is_known = isinstance(one, (tuple, list)) and len(one) in (2, 3) and one[-1] in (*_TAKEN,)
        if not is_known or (len(one) == 3 and one[-1] == "mlp"):
            raise GraphError(f"receivers are {_RECEIVERS}, not {one!r}", where=user_line())
        (number,) = layers_of(model, one[0])
        head = None
        if len(one) == 3:
            (head,) = heads_of(num_heads(model, number, _TAKEN[one[2]]), one[1])
        found.append(_Receiver(number, head, one[-1]))
    if not found:
        raise GraphError(f"receivers are {_RECEIVERS}; there are none", where=user_line())
    return found


def _is_behind(receiver: _Receiver, senders: Sequence[_Sender]) -> bool:
    """Whether something that a sender says may reach a receiver."""
    return any(
        sender.layer < receiver.layer
        or (sender.layer == receiver.layer and receiver.taken == "mlp" and sender.head is not None)
        for sender in senders
    )
