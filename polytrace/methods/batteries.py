"""Prompt batteries: many prompts, each with named sets of target tokens, as one request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace import functions
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.labels import labelled
from polytrace.methods.places import Of, layers_of, point_of, prompts_of
from polytrace.methods.targets import Words, target_sets
from polytrace.methods.tuned import TunedLens
from polytrace.methods.unembedding import behind_head, prepare_unembedding, unembed

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import DataArray

    from polytrace.certificate import Receipt
    from polytrace.model import Model


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and its answers: `Prompt(text="The Louvre is in", answers={"right": "Paris", "wrong": "Rome"})`.

    `answers`: words, of which every first token counts (`target_tokens`), or ids of tokens, which stand as they are.
    `name` labels it in results.
    """

    text: Any  # one prompt of any kind that `model.trace` takes
    answers: Mapping[str, Words]
    name: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Battery:
    """Probabilities of sets of target tokens."""

    probability: DataArray  # prompt x target, under a lens prompt x layer x target; NaN: the prompt has no such set
    targets: tuple[Mapping[str, Sequence[int]], ...]  # of each prompt, the tokens of each set
    receipt: Receipt

    def to_dataframe(self) -> DataFrame:
        """A row for each prompt, and layer, and target."""
        return self.probability.to_dataframe().reset_index()


def run_battery(
    model: Model,
    prompts: Iterable[Prompt],
    *,
    lens: str | TunedLens | None = None,
    layers: Any = None,
    of: Of = "resid_post",
    intervention: Callable[[Prompt], object] | None = None,
    may_collide: bool = False,
    **variants: bool,
) -> Battery:
    """The probability that each prompt is gone on with by a token of each of its sets of targets, all in one request.

    `lens`: "logit" or a `TunedLens` reads `layers` (by default all) at `of` instead of what the model says at last.
    `intervention(prompt)` is called in the trace of each prompt and may change anything there, as in
    `model.layers[3].output[0][:, -1] += vector`. `variants` and `may_collide` as of `target_sets`. A
    number for each prompt, layer and set is all that comes back.
    """
    asked = list(prompts)
    for number, prompt in enumerate(asked):
        if not isinstance(prompt, Prompt):
            raise GraphError(f"a battery is of Prompts; number {number} is no Prompt", where=user_line())
    if not asked:
        raise GraphError("there are no prompts", where=user_line())
    if lens is not None and lens != "logit" and not isinstance(lens, TunedLens):
        raise GraphError(f"lens is 'logit' or a TunedLens, not {lens!r}", where=user_line())
    targets = tuple(target_sets(model, prompt.answers, may_collide=may_collide, **variants) for prompt in asked)
    sequences = [_one_sequence(model, number, prompt) for number, prompt in enumerate(asked)]
    numbers = layers_of(model, layers) if lens is not None else None
    prepare_unembedding(model)
    translate = lens.translation(model, of) if isinstance(lens, TunedLens) else None
    saved = []
    with model.trace() as tracer:
        for prompt, sequence, sets in zip(asked, sequences, targets, strict=True):
            with tracer.invoke([list(sequence)]):
                if intervention is not None:
                    intervention(prompt)
                if numbers is None:
                    logits = [behind_head(model, model.lm_head.output[:, -1])]
                else:
                    last = {number: point_of(model.layers[number], of)[:, -1] for number in numbers}
                    logits = [unembed(model, translate(h, n) if translate else h) for n, h in last.items()]
                saved.append(functions.stack([_shares(one, sets) for one in logits]).save())
    return Battery(
        probability=_array(asked, sequences, targets, numbers, saved), targets=targets, receipt=tracer.receipt
    )


def _shares(logits: Any, sets: Mapping[str, Sequence[int]]) -> Any:
    """Of logits `[1, vocabulary]` the probability of each set, `[sets]`."""
    probability = logits.float().softmax(-1)
    return functions.stack([probability[0, list(tokens)].sum() for tokens in sets.values()])


def _one_sequence(model: Model, number: int, prompt: Prompt) -> tuple[int, ...]:
    sequences = prompts_of(model, prompt.text).sequences
    if len(sequences) != 1:
        raise GraphError(f"prompt {number} of the battery is {len(sequences)} prompts, not one", where=user_line())
    return sequences[0]


def _array(
    asked: Sequence[Prompt],
    sequences: Sequence[Sequence[int]],
    targets: Sequence[Mapping[str, Sequence[int]]],
    layers: list[int] | None,
    saved: Sequence[Any],
) -> DataArray:
    import numpy as np

    names = list(dict.fromkeys(name for sets in targets for name in sets))
    whole = np.full((len(asked), len(layers or [0]), len(names)), np.nan, dtype=np.float32)
    for row, (sets, values) in enumerate(zip(targets, saved, strict=True)):
        whole[row][:, [names.index(name) for name in sets]] = np.asarray(values)
    dims: dict[str, Any] = {"prompt": None, "layer": layers, "target": names}
    if layers is None:
        whole = whole[:, 0]
        del dims["layer"]
    labels = [prompt.name or str(prompt.text) for prompt in asked]
    return labelled(whole, dims, name="probability", prompts=labels)
