"""Steps of a generation while it is recorded: where code acts, the bodies of loops, and what their values are behind.

Code acts at step 0. `for step in tracer.iter[...]` records its body anew for each step; `with tracer.iter[...]` records
it once for all of its steps. Behind a `for`, a variable stands for what it had at the last step that came: whichever
that will be, it is one of the values that the variable had when a body ended (`Last`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.graph import Last, Node, NodeId, Op, Ref, Site
from polytrace.lines import user_frame
from polytrace.merging import Body, is_of_a_step
from polytrace.timing import ENDING, FIRST, TIMELESS, When, joined
from polytrace.variables import check_rebinding, nodes_by_name

if TYPE_CHECKING:
    from polytrace.recording import Recording

OF_ALL_PROMPTS = (
    "tracer.invoke() without prompts is all prompts as one view, at step 0: "
    "write the loop over steps in the invoke of each"
)


@dataclass(slots=True, eq=False)
class Loop:
    """One `tracer.iter[...]`, with its bodies as they were recorded."""

    where: str
    is_once: bool  # its body is recorded once for all of its steps
    bodies: list[tuple[NodeId, NodeId]] = field(default_factory=list)  # of each: the first node, and the next free one
    whens: list[When] = field(default_factory=list)  # ... and its steps
    names: list[Mapping[str, NodeId]] = field(default_factory=list)  # what variables stood for: before, behind each

    def history(self, nodes: Sequence[Any], node: NodeId, body: int) -> list[NodeId]:
        """What a value of a body may be behind the loop, from the latest step back.

        A variable is what it was when the last step that came had run. A value without a name of the last body stands
        for those of its line in the bodies before; one of another body for itself.
        """
        name = next((name for name, known in self.names[-1].items() if known == node), None)
        if name is not None:
            return list(dict.fromkeys(known[name] for known in reversed(self.names) if name in known))
        if body != len(self.bodies) - 1:
            return [node]
        key = _key(nodes[node])
        alike = [[NodeId(one) for one in range(*span) if _key(nodes[one]) == key] for span in self.bodies]
        place = alike[-1].index(node)
        return [own[place] for own in reversed(alike) if place < len(own)]


@dataclass(slots=True, eq=False)
class Position:
    """Where in its generation the code of an invoke acts."""

    loop: Loop | None = None
    when: When = FIRST
    ahead: int = 0  # steps that `tracer.next()` has moved on
    modules: dict[str, int] = field(default_factory=dict)  # ... and `module.next()`, by path

    def of(self, site: Site | None = None) -> When:
        """The steps that a site is read or written at."""
        ahead = self.ahead
        if site is not None and self.modules:
            ahead += sum(count for path, count in self.modules.items() if _is_within(site.module, path))
        return When(self.when.step + ahead, self.when.num_steps) if ahead else self.when

    def move(self, module: str | None, count: int) -> None:
        """Goes on by some steps: with all modules, or with one and what is inside of it."""
        if module is None:
            self.ahead += count
        else:
            self.modules[module] = self.modules.get(module, 0) + count


class Loops:
    """Of one recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self.position = Position()
        self.are_used = False  # anything but step 0 has been named
        self._outside: tuple[int, dict[str, int]] = (0, {})  # what `next()` had said before the body began
        self._starts: list[NodeId] = []  # of all bodies
        self._owners: list[tuple[Loop, int]] = []  # and whose they are
        self._lasts: dict[tuple[NodeId, ...], NodeId] = {}
        self._draws: dict[int, int] = {}  # by step: random ops so far

    def begin(self, loop: Loop, when: When) -> None:
        """A body begins."""
        self.are_used = True
        if not loop.names:
            loop.names.append(nodes_by_name(self._recording, user_frame()))
        first = NodeId(len(self._recording.nodes))
        self._starts.append(first)
        self._owners.append((loop, len(loop.bodies)))
        loop.bodies.append((first, first))
        loop.whens.append(when)
        position = self.position
        self._outside = (position.ahead, position.modules)
        position.loop, position.when, position.ahead, position.modules = loop, when, 0, {}

    def end(self, loop: Loop) -> None:
        """A body ends."""
        first = loop.bodies[-1][0]
        loop.bodies[-1] = (first, NodeId(len(self._recording.nodes)))
        loop.names.append(nodes_by_name(self._recording, user_frame()))
        self.position.loop, self.position.when = None, FIRST
        self.position.ahead, self.position.modules = self._outside  # `next()` in a body is for the rest of it

    def draw(self, needs: Sequence[NodeId], where: str) -> int:
        """The number of the next random op, which needs these values.

        Each step counts its own, so that equal bodies stay equal. An op draws at the step that it belongs to.
        """
        when = joined(map(self._recording.facts.times.of, needs), where) if self.are_used else FIRST
        when = FIRST if when == TIMELESS else when
        loop = self.position.loop
        if loop is not None and loop.is_once and not when.is_loop:
            raise GraphError(
                f"the body at {loop.where} is recorded once for several steps, and this would be drawn once for all of "
                "them: draw like a value of the step (torch.randn_like), or write `for step in tracer.iter[...]`",
                where=where,
            )
        steps = range(when.step, when.step + when.num_steps)
        number = max(self._draws.get(step, 0) for step in steps)
        self._draws.update(dict.fromkeys(steps, number + 1))
        return number

    def used(self, node: NodeId, where: str, *, is_member: bool = False) -> NodeId:
        """A node as code at this place means it: a value of a loop that has ended is that of its last step.

        `is_member`: of a list, where each is meant for itself.
        """
        owner = self._owner(node) if self._starts and self.position.loop is None else None
        if owner is None:
            return node
        when = self._recording.facts.times.of(node)
        if when in (TIMELESS, ENDING):
            return node
        loop, number = owner
        if when.is_loop:
            raise GraphError(
                f"this value was recorded once for {when}, so here it could be that of any of them: .save() it, which "
                f"gives all of them, or write `for step in tracer.iter[...]` at {loop.where}, whose body is recorded "
                "for each step",
                where=where,
            )
        values = [node] if is_member else loop.history(self._recording.nodes, node, number)
        return self._last([value for value in values if self._recording.facts.times.of(value) != ENDING], where)

    def check_change(self, node: NodeId, where: str) -> None:
        """GraphError for in-place code whose effect would depend on which steps come."""
        loop = self.position.loop
        if loop is not None and loop.is_once and node < loop.bodies[-1][0]:
            raise GraphError(
                f"the body at {loop.where} is recorded once for all of its steps, so it cannot change a value from "
                "outside step by step: write `for step in tracer.iter[...]`, whose body is recorded for each step",
                where=where,
            )
        if loop is None and self._starts and (owner := self._owner(node)) is not None:
            raise GraphError(
                f"this value belongs to a step of the loop at {owner[0].where}, which has ended: change it there, or "
                "make another (`value = value + x`)",
                where=where,
            )

    def check_rebinding(self, loop: Loop, before: Mapping[str, Any], where: str) -> None:
        """GraphError where a variable from outside stands for a value of a body that is recorded once.

        `before`: the variables as they were when the block began.
        """
        check_rebinding(self._recording, range(*loop.bodies[-1]), user_frame(), before, where)

    def bodies(self, nodes: Sequence[Node], places: Mapping[NodeId, NodeId]) -> list[Body]:
        """All bodies that were recorded for one step, of the nodes that are left; `places` are where they are now."""
        found: list[Body] = []
        loops = {id(loop): number for number, (loop, _) in enumerate(self._owners)}
        for loop, number in self._owners:
            when = loop.whens[number]
            own = [places[NodeId(node)] for node in range(*loop.bodies[number]) if NodeId(node) in places]
            if not when.is_loop:
                steps = tuple([node for node in own if is_of_a_step(nodes[node])])
                among = {node: place for place, node in enumerate(steps)}
                found.append(Body(loop=loops[id(loop)], step=when.step, nodes=steps, places=among))
        return found

    def has_owner(self, node: NodeId) -> bool:
        """Whether a node was made in the body of a loop that has ended."""
        return self._owner(node) is not None

    def is_of_body(self, node: NodeId, when: When) -> bool:
        """Whether a node was made in the body of these steps."""
        owner = self._owner(node)
        return owner is not None and owner[0].whens[owner[1]] == when

    def _owner(self, node: NodeId) -> tuple[Loop, int] | None:
        place = bisect_right(self._starts, node) - 1
        if place < 0:
            return None
        loop, number = self._owners[place]
        return (loop, number) if node < loop.bodies[number][1] else None

    def _last(self, values: Sequence[NodeId], where: str) -> NodeId:
        key = tuple(values)
        if key not in self._lasts:
            self._lasts[key] = self._recording.add(Last(values=tuple(map(Ref, values)), where=where))
        return self._lasts[key]


def _key(node: Any) -> Hashable:
    """What nodes of different bodies have in common that stand in the same place."""
    return (type(node), node.where, node.name if isinstance(node, Op) else None)


def _is_within(module: str, path: str) -> bool:
    return not path or module == path or module.startswith(f"{path}.")
