"""Gates: what decides in the same run, for each prompt or token, whether it is steered.

Lee et al., Programming Refusal with Conditional Activation Steering (2024, arXiv:2409.05907).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.methods.imports import needs_torch
from polytrace.methods.places import layers_of

if TYPE_CHECKING:
    from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gate:
    """Steers only where `residual @ direction + bias` of a layer is above a threshold, in the same run.

    With a position one number of each prompt decides for all of its tokens; without, each token decides for itself.
    """

    direction: Any  # [hidden]: a probe's weights, a difference of means
    layer: int  # at or before those that are steered
    threshold: float = 0.0
    bias: float = 0.0
    position: int | None = None
    of: str = "resid_post"

    def score(self, model: Model) -> Any:
        """The number that is compared, `[sequences]` or `[sequences, tokens]`, inside a trace."""
        torch = needs_torch("a gate")
        residual = getattr(model.layers[layers_of(model, self.layer)[0]], self.of)
        rows = residual if self.position is None else residual.at(self.position)
        return rows.float() @ torch.as_tensor(self.direction, dtype=torch.float32) + self.bias


AnyGate = Gate | Callable[[], Any]  # a function gives a value of the trace, open where it is above 0
