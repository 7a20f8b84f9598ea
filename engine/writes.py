"""What requests write to a port at one visit: collected while fragments run, applied behind them.

Every read of the visit sees what the model made. Rows may be several requests', which all write the same to them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from engine.arguments import Selector
from engine.attended import Attended
from engine.head_outputs import HeadOutputs
from engine.leaves import row_leaves, with_rows_back
from engine.points import Pairs
from engine.views import RowView


@dataclass(frozen=True, slots=True, kw_only=True)
class RowWrite:
    """Rows that one write gives to a tensor."""

    rows: RowView
    value: Tensor  # of the view's shape and the tensor's dtype; of pairs: as `Pairs.write` takes it
    in_place: bool  # False: only what the port hands on, and after that all writes of its invoke
    turn: int  # how many writes of its invoke to the same tensor came before, at the same visit


class PortValue:
    """A port's value during one visit. Writes are collected and applied behind it, so that every read of the visit
    sees what the model made: rows may be several requests', which all write the same to them.
    """

    def __init__(
        self, value: Any, outputs: Tensor | None = None, layouts: Mapping[Selector, int] = MappingProxyType({})
    ) -> None:
        """`layouts` has those of its tensors whose rows lie in another dimension than the second."""
        self.original = value
        self.outputs = outputs  # that trunks have of this layer, `[R, D]`
        self.layouts = layouts
        # as the model made them
        self.heads = value if isinstance(value, HeadOutputs) else None
        own: dict[Selector, Tensor] = row_leaves(value, layouts) if self.heads is None else {(): self.heads.z}
        self.tensors = own
        self.pairs = value if isinstance(value, Pairs) else None
        self.attended: Attended | None = None  # at keys and values of all positions
        self._writes: dict[Selector, list[RowWrite]] = {}

    def write(self, selector: Selector, write: RowWrite) -> None:
        """Takes a write."""
        self._writes.setdefault(selector, []).append(write)

    def take_writes(self, selector: Selector) -> list[RowWrite]:
        """Takes a tensor's writes away, for whoever applies them in the next level's rows."""
        return self._writes.pop(selector, [])

    def changing(self) -> list[Tensor]:
        """The tensors that are to be written to in place."""
        changed = [own for own, writes in self._writes.items() if any(write.in_place for write in writes)]
        return [self.tensors[selector] for selector in changed if selector in self.tensors]

    def result(self) -> Any:
        """Applies the writes; what the hook returns: the original object when nothing was assigned."""
        value = self.original
        if self.heads is not None:
            self.heads.write(self._writes.pop((), ()))
        if self.pairs is not None:
            for write in sorted(self._writes.pop((), ()), key=lambda write: write.turn):
                self.pairs.write(write.rows.numbers, write.value)
        for selector, writes in self._writes.items():
            tensor = self.tensors[selector]
            written = apply_writes(tensor, writes)
            if written is not tensor:
                value = with_member(value, selector, with_rows_back(written, self.layouts.get(selector, 1)))
        return value


def apply_writes(packed: Tensor, writes: list[RowWrite]) -> Tensor:
    """Applies writes in place where they are, and on a copy where one is assigned; returns what is handed on."""
    if all(write.in_place for write in writes):
        _put_rows(packed, writes)
        return packed
    handed_on = packed.clone()
    _put_rows(handed_on, writes)
    _put_rows(packed, [write for write in writes if write.in_place])
    return handed_on


def _put_rows(packed: Tensor, writes: list[RowWrite]) -> None:
    """In turns: within one, rows that occur twice get the same values."""
    for turn in range(max((write.turn for write in writes), default=-1) + 1):
        own = [write for write in writes if write.turn == turn and write.rows.num_rows]
        if len(own) == 1 and own[0].rows.is_run:
            own[0].rows.read(packed).copy_(own[0].value)
        elif own:
            rows = torch.cat([write.rows.rows for write in own])
            packed[0].index_copy_(0, rows, torch.cat([write.rows.part(write.value) for write in own]))


def with_member(container: Any, selector: tuple[int | str, ...], tensor: Tensor) -> Any:
    """The container with one member replaced; tuples are rebuilt, mappings are copied."""
    if not selector:
        return tensor
    key, *rest = selector
    member = with_member(member_of(container, key), tuple(rest), tensor)
    if is_record(container):
        record = copy.copy(container)
        object.__setattr__(record, str(key), member)  # of a frozen one, too
        return record
    if isinstance(container, Mapping):
        changed: Any = copy.copy(container)
        changed[key] = member
        return changed
    members = [member if place == key else old for place, old in enumerate(container)]
    if isinstance(container, list):
        return members
    if type(container).__module__ == "torch.return_types":  # of `max`, `topk` and such
        return type(container)(members)
    return type(container)(*members) if hasattr(container, "_fields") else tuple(members)


def member_of(container: Any, key: int | str) -> Any:
    """One member of a tuple, list, mapping or dataclass."""
    return getattr(container, str(key)) if is_record(container) else container[key]


def is_record(value: Any) -> bool:
    """Whether it is a dataclass whose members are attributes alone."""
    return is_dataclass(value) and not isinstance(value, (type, Mapping))
