"""Random programs that skip layers, on many families: merged, alone and by plain hooks."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, model_of
from programs import difference, few_rows
from small import loaded
from torch import Tensor

from polytrace.model import Model

FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32], [3, 14, 15, 92, 7, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
NAMES = ["llama", "gpt2", "gemma3", "gpt_oss"]


LATE = -1


@dataclass(frozen=True)
class Part:
    """What one invoke does: layers that it skips, with what; layers after which a token is steered."""

    prompt: int
    # layer -> the layer whose output it gives; None: its input; LATE: the last layer's of the invoke before
    skips: dict[int, int | None] = field(default_factory=dict)
    steered: dict[int, int] = field(default_factory=dict)  # layer -> position


def draw(seed: int, num_layers: int) -> list[Part]:
    dice = random.Random(seed)
    parts = []
    for _ in range(dice.randint(2, 7)):
        prompt = dice.randrange(len(PROMPTS)) if not parts or dice.random() < 0.5 else parts[-1].prompt
        skips: dict[int, int | None] = {}
        for layer in range(num_layers):
            if dice.random() < 0.35:
                skips[layer] = None if layer == 0 or dice.random() < 0.5 else dice.randrange(layer)
                if parts and parts[-1].prompt == prompt and dice.random() < 0.2:
                    skips[layer] = LATE
        steered = {n: dice.randrange(len(PROMPTS[prompt])) for n in range(num_layers) if dice.random() < 0.2}
        parts.append(Part(prompt, skips, steered))
    return parts


def record(model: Model, name: str, parts: list[Part], **options: Any) -> tuple[list[Tensor], Any]:
    family, saved = FAMILIES[name], []
    with model.trace(**options) as tracer:
        outputs: list[Any] = []
        for part in parts:
            late, outputs = outputs[-1:], []
            with tracer.invoke(PROMPTS[part.prompt]):
                for number, layer in enumerate(model.get_submodule(family.layers)):
                    if number in part.skips:
                        source = part.skips[number]
                        layer.skip(layer.input if source is None else late[0] if source == LATE else outputs[source])
                    if number in part.steered:
                        layer.output[:, part.steered[number]] += 0.5
                    outputs.append(layer.output)
                saved += [getattr(model, family.logits().module).output[:, -1].save(), outputs[-2].save()]
    return saved, tracer.receipt


def by_hand(plain: Any, name: str, parts: list[Part]) -> list[Tensor]:
    found: list[Tensor] = []
    outputs: list[Tensor] = []
    for part in parts:
        logits, outputs = run_by_hand(plain, name, part, outputs[-1:])
        found += [logits, outputs[-2]]
    return found


def run_by_hand(plain: Any, name: str, part: Part, late: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits of the last token and the output of every layer."""
    family = FAMILIES[name]
    outputs: list[Tensor] = []

    def hook(number: int) -> Any:
        def run(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if number in part.skips:
                source = part.skips[number]
                own = args[0] if args else kwargs["hidden_states"]
                hidden = own if source is None else late[0] if source == LATE else outputs[source]
            hidden = hidden.clone()
            if number in part.steered:
                hidden[:, part.steered[number]] += 0.5
            outputs.append(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return run

    with ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(plain.get_submodule(family.layers)):
            stack.callback(layer.register_forward_hook(hook(number), with_kwargs=True).remove)
        logits = plain(torch.tensor([PROMPTS[part.prompt]]), use_cache=False).logits
    return logits[:, -1], outputs


@pytest.mark.parametrize("name", NAMES)
def test_programs_that_skip_layers_are_what_hooks_by_hand_give_merged_and_alone(name: str, tmp_path: Path) -> None:
    plain, num_layers = model_of(name), FAMILIES[name].num_layers
    went_around = 0
    with loaded(plain, tmp_path) as model:
        for seed in range(4):
            parts = draw(seed, num_layers)
            together, receipt = record(model, name, parts)
            assert difference(together, by_hand(plain, name, parts)) <= FLOAT32_TOLERANCE, (seed, parts)
            apart, unshared = record(model, name, parts, sharing="off")
            assert all(map(torch.equal, together, apart)), (seed, parts)
            if all(LATE not in part.skips.values() for part in parts):
                alone = [value for part in parts for value in record(model, name, [part])[0]]
                assert all(map(torch.equal, together, alone)), (seed, parts)
            with few_rows(model.backend, 24):  # several passes, which leave each other rows
                assert all(map(torch.equal, together, record(model, name, parts)[0])), (seed, parts)
            assert receipt.token_layers <= unshared.token_layers
            if len(unshared.passes) == 1:
                runs = sum(len(PROMPTS[part.prompt]) * (num_layers - len(part.skips)) for part in parts)
                assert sum(unshared.passes[0].layer_rows) <= runs
                went_around += sum(len(part.skips) for part in parts)
    assert went_around > 5


def test_a_request_that_fails_before_it_has_skipped_hurts_nobody(tmp_path: Path) -> None:
    plain = model_of("llama")
    with loaded(plain, tmp_path) as model:

        def skipping(*, fails: bool) -> Any:
            with model.trace(PROMPTS[0], run=False) as tracer:
                layer = model.model.layers[1]
                hidden = layer.input
                if fails:  # an index that is known to be out of range only when it is there
                    hidden = hidden.index_select(1, hidden[0, :, 0].argsort() + 100)
                layer.skip(hidden)
                model.lm_head.output.save()
            return model.backend.work_out(tracer.built_request())

        ((name, alone),) = model.backend.run_together([skipping(fails=False)])[0].values.items()
        first, failed, last = model.backend.run_together([skipping(fails=fails) for fails in (False, True, False)])
        assert failed.error is not None and failed.error.where is not None
        assert torch.equal(first.values[name], alone) and torch.equal(last.values[name], alone)
        assert first.receipt.passes[0].requests == 3
