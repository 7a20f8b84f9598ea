"""Random programs in the whole language: a list of statements for each invoke.

What statements do is in `language_meanings`, how programs are drawn in `language_author`, how a user writes them in
`language_written`; `language_by_hand` tells what a program must give.
"""

from __future__ import annotations

from dataclasses import dataclass

from language_sites import Spot

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Read:
    name: str
    spot: Spot


@dataclass(frozen=True)
class Weigh:
    """A parameter, a buffer or a weight by name, and which of its rows."""

    name: str
    owner: str
    weight: str
    row: int


@dataclass(frozen=True)
class Mask:
    """`tracer.mask`."""

    name: str


@dataclass(frozen=True)
class Apply:
    """An operation of the table, or one that takes a view apart (`TAKEN`)."""

    name: str
    op: str
    operands: tuple[str, ...]
    numbers: tuple[int, int]


@dataclass(frozen=True)
class Call:
    """A module called on a value."""

    name: str
    path: str
    operand: str
    shape: tuple[int, ...] | None  # that the value is brought into


@dataclass(frozen=True)
class Edit:
    """In-place code, or a value assigned."""

    spot: Spot
    how: str
    operand: str | None
    numbers: tuple[int, int]
    assigns: bool = False


@dataclass(frozen=True)
class Skip:
    """A module is not run; it gives its input, scaled, and a vector made of a value."""

    path: str
    operand: str | None


Statement = Read | Weigh | Mask | Apply | Call | Edit | Skip


@dataclass(frozen=True)
class Block:
    """An invoke; without prompts it means those of all before it. The last logits are saved last."""

    prompts: tuple[Prompt, ...]
    statements: tuple[Statement, ...]
    saved: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    family: str
    blocks: tuple[Block, ...]

    @property
    def edits(self) -> list[Statement]:
        return [each for block in self.blocks for each in block.statements if isinstance(each, (Edit, Skip))]

    def prompts_of(self, number: int) -> tuple[Prompt, ...]:
        own = self.blocks[number].prompts
        return own or tuple(prompt for block in self.blocks[:number] for prompt in block.prompts)
