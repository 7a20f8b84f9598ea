"""What the parts of a decoder layer are called in this engine: values that `engine.anatomy` finds and others read.

Owns the words alone: whose output holds the queries of each head, who takes and gives what attention and the MLP do,
how that is added to the residual. Paths are in the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.own_formula import OwnFormula

Role = str  # "q", "k", "v" of attention; "gate", "up" of an MLP


@dataclass(frozen=True, slots=True)
class Packed:
    """Where a role's features lie in a module's output (or its input, for what is projected back)."""

    module: str  # path in the layer
    order: tuple[Role, ...]  # whose features it holds, one after another; the role alone: all of it
    is_interleaved: bool = False  # ... of the first key/value head, then of the second


@dataclass(frozen=True, slots=True)
class Added:
    """What attention or the MLP adds to the residual: a module's output, or the first of its outputs."""

    module: str  # path in the layer; of several that give it, the one with most inside it
    scale: float = 1.0  # so many times it is added
    is_normed: bool = False  # it norms, or changes otherwise, what attention or the MLP gave

    @property
    def is_scaled(self) -> bool:
        """Whether the layer adds something else than the output itself."""
        return abs(self.scale - 1) > 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A layer's attention or its MLP: the smallest module with all of it, and who takes and gives its hidden states."""

    module: str  # "": its modules lie in the layer itself
    taken: str | None  # whose input is what it takes
    given: str | None  # whose output is what it gives, without the residual
    added: str | None = None  # whose output is, as it is, what the layer adds to the residual
    note: str | None = None  # what the layer does to that before it adds it


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Of one kind of layer: paths are in the layer, "" is the layer itself."""

    attention: str | None  # the module that attends
    roles: Mapping[Role, Packed] = field(default_factory=dict)
    out: str | None = None  # takes all heads' results side by side
    mid: str | None = None  # its input is the residual between attention and MLP
    why_no_mid: str = ""
    is_parallel: bool = False  # attention and MLP run side by side
    norm_behind: str | None = None  # of families that norm what attention gave before they add it
    scale: float = 1.0  # of families that scale it then
    attention_adds: Added | None = None
    mlp_adds: Added | None = None
    mlp: str | None = None  # the module that holds the neurons
    act: str | None = None  # its input is the neurons before their activation
    down: str | None = None  # its input is the neurons
    router: tuple[str, tuple[int | str, ...]] | None = None  # whose output, and where in it, has a logit an expert
    experts: str | None = None
    formula: OwnFormula | None = None  # of an attention module that does not attend by the engine's function
    dropout: str | None = None  # the family's own module for dropping attention weights
    attention_block: Block | None = None
    mlp_block: Block | None = None
