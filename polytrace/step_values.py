"""What a save in a loop over steps gives: one value for each step that came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from polytrace.errors import GraphError
from polytrace.lines import user_line


class Steps(Sequence[Any]):
    """Values of the steps that came, in order: tensors, or arrays where torch is not installed."""

    def __init__(self, values: Mapping[int, Any]) -> None:
        self._values = dict(sorted(values.items()))

    @property
    def numbers(self) -> tuple[int, ...]:
        """The steps that they are of."""
        return tuple(self._values)

    def at(self, step: int) -> Any:
        """The value of a step. Raises GraphError when it never came."""
        if step not in self._values:
            came = f"{min(self._values)}-{max(self._values)}" if self._values else "none"
            raise GraphError(f"there is no value of step {step}: of this save's steps came {came}", where=user_line())
        return self._values[step]

    def stack(self) -> Any:
        """All as one, `[steps, ...]`. Raises GraphError where shapes differ, as that of step 0 often does."""
        values = list(self._values.values())
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) != 1:
            told = f"have the shapes {', '.join(str(list(shape)) for shape in shapes)}" if shapes else "are none"
            raise GraphError(
                f"these {len(values)} values {told}: save a part that all have (`value[:, -1]`), or take [1:]",
                where=user_line(),
            )
        if hasattr(values[0], "untyped_storage"):
            import torch

            return torch.stack(values)
        import numpy as np

        return np.stack(values)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Steps: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Steps(dict([*self._values.items()][index]))
        return [*self._values.values()][index]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values.values())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{step}: {list(value.shape)}" for step, value in [*self._values.items()][:4])
        return f"<values of {len(self)} steps: {shapes}{', ...' if len(self) > 4 else ''}>"


class OfSteps:
    """What a value that was recorded once for several steps is, behind its block: a sequence. A base of two classes."""

    steps: Steps

    @property
    def numbers(self) -> tuple[int, ...]:
        """The steps that came."""
        return self.steps.numbers

    def at(self, step: int) -> Any:
        """The value of a step."""
        return self.steps.at(step)

    def stack(self) -> Any:
        """All as one, `[steps, ...]`, where shapes agree."""
        return self.steps.stack()

    def __getitem__(self, index: Any) -> Any:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.steps)

    def __repr__(self, **kwargs: Any) -> str:
        return repr(self.steps)


def came(values: Any) -> list[Any]:
    """Those of saved values whose step came, in order. A generation may end before its last step does."""
    from polytrace.storage import is_recorded

    return [value for value in values if not is_recorded(value)]


def refuse_as_one() -> GraphError:
    """The refusal of what a sequence is not."""
    return GraphError(
        "this value has one tensor for each step that came: take one (`value[-1]`, the last), or all (`value.stack()`)",
        where=user_line(),
    )
