"""Values that every run of a program makes alike: constants, parameters, and what is worked out of these alone.

A step of a generation runs its program again and again: what is steady is worked out at its first two runs and kept
from then on, until the request ends. What is drawn is not steady, nor what ranks have to put together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.fragments import RequestState
from polytrace.graph import Constant, NodeId, Op, Parameter, operands
from scheduling.plan import Fragment, Program, RequestId


class SteadyValues:
    """One a shard."""

    def __init__(self, *, is_split: bool) -> None:
        """`is_split`: ranks split the model."""
        self._is_split = is_split
        self._known: dict[RequestId, dict[int | None, dict[NodeId, bool]]] = {}  # by part and node
        self._kept: dict[RequestId, dict[tuple[int | None, int], _Steady | None]] = {}  # by part and wave

    def asked(self, program: Program, part: int | None) -> Callable[[NodeId], bool]:
        """Tells of a program's values whether they are steady. `part`: which program of its request it is."""
        known = self._known.setdefault(program.request, {}).setdefault(part, {})
        nodes, below, is_split = program.graph.nodes, program.below, self._is_split

        def is_steady(place: NodeId) -> bool:
            if place not in known:
                node = nodes[place]
                if isinstance(node, Op) and "draw" not in node.kwargs and place not in below:
                    parts = operands(node)
                    known[place] = bool(parts) and all(is_steady(part) for part in parts)
                else:
                    known[place] = isinstance(node, Constant) or (isinstance(node, Parameter) and not is_split)
            return known[place]

        return is_steady

    def run(self, state: RequestState, prologue: Fragment) -> None:
        """Runs a prologue, or takes what is steady in it from a run before."""
        kept = self._kept.setdefault(state.program.request, {})
        assert state.member is not None, "a prologue belongs to a pass"
        key = state.member.part, state.member.wave
        found = kept.get(key)
        if found is None:
            state.run(prologue, None)
            if key not in kept:
                kept[key] = None  # many programs run once
            elif not state.has_failed:
                kept[key] = self._keep(state, prologue, key[0])
            return
        state.values.update(found.values)
        if found.rest.nodes:
            state.run(found.rest, None)

    def forget(self, request: RequestId) -> None:
        """A request has ended."""
        self._known.pop(request, None)
        self._kept.pop(request, None)

    def clear(self) -> None:
        """Gives the memory back."""
        self._known.clear()
        self._kept.clear()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept of any request."""
        return not (self._known or self._kept)

    def _keep(self, state: RequestState, prologue: Fragment, part: int | None) -> _Steady:
        is_steady = self.asked(state.program, part)
        values = {node: state.values[node] for node in prologue.nodes if is_steady(node) and node in state.values}
        graph = state.program.graph
        rest = [node for node in prologue.nodes if not is_steady(node)]
        for node in rest:  # what they need, where it is dropped behind the prologue
            if any(is_steady(part) and part not in values for part in operands(graph.nodes[node])):
                return _Steady({}, prologue)
        return _Steady(values, Fragment(order=prologue.order, nodes=tuple(rest), drops=prologue.drops))


class _Steady:
    """Of a prologue."""

    def __init__(self, values: dict[NodeId, Any], rest: Fragment) -> None:
        self.values = values
        self.rest = rest  # what runs every time
