"""Looking at a value while its trace is recorded (`peek=True`): what it is made of runs now, as a request of its own.

Owns what such a request has in it, and the rule that keeps a look true: what the value was seen to be is what it will
be when the whole program runs, bit for bit. So no later line may write where a value that was looked at would change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from polytrace.backend import Result
from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.graph import Backward, Constant, NodeId, Options, Read, Ref, Request, Save, Site, Write, operands
from polytrace.lines import user_line
from polytrace.pruning import alone, renumber

if TYPE_CHECKING:
    from polytrace.graph import Invoke
    from polytrace.recording import Recording

# The order of a site that the description does not tell of: what is written there may change all, and what is read
# there may see all.
_FIRST, _LAST = -1, 1 << 62


class Peeks:
    """The looks into one recording. Each value is asked for once."""

    def __init__(
        self, recording: Recording, invokes: Sequence[Invoke], options: Options, run: Callable[[Request], Result]
    ) -> None:
        self.receipts: list[Receipt] = []
        self._recording = recording
        self._invokes = invokes
        self._options = options
        self._run = run
        self._orders = {(info.module, info.port, info.visit): info.order for info in recording.description.sites}
        self._known: dict[NodeId, Any] = {}
        self._writes: dict[int, list[tuple[int, NodeId]]] = {}  # by invoke: with the order of its site
        self._seen: dict[int, tuple[int, Read]] = {}  # by invoke: the latest read that a look depends on
        self._backwards: set[NodeId] = set()  # that a look depends on

    def look(self, node: NodeId) -> Any:
        """The value of a node, as a plain tensor or array. Raises whatever running it raises."""
        if node not in self._known:
            kept = self._cone(node)
            self._check_states(kept)
            nodes, places = renumber(self._recording.nodes, kept)
            save = Save(name="0", value=Ref(places[node]), where=self._recording.nodes[node].where)
            options = replace(self._options, edits=tuple(self._recording.labels))
            request = alone((*nodes, save), self._invokes, self._recording.constants.tensors, options)
            result = self._run(request)
            self.receipts.append(result.receipt)
            self._known[node] = result.values["0"]
            for place in kept:
                self._remember(self._recording.nodes[place])
                if isinstance(self._recording.nodes[place], Backward):
                    self._backwards.add(place)
        return self._known[node]

    def note(self, place: NodeId, write: Write) -> None:
        """A write is about to be recorded. Raises GraphError when it would change what somebody has looked at."""
        order = self._order(write.site, _FIRST)
        seen = self._seen.get(write.invoke)
        if seen is not None and order < seen[0]:
            raise GraphError(
                f"the read of {seen[1].site} ({seen[1].where}) was looked at, and this write to {write.site} acts "
                "before it in the model and would change what was seen: write before you look, or look in an invoke or "
                "a trace of its own",
                where=write.where,
            )
        self._writes.setdefault(write.invoke, []).append((order, place))

    def has_seen(self, backward: NodeId) -> bool:
        """Whether a look depends on a backward."""
        return backward in self._backwards

    def _check_states(self, places: Sequence[NodeId]) -> None:
        """What a state has may be another thing by the time the whole program runs."""
        for place in places:
            node = self._recording.nodes[place]
            if isinstance(node, Constant):
                state = self._recording.constants.tensors[node.name].state
                if state is not None:
                    raise GraphError(
                        f"this value depends on the state {state!r}, which other requests may change before this trace "
                        "runs, so it cannot be looked at: use what .fetch() of the state gives, or decide with "
                        "polytrace.cond or torch.where",
                        where=user_line(),
                    )

    def _cone(self, wanted: NodeId) -> list[NodeId]:
        """A node, all that it needs, and every write that its reads see."""
        nodes = self._recording.nodes
        found, waiting = {wanted}, [wanted]
        while waiting:
            node = waiting.pop()
            made = nodes[node]
            parts = list(operands(made))
            if isinstance(made, Read):
                own = (self._order(made.site, _LAST), node)
                parts += [write for order, write in self._writes.get(made.invoke, ()) if (order, write) < own]
            elif isinstance(made, Backward):
                changes = self._recording.gradients.writes
                parts += [change for change in changes if operands(nodes[change])[1] == node]
            fresh = [part for part in parts if part not in found]
            found.update(fresh)
            waiting += fresh
        return sorted(found)

    def _remember(self, node: Any) -> None:
        if isinstance(node, Read):
            order = self._order(node.site, _LAST)
            if order > self._seen.get(node.invoke, (-1, node))[0]:
                self._seen[node.invoke] = (order, node)

    def _order(self, site: Site, unknown: int) -> int:
        return self._orders.get((site.module, site.port, site.visit), unknown)
