"""Causal tracing: the subject is blurred by noise; which states of the clean run bring the answer back?

Meng et al., "Locating and Editing Factual Associations in GPT" (2022, arXiv:2202.05262, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from polytrace import functions
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Places, absent_in, axis_of, columns_of, places_in, texts_at
from polytrace.methods.knockout import around
from polytrace.methods.metrics import Metric, Run, as_metric, logits_for, measure
from polytrace.methods.places import GIVEN, Prompts, layers_of, prompts_of, value_of
from polytrace.methods.sweeps import Scale, Sweep, cell, collect

if TYPE_CHECKING:
    from polytrace.model import Model
    from polytrace.tracing import Tracer

RESTORED = ("resid_post", "mlp", "attention")


def trace_causes(
    model: Model,
    prompts: Any,
    subject: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    restore: str | Sequence[str] = RESTORED,
    window: int = 10,
    samples: int = 10,
    noise: float = 3.0,
    spread: float | None = None,
    seed: int = 0,
    layers: Any = None,
    positions: Any = None,
    normalise: bool = False,
) -> Sweep:
    """What brings the answer back into a run whose subject is blurred: `effect` [restored, layer, position].

    `subject`: the tokens that are blurred: a text in the prompt, positions, or one of these for each prompt. To their
    embeddings is added normal noise of `noise` times `spread`, which is by default the standard deviation of the
    prompts' own embeddings; `samples` times over, drawn from `seed` alone, the same for every prompt, and the metric's
    mean is taken. `restore`: what is put back from the clean run, at one position: a point with a row for each token or
    what "attention" or "mlp" give; of "attention" and "mlp" in a window of so many layers around the one that is named
    (those from layer - window // 2 on, cut at the model's ends), of the others in one layer. `positions` as in
    `patch_activations`. `normalise`: 0 is the blurred run's metric and 1 the clean one's; else the metric itself.
    """
    batch, measured, numbers = prompts_of(model, prompts), as_metric(metric), layers_of(model, layers)
    kinds = [restore] if isinstance(restore, str) else list(restore)
    if samples < 1 or window < 1 or not kinds:
        raise GraphError(
            f"samples and window are at least 1 and something is restored, not {samples}, {window} and {kinds}",
            where=user_line(),
        )
    axis, blurred = axis_of(batch, positions), places_in(model, batch, subject)
    if not all(blurred):
        raise GraphError("each prompt has a subject, of at least one token", where=user_line())
    steps = [axis.places(model, batch, step) for step in range(len(axis.labels))]
    cells: dict[tuple[int, ...], Any] = {}
    with model.trace(seed=seed) as tracer:
        runs = _Runs(tracer, model, batch, blurred, measured, samples)
        runs.record_clean(kinds, noise, spread)
        with runs.blurred():
            worst = runs.measured().save()
        for first, kind in enumerate(kinds):
            for row, number in enumerate(numbers):
                for step, places in enumerate(steps):
                    if any(places):
                        with runs.blurred():
                            for layer in around(number, window if kind in GIVEN else 1, model):
                                runs.restore(kind, layer, places)
                            cells[first, row, step] = runs.measured().save()
    return collect(
        cells,
        {"restored": kinds, "layer": numbers, "position": axis.labels},
        batch,
        name=measured.name,
        scale=Scale.RESTORED if normalise else Scale.VALUE,
        receipt=tracer.receipt,
        clean=runs.best,
        corrupt=worst,
        tokens={"position": texts_at(model, batch, axis)},
        absent=absent_in(steps),
    )


class _Runs:
    """The invokes of one trace. Each prompt is there `samples` times, one after another, with a noise each."""

    def __init__(
        self, tracer: Tracer, model: Model, batch: Prompts, subject: Places, metric: Metric, samples: int
    ) -> None:
        self.tracer, self.model, self.batch, self.metric, self.samples = tracer, model, batch, metric, samples
        self.ids = [own for own in batch.ids for _ in range(samples)]
        self.subject = subject
        self.clean: dict[tuple[str, int], Any] = {}

    def record_clean(self, kinds: Sequence[str], noise: float, spread: float | None) -> None:
        """The clean run: its metric, what is restored from it, and how far the noise goes."""
        with self.tracer.invoke(self.batch.ids):
            embedded = self.model.embed_tokens.output
            self.best = measure(self.metric, Run(self.model, self.batch)).save()
            for kind in kinds:
                for number in range(len(self.model.layers)):
                    self.clean[kind, number] = value_of(self.model, number, kind)
            longest = max(map(len, self.subject))
            drawn = functions.randn(self.samples, longest, embedded.shape[-1])
            self.noise = drawn * (noise * (self._spread(embedded) if spread is None else spread))
            self.logits = logits_for(self.metric, self.model)

    @contextmanager
    def blurred(self) -> Iterator[None]:
        """An invoke whose subjects are blurred."""
        with self.tracer.invoke(self.ids):
            embedded = self.model.embed_tokens.output
            for prompt, own in enumerate(self.subject):
                embedded[self._runs_of(prompt), columns_of(self.batch, prompt, own)] += self.noise[:, : len(own)]
            yield

    def measured(self) -> Any:
        """The metric of the open invoke, of every run of every prompt."""
        clean = self.logits.repeat_interleave(self.samples, 0)
        return measure(self.metric, Run(self.model, self.batch, clean, self.samples))

    def restore(self, kind: str, number: int, places: Places) -> None:
        """Puts states of the clean run back, the same into all runs of a prompt."""
        target, source = value_of(self.model, number, kind), self.clean[kind, number]
        for prompt, own in enumerate(places):
            if own:
                columns = columns_of(self.batch, prompt, own)
                value = source[cell(kind, (slice(prompt, prompt + 1), columns))]
                target[cell(kind, (self._runs_of(prompt), columns))] = value.expand(self.samples, *value.shape[1:])

    def _runs_of(self, prompt: int) -> slice:
        return slice(prompt * self.samples, (prompt + 1) * self.samples)

    def _spread(self, embedded: Any) -> Any:
        """The standard deviation of all features of all tokens, pads left out."""
        if not self.batch.are_ragged:
            return embedded.std()
        mask, count = self.tracer.mask[..., None], sum(self.batch.lengths) * embedded.shape[-1]
        mean = (embedded * mask).sum() / count
        return ((((embedded - mean) * mask) ** 2).sum() / (count - 1)) ** 0.5
