"""What learning methods share: what a run should say, and steps downhill as runs of one request.

A step is an invoke with what the step before has learnt, a backward, and an update where the values are; only the end
comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.metrics import Metric, Run, as_metric, measure
from polytrace.methods.places import Prompts, token_of_each
from polytrace.optim import SGD, Adam

if TYPE_CHECKING:
    from polytrace.model import Model
    from polytrace.tracing import Tracer

MAX_STEPS = 100  # of a request; what is learnt begins where it ended with `start`
_OPTIMISERS: dict[str, Callable[[float], Adam | SGD]] = {"adam": Adam, "sgd": SGD}


@dataclass(frozen=True, slots=True)
class Goal:
    """What the runs of some prompts are to say."""

    model: Model
    batch: Prompts
    tokens: list[int] | None  # of each prompt
    metric: Metric | None  # to be made large, where there are no tokens

    @staticmethod
    def of(model: Model, batch: Prompts, targets: Any) -> Goal:
        """`targets`: a token for all prompts or a list with one each, or a metric. Raises GraphError for others."""
        if isinstance(targets, Metric) or callable(targets):
            return Goal(model, batch, None, as_metric(targets))
        return Goal(model, batch, token_of_each(model, targets, len(batch), "targets"), None)

    def loss(self) -> Any:
        """Of the open invoke, the mean over its prompts: less is better. In nats for tokens."""
        if self.metric is not None:
            return -measure(self.metric, Run(self.model, self.batch)).float().mean()
        assert self.tokens is not None
        told = self.model.output.logits[:, -1].float().log_softmax(-1)
        return -told[list(range(len(self.tokens))), self.tokens].mean()

    def hits(self) -> Any | None:
        """Of the open invoke, the most likely token of each prompt; None where no tokens are the goal."""
        return None if self.tokens is None else self.model.output.logits[:, -1].argmax(-1)

    def share(self, said: Any | None) -> float | None:
        """Of prompts that say their token, by what `hits` gave."""
        if said is None or self.tokens is None:
            return None
        num_right = sum(int(one) == token for one, token in zip(said.tolist(), self.tokens, strict=True))
        return num_right / len(self.tokens)


@dataclass(frozen=True, slots=True)
class Descent:
    """So many steps of an optimiser."""

    steps: int
    optimiser: Adam | SGD

    @staticmethod
    def of(steps: Any, lr: float, optimiser: str) -> Descent:
        """Raises GraphError for what is no number of steps and no optimiser."""
        count = scalar(steps)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_STEPS:
            raise GraphError(
                f"steps are 1-{MAX_STEPS} a request, not {steps!r}: to go on, give what was learnt as `start`",
                where=user_line(),
            )
        if optimiser not in _OPTIMISERS:
            known = " or ".join(map(repr, _OPTIMISERS))
            raise GraphError(f"the optimiser is {known}, not {optimiser!r}", where=user_line())
        return Descent(count, _OPTIMISERS[optimiser](lr))

    def run(
        self,
        tracer: Tracer,
        goal: Goal,
        start: Any,
        change: Callable[[Any], None],
        bound: Callable[[Any], Any] = lambda value: value,
    ) -> tuple[Any, list[Any], Any | None]:
        """In an open trace: the last value, the loss before each step and after the last, and what is said then.

        `change` edits the open invoke with a value; `bound` makes an updated value an allowed one.
        """
        value, losses = tracer.value(start), []
        for step in range(self.steps + 1):
            with tracer.invoke(goal.batch.ids):
                change(value)
                loss = goal.loss()
                said = goal.hits() if step == self.steps else None
            losses.append(loss.detach())
            if step < self.steps:
                with loss.backward():
                    gradient = value.grad
                (value,) = self.optimiser.step([value], [gradient])
                value = bound(value)
        return value, losses, said
