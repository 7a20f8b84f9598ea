"""Function vectors: the few heads that carry what a prompt asks for, and what they add, as one vector.

Todd et al., Function Vectors in Large Language Models (2023, arXiv:2310.15213); Hendel et al., In-Context Learning
Creates Task Vectors (2023, arXiv:2310.15916). `steer(model, prompts, found.vector, layer, positions=-1)` adds it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.imports import needs_torch
from polytrace.methods.labels import labelled
from polytrace.methods.places import Token, prompts_of, token_of_each

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.model import Model

_SCORES = ("probability", "log_probability")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Prompts that ask for something, the same without it, and the answers that the former ask for."""

    clean: Any  # what `model.trace` takes
    corrupt: Any
    answers: Sequence[Token]  # one for each corrupt prompt: its first token


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FunctionVector:
    """What the heads add at the last token, on average over the clean prompts."""

    vector: Any  # [hidden]
    heads: tuple[tuple[int, int], ...]  # (layer, head), the most effective first
    effects: DataArray  # [layer, head]
    receipt: Receipt


def few_shot_task(
    pairs: Sequence[tuple[str, str]],
    *,
    shots: int = 10,
    prompts: int = 25,
    question: str = "Q: ",
    answer: str = "\nA:",
    end: str = "\n\n",
    first_token: Any = None,
    seed: int = 0,
) -> Task:
    """Prompts of `shots` solved examples and a question; corrupt, the examples' answers are shuffled among them.

    An example reads `question + x + answer + " " + y + end`. The corrupt prompts have other examples and questions
    than the clean ones. `first_token`: from an answer to its token, by default the answer with a space before it, which
    is to be one token.
    """
    if len(pairs) <= shots or shots < 2:
        told = f"{shots} shots need at least {max(2, shots) + 1} pairs, and there are {len(pairs)}"
        raise GraphError(told, where=user_line())
    draw = random.Random(seed)
    clean: list[str] = []
    corrupt: list[str] = []
    answers: list[Token] = []
    for number in range(2 * prompts):
        *examples, (asked, wanted) = draw.sample(list(pairs), shots + 1)
        ys = [y for _, y in examples]
        if number >= prompts:
            draw.shuffle(ys)
        shown = "".join(f"{question}{x}{answer} {y}{end}" for (x, _), y in zip(examples, ys, strict=True))
        (clean if number < prompts else corrupt).append(f"{shown}{question}{asked}{answer}")
        if number >= prompts:
            answers.append(first_token(wanted) if first_token else f" {wanted}")
    return Task(clean=clean, corrupt=corrupt, answers=answers)


def head_effects(model: Model, tasks: Task | Sequence[Task], *, score: str = "probability") -> DataArray:
    """The average indirect effect of each head, `[layer, head]`: averaged over prompts, then over tasks.

    What a head finds at the last token of the clean prompts on average (`z`) is put in its place at the last token of
    each corrupt one; the effect is by how much the answer's probability (or its logarithm) grows. One request a task,
    with an invoke for each head, of which one number comes back.
    """
    needs_torch("head_effects")
    found = [_run(model, task, score, None, 1)[1] for task in ([tasks] if isinstance(tasks, Task) else tasks)]
    if not found:
        raise GraphError("there are no tasks", where=user_line())
    return _effects(sum(found[1:], start=found[0]) / len(found), score)


def function_vector(
    model: Model, task: Task, *, top_k: int = 10, effects: DataArray | None = None, score: str = "probability"
) -> FunctionVector:
    """The sum of what the `top_k` most effective heads add at the last token of the task's clean prompts.

    `effects`: those of `head_effects` over several tasks, as in the paper; by default they are measured on this task,
    in the same request. What heads add is `head_out`: before a norm behind attention, where a family has one.
    """
    torch = needs_torch("function_vector")
    given = None if effects is None else torch.tensor(effects.values)
    vector, measured, best, receipt = _run(model, task, score, given, top_k)
    width = measured.shape[1]
    return FunctionVector(
        vector=vector,
        heads=tuple(divmod(place, width) for place in best.tolist()),
        effects=_effects(measured, score),
        receipt=receipt,
    )


def _run(model: Model, task: Task, score: str, given: Any, top_k: int) -> tuple[Any, Any, Any, Receipt]:
    """The vector `[hidden]`, the effects `[layers, heads]`, the places of the best, the receipt."""
    torch = needs_torch("function vectors")
    if score not in _SCORES:
        raise GraphError(f"score is {' or '.join(map(repr, _SCORES))}, not {score!r}", where=user_line())
    clean, corrupt = (prompts_of(model, prompts).ids for prompts in (task.clean, task.corrupt))
    answers = token_of_each(model, list(task.answers), len(corrupt), "answers")
    layers = list(model.layers)
    with model.trace() as tracer:
        with tracer.invoke(clean):
            means = [layer.z[:, -1].mean(0) for layer in layers]  # [heads, features]
            added = torch.cat([layer.head_out[:, -1].float().mean(0) for layer in layers])  # [all heads, hidden]
        widths = {mean.shape[0] for mean in means}
        if len(widths) > 1:
            raise GraphError(f"layers differ in their number of heads: {sorted(widths)}", where=user_line())
        (width,) = widths
        if not 1 <= top_k <= width * len(layers):
            raise GraphError(f"top_k is 1-{width * len(layers)}, not {top_k!r}", where=user_line())
        effects = given
        if effects is None:
            with tracer.invoke(corrupt):
                plain = _score(model, answers, score)
            changed = []
            for layer, mean in zip(layers, means, strict=True):
                for head in range(width):
                    with tracer.invoke(corrupt):
                        layer.z[:, -1, head] = mean[head].expand(len(corrupt), -1)
                        changed.append(_score(model, answers, score))
            effects = (torch.stack(changed) - plain).reshape(len(layers), width).save()
        elif tuple(effects.shape) != (len(layers), width):
            told = f"effects are [{len(layers)}, {width}], not {list(effects.shape)}"
            raise GraphError(told, where=user_line())
        best = effects.flatten().topk(top_k).indices
        best = best.save() if given is None else best
        vector = added[best].sum(0).save()
    return vector, effects, best, tracer.receipt


def _score(model: Model, answers: Sequence[int], score: str) -> Any:
    logits = model.output.logits[:, -1].float()
    spread = logits.softmax(-1) if score == "probability" else logits.log_softmax(-1)
    return spread[list(range(len(answers))), list(answers)].mean()


def _effects(values: Any, score: str) -> DataArray:
    return labelled(values, {"layer": None, "head": None}, name=f"change of {score.replace('_', ' ')}")
