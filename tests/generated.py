"""Generations that users steer or ablate, and the oracle: Hugging Face's `generate` with hooks written by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from families import Family, Place
from programs import get
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampling import uniform
from polytrace.certificate import Generated
from polytrace.graph import Sampling

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Steer:
    """Adds a vector at every token of every step."""

    place: Place
    seed: int

    @property
    def places(self) -> tuple[Place, ...]:
        return (self.place,)

    def change(self, tensor: Any) -> None:
        tensor[:] += direction(self.seed, self.place.width) * self.place.width**0.5


@dataclass(frozen=True)
class Ablate:
    """Takes a direction out of several places, at every token of every step."""

    places: tuple[Place, ...]
    seed: int

    def change(self, tensor: Any) -> None:
        unit = direction(self.seed, self.places[0].width)
        tensor[:] -= (tensor @ unit)[..., None] * unit


@dataclass(frozen=True)
class User:
    """One request."""

    family: Family
    prompts: tuple[Ids, ...]
    max_new_tokens: int
    edits: tuple[Steer | Ablate, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def without_edits(self) -> User:
        return replace(self, edits=())

    def each_prompt(self) -> list[User]:
        return [replace(self, prompts=(prompt,)) for prompt in self.prompts]


def direction(seed: int, width: int) -> Tensor:
    """Of length 1."""
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def residual_places(family: Family) -> tuple[Place, ...]:
    """What is added to the residual stream, and the stream, at every layer."""
    parts = [part for part in family.parts if part[1] == "output" and part[3] == family.width]
    return tuple(family.place(layer, part) for layer in range(family.num_layers) for part in parts)


def some_user(family: Family, chosen: random.Random, *, most_tokens: int = 12) -> User:
    """A request with prompts of different lengths and an edit or two, or none."""
    prompts = tuple(
        tuple(chosen.choices(range(3, family.vocabulary), k=chosen.randint(1, 14)))
        for _ in range(chosen.choice([1, 1, 1, 2, 3]))
    )
    steer = Steer(family.residual(chosen.randrange(family.num_layers)), chosen.randrange(1000))
    ablate = Ablate(residual_places(family), chosen.randrange(1000))
    edits = chosen.choice([(), (steer,), (ablate,), (steer, ablate)])
    return User(family, prompts, chosen.randint(1, most_tokens), edits)


# By hand


@contextmanager
def edited(model: PreTrainedModel, user: User) -> Iterator[None]:
    """The model with a hook at each place that an edit changes."""
    with ExitStack() as stack, torch.no_grad():
        for edit in user.edits:
            for place in edit.places:
                module = model.get_submodule(place.module)
                stack.callback(module.register_forward_hook(_hook(edit, place)).remove)
        yield


def _hook(edit: Steer | Ablate, place: Place) -> Callable[..., Any]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        edit.change(output[place.selector[0]] if place.selector else output)
        return output

    return hook


def generate_by_hand(
    model: PreTrainedModel, user: User, *, eos: Sequence[int] = (), **options: Any
) -> tuple[list[Ids], list[Tensor]]:
    """New tokens by `generate` over all prompts at once, and each prompt's logits, `[steps, vocabulary]`."""
    longest = max(map(len, user.prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in user.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in user.prompts])
    model.generation_config.eos_token_id = list(eos) or None
    model.generation_config.pad_token_id = 0
    with edited(model, user):
        made: Any = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=user.max_new_tokens,
            output_logits=True,
            return_dict_in_generate=True,
            **{"do_sample": False, **options},
        )
    new = made.sequences[:, longest:].tolist()
    tokens = [_until(row, eos) for row in new]
    return tokens, [torch.stack(made.logits)[: len(row), place] for place, row in enumerate(tokens)]


def sample_by_hand(model: PreTrainedModel, user: User) -> list[Ids]:
    """New tokens: each by one forward of all before it, transformers' processors and a number."""
    found = []
    for place, prompt in enumerate(user.prompts):
        ids = list(prompt)
        for step in range(user.max_new_tokens):
            with edited(model, user):
                scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1].float()
            for processor in processors(user.sampling):
                scores = processor(torch.tensor([ids]), scores)
            ids.append(_drawn(scores[0], user.sampling, place, step))
        found.append(tuple(ids[len(prompt) :]))
    return found


def _drawn(scores: Tensor, sampling: Sampling, place: int, step: int) -> int:
    if not sampling.do_sample:
        return int(scores.argmax())
    sums = list(accumulate(scores.softmax(-1).tolist()))
    share = uniform(sampling.seed, place, step) * sums[-1]
    return next(token for token, total in enumerate(sums) if total > share)


def processors(sampling: Sampling) -> LogitsProcessorList:
    """What transformers' `generate` applies, in its order."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.do_sample:
        if sampling.temperature != 1:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def _until(row: list[int], ends: Sequence[int]) -> Ids:
    last = next((place for place, token in enumerate(row) if token in ends), len(row))
    return tuple(row[: last + 1])


# In polytrace


def record(model: Any, user: User, **options: Any) -> Any:
    """Writes the request as a user would; returns the tracer."""
    sampling = {name: value for name, value in asdict(user.sampling).items() if value != getattr(Sampling(), name)}
    given = {"max_new_tokens": user.max_new_tokens, "eos": None, **sampling, **options}
    with model.generate([list(prompt) for prompt in user.prompts], **given) as tracer:
        if user.edits:
            with tracer.all():
                for edit in user.edits:
                    for place in edit.places:
                        edit.change(get(model, place))
    return tracer


def serve(model: Any, backend: Any, users: Sequence[User], **options: Any) -> list[list[Generated]]:
    """How the sequences of all users went on, merged as far as the backend lets them."""
    tracers = [record(model, user, run=False, **options) for user in users]
    outcomes = backend.run_together([backend.work_out(tracer.built_request()) for tracer in tracers])
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [list(outcome.receipt.generated) for outcome in outcomes]


def ids_of(served: Sequence[Generated]) -> list[Ids]:
    return [one.ids for one in served]
