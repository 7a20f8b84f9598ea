"""How an activation of TransformerLens's is read and written in an open trace.

`run` has what hooks of this run have put in place of values that no tensor of the model is (a norm's scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.transformer_lens.facts import NormFacts
from polytrace.modules import Module
from polytrace.storage import is_recorded

Run = dict[str, Any]  # values that were written, by name of the activation


class Access(Protocol):
    """One activation."""

    @property
    def is_tensor(self) -> bool:
        """Whether the model itself has this tensor, so that in-place code reaches it."""

    def read(self, run: Run) -> Any: ...

    def write(self, run: Run, value: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Point:
    """A named point, or the input or output of a module that is one tensor."""

    module: Module
    name: str
    is_tensor: bool = True

    def read(self, run: Run) -> Any:
        return first_tensor(getattr(self.module, self.name))

    def write(self, run: Run, value: Any) -> None:
        found = getattr(self.module, self.name)
        if is_recorded(found):
            setattr(self.module, self.name, value)
        else:
            found[0] = value  # of a tuple, the tensor that everyone means


@dataclass(frozen=True, slots=True)
class Scale:
    """What a norm divides by, `[..., 1]` in float32: `sqrt(var + eps)`, of an RMS norm `sqrt(mean(x**2) + eps)`."""

    name: str
    norm: Module
    facts: NormFacts
    is_tensor: bool = False

    def read(self, run: Run) -> Any:
        if self.name in run:
            return run[self.name]
        return self.facts.scale_of(self.norm.input)

    def write(self, run: Run, value: Any) -> None:
        run[self.name] = value
        normalized = self.facts.centred(self.norm.input) / value
        Point(self.norm, "output").write(run, self.facts.with_weights(self.norm, normalized))


@dataclass(frozen=True, slots=True)
class Normalized:
    """What a norm gives before its weight and bias."""

    name: str
    norm: Module
    facts: NormFacts
    scale: Scale
    is_tensor: bool = False

    def read(self, run: Run) -> Any:
        if self.name in run:
            return run[self.name]
        taken = self.norm.input
        return (self.facts.centred(taken) / self.scale.read(run)).to(taken.dtype)

    def write(self, run: Run, value: Any) -> None:
        run[self.name] = value
        Point(self.norm, "output").write(run, self.facts.with_weights(self.norm, value))


@dataclass(frozen=True, slots=True)
class Difference:
    """What lies between two states of the residual, where no module gives just that."""

    before: Access
    behind: Access
    is_tensor: bool = False

    def read(self, run: Run) -> Any:
        return self.behind.read(run) - self.before.read(run)

    def write(self, run: Run, value: Any) -> None:
        self.behind.write(run, self.before.read(run) + value)


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """One that stands for a tensor which others read too."""

    name: str
    of: Access
    reason: str
    is_tensor: bool = False

    def read(self, run: Run) -> Any:
        return self.of.read(run)

    def write(self, run: Run, value: Any) -> None:
        raise GraphError(f"{self.name} cannot be changed: {self.reason}", where=user_line())


def first_tensor(value: Any) -> Any:
    """The tensor of a module's output: itself, or the first of a tuple."""
    return value if is_recorded(value) else value[0]
