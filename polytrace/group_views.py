"""What is recorded for an empty `tracer.invoke()`: views over what every member reads (`polytrace.groups`).

Owns how members' values become one left-padded view, and when an index is taken of each member's instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polytrace.graph import NodeId, Op, Operand, Port, Ref, Site
from polytrace.groups import index_from_the_end
from polytrace.storage import State

if TYPE_CHECKING:
    from polytrace.recording import Recording


class GroupViews:
    """Of one recording."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def read(self, site: Site, invoke: int, dtype: str, where: str) -> State:
        """One view over what every member reads."""
        members = [
            self._recording.read(site, member, dtype, where).node
            for member in self._recording.session.members_of(invoke)
        ]
        unseen: dict[str, Operand] = {}
        if site.port is Port.SCORES:  # -inf at what is no token
            lengths = self.lengths_of(invoke)
            unseen["unseen"] = tuple(max(lengths) - length for length in lengths)
        node = self.left_pad(members, invoke, self.token_dims(site), where, **unseen)
        self._recording.facts.dtypes.known[node] = dtype
        state = self._recording.fresh(node, where)
        state.storage.place = place = self._recording.in_place.place(site, invoke)
        state.storage.writes_seen = place.writes
        return state

    def taken_of_members(self, call: Op) -> NodeId | None:
        """What an index takes of a group's view, taken of each member's: nobody needs the other columns then."""
        base = call.args[0]
        whole = self._recording.nodes[base.node] if call.name == "getitem" and isinstance(base, Ref) else None
        if not isinstance(whole, Op) or whole.name != "left_pad" or whole.args[1] != (1,):
            return None
        assert isinstance(base, Ref) and isinstance(whole.args[0], list)
        invoke = self._recording.facts.invokes.known[base.node]
        widths = [max(self.lengths_of(member)) for member in self._recording.session.members_of(invoke or 0)]
        index = index_from_the_end(call.args[1], min(widths), max(widths))
        if index is None:
            return None
        parts = [
            self._recording.add(Op(name="getitem", args=(part, index), where=call.where)) for part in whole.args[0]
        ]
        args: tuple[Operand, ...] = ([Ref(part) for part in parts], 0)
        node = self._recording.add(Op(name="cat", args=args, where=call.where))
        self._recording.facts.invokes.known[node] = invoke
        return node

    def left_pad(
        self, members: list[NodeId], invoke: int, dims: tuple[int, ...], where: str, **unseen: Operand
    ) -> NodeId:
        """Members' values below each other, with pads before those of fewer tokens."""
        args: tuple[Operand, ...] = ([Ref(member) for member in members], dims)
        node = self._recording.add(Op(name="left_pad", args=args, kwargs=unseen, where=where))
        self._recording.facts.invokes.known[node] = invoke
        return node

    def lengths_of(self, invoke: int) -> tuple[int, ...]:
        """Tokens of each prompt."""
        lengths = self._recording.session.lengths_of(invoke)
        assert lengths is not None, "groups are of prompts that are there"
        return lengths

    def widths_of(self, site: Site, invoke: int) -> tuple[int, ...]:
        """Columns that each prompt has in a site's view: its tokens, but for sites of one row a sequence."""
        lengths, columns = self.lengths_of(invoke), self._recording.session.num_columns(site)
        return lengths if columns is None else (columns,) * len(lengths)

    def token_dims(self, site: Site) -> tuple[int, ...]:
        """The dimensions of a site's view that run over tokens."""
        return (2, 3) if site.port.is_of_pairs else (self._recording.session.row_dim(site),)
