"""What a tiny twin has shown of how ranks split a model (`engine.twins`), for the gate of the served one."""

from __future__ import annotations

from dataclasses import dataclass

from engine.source_sites import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The same on every rank."""

    operations: frozenset[Place]  # values in modules' forwards of which each rank has its slice or all
    why_no_gradients: str  # "" when gradients through the model are those of one process
    no_gradients: frozenset[Place]  # where they are not all the same; of modules' ports the way is ""
