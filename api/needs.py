"""What a request needs of its owner's contents, and what it will leave there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from polytrace.tensors import RawTensor
from scheduling.plan import SaveSlot


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """As its facts say."""

    digests: tuple[str, ...] = ()
    states: tuple[tuple[str, bool, str, tuple[int, ...]], ...] = ()  # name, whether it is updated, dtype, shape
    kept_bytes: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.digests or self.states or self.kept_bytes)


NOTHING = Needs()


def needs_of(constants: Iterable[RawTensor], saves: Iterable[SaveSlot]) -> Needs:
    """What a request needs: its constants as they were sent, and where its saves go."""
    digests: dict[str, None] = {}
    states: dict[tuple[str, bool, str, tuple[int, ...]], None] = {}
    for raw in constants:
        if raw.state is not None:
            states[raw.state, False, raw.dtype, raw.shape] = None
        elif raw.digest is not None and not raw.is_here:
            digests[raw.digest] = None
    kept_bytes = 0
    for slot in saves:
        if slot.keep is not None:
            kept_bytes += slot.facts.num_bytes
            if slot.keep.is_state:
                states[slot.keep.name, True, slot.facts.dtype, slot.facts.shape] = None
    return Needs(digests=tuple(digests), states=tuple(states), kept_bytes=kept_bytes)
