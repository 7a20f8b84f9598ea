"""What a method measures of a run: one number a prompt, made on the service of the logits of its last token.

A metric is one of these, or a function of your own of the last logits `[prompts, vocabulary]` that gives `[prompts]`.
Logits are those that the model returns, with its own soft-cap and scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.places import token_of_each

if TYPE_CHECKING:
    from polytrace.methods.places import Prompts
    from polytrace.model import Model


@dataclass(frozen=True, slots=True)
class Run:
    """What a metric may know beside the logits."""

    model: Model
    batch: Prompts
    clean: Any = None  # logits of the clean run, as this run's; None in that one
    repeats: int = 1  # runs of each prompt, one after another


@dataclass(frozen=True, slots=True)
class Metric:
    """A name, and what is recorded: logits and the run to one number a prompt."""

    name: str
    of: Callable[[Any, Run], Any]
    is_whole: bool = False  # its logits are those of every token `[prompts, longest, vocabulary]`


def logit_difference(right: Any, wrong: Any) -> Metric:
    """By how much one token's logit leads another's. Tokens: an id or a text, one for all prompts or a list of them."""

    def of(logits: Any, run: Run) -> Any:
        return _pick(logits, run, right) - _pick(logits, run, wrong)

    return Metric("logit difference", of)


def logit(token: Any) -> Metric:
    """A token's logit."""
    return Metric("logit", lambda logits, run: _pick(logits, run, token))


def probability(token: Any) -> Metric:
    """A token's probability."""
    return Metric("probability", lambda logits, run: _pick(logits.softmax(-1), run, token))


def log_probability(token: Any) -> Metric:
    """A token's log-probability, to the base e."""
    return Metric("log-probability", lambda logits, run: _pick(logits.log_softmax(-1), run, token))


def divergence() -> Metric:
    """KL(clean || run) of the next token's distributions, in nats: 0 of the clean run."""

    def of(logits: Any, run: Run) -> Any:
        clean = (logits if run.clean is None else run.clean).log_softmax(-1)
        return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)

    return Metric("KL to the clean run", of)


def loss(start: int = 1) -> Metric:
    """The mean loss of a prompt's own tokens from position `start` on, in nats a token.

    The first token has none. Prompts of different lengths take a `start` that is counted from the end.
    """

    def of(logits: Any, run: Run) -> Any:
        sequences = [own for own in run.batch.sequences for _ in range(run.repeats)]
        longest = max(map(len, sequences))
        if start >= 0 and min(map(len, sequences)) != longest:
            raise GraphError("prompts differ in length: count `start` from the end", where=user_line())
        first = start if start >= 0 else longest + start
        if not 1 <= first < longest or (start < 0 and min(map(len, sequences)) <= -start):
            shortest = min(map(len, sequences))
            raise GraphError(
                f"there is no loss from position {start} on in {shortest} tokens: the first has none", where=user_line()
            )
        told = logits[:, first - 1 : -1].log_softmax(-1)
        rows = [[prompt] for prompt in range(len(sequences))]
        answers = [list(own[first - longest :]) for own in sequences]
        return -told[rows, list(range(longest - first)), answers].mean(-1)

    return Metric("loss", of, is_whole=True)


def as_metric(metric: Metric | Callable[[Any], Any]) -> Metric:
    """A metric, or a function of the last logits `[prompts, vocabulary]`."""
    if isinstance(metric, Metric):
        return metric
    if not callable(metric):
        raise GraphError(
            "a metric is one of polytrace.methods (logit_difference, probability, ...) or a function of the last "
            f"logits, not {metric!r}",
            where=user_line(),
        )
    name = getattr(metric, "__name__", "metric")
    return Metric("metric" if name == "<lambda>" else name, lambda logits, _run: metric(logits))


def measure(metric: Metric, run: Run) -> Any:
    """Records a metric of the prompts of the open invoke: `[prompts]`, not saved yet."""
    value = metric.of(logits_for(metric, run.model), run)
    count = len(run.batch) * run.repeats
    shape = tuple(getattr(value, "shape", ()))
    if shape == () and count == 1 and hasattr(value, "reshape"):
        return value.reshape(1)
    if shape != (count,):
        raise GraphError(
            f"the metric {metric.name!r} gives {list(shape)} for {count} prompts: it has to give one number a prompt, "
            f"[{count}]",
            where=user_line(),
        )
    return value


def logits_for(metric: Metric, model: Model) -> Any:
    """Those of the open invoke that a metric is of."""
    return model.output.logits if metric.is_whole else model.output.logits[:, -1]


def _pick(values: Any, run: Run, tokens: Any) -> Any:
    """Of `[prompts, vocabulary]` each prompt's token."""
    ids = token_of_each(run.model, tokens, len(run.batch))
    if len(set(ids)) == 1:
        return values[:, ids[0]]
    every = [token for token in ids for _ in range(run.repeats)]
    return values[list(range(len(every))), list(every)]
