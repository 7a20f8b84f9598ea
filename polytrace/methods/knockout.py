"""Attention knockout: what does the model lose when some tokens must not look at others?

Geva et al., "Dissecting Recall of Factual Associations in Auto-Regressive Language Models" (2023, arXiv:2304.14767).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import Places, columns_of, places_in
from polytrace.methods.metrics import Metric, Run, as_metric, logits_for, measure
from polytrace.methods.places import Prompts, heads_of, layers_of, num_heads, prompts_of, value_of
from polytrace.methods.sweeps import Scale, Sweep, collect

if TYPE_CHECKING:
    from polytrace.model import Model


def knock_out_attention(
    model: Model,
    prompts: Any,
    queries: Any,
    keys: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    window: int = 1,
    layers: Any = None,
    heads: Any = None,
) -> Sweep:
    """Scores of chosen queries and keys become minus infinity in a window of layers: `effect` [layer].

    `queries`, `keys`: tokens: an int, several, a text in the prompt, or one of these for each prompt. `window`: so many
    layers around each (from layer - window // 2 on, cut at the model's ends); the paper has 9 of 48. `heads`: None is
    all. `effect` is the change of the metric against the unchanged run.

    Raises GraphError for a query that would see no key, and where no query sees a chosen key anyhow.
    """
    batch, measured, numbers = prompts_of(model, prompts), as_metric(metric), layers_of(model, layers)
    asking, asked = places_in(model, batch, queries), places_in(model, batch, keys)
    if window < 1:
        raise GraphError(f"a window has at least 1 layer, not {window}", where=user_line())
    _check(asking, asked)
    cells: dict[tuple[int, ...], Any] = {}
    with model.trace() as tracer:
        with tracer.invoke(batch.ids):
            clean = measure(measured, Run(model, batch)).save()
            logits = logits_for(measured, model)
            chosen = None if heads is None else heads_of(num_heads(model, numbers[0], "scores"), heads)
        for row, number in enumerate(numbers):
            with tracer.invoke(batch.ids):
                for layer in around(number, window, model):
                    scores = value_of(model, layer, "scores")
                    for rows, columns, places in _blocks(batch, asking, asked):
                        for head in [slice(None)] if chosen is None else chosen:
                            scores[rows, head, columns, places] = float("-inf")
                cells[(row,)] = measure(measured, Run(model, batch, logits)).save()
    return collect(
        cells,
        {"layer": numbers},
        batch,
        name=measured.name,
        scale=Scale.CHANGE,
        receipt=tracer.receipt,
        clean=clean,
    )


def around(layer: int, window: int, model: Model) -> range:
    """The layers of a window around one, cut at the model's ends, as the code of the papers has it."""
    first = layer - window // 2
    return range(max(0, first), min(len(model.layers), first + window))


def _blocks(batch: Prompts, asking: Places, asked: Places) -> Iterator[tuple[Any, Any, Any]]:
    """Indices of sequences, queries and keys that together name the scores of a block."""
    found: list[tuple[Any, Any, Any]] = []
    for prompt, (queries, keys) in enumerate(zip(asking, asked, strict=True)):
        if queries and keys:
            own = columns_of(batch, prompt, keys)
            found += [(prompt, columns_of(batch, prompt, [query]), own) for query in queries]
    alike = [block[1:] for block in found if block[0] == 0]
    if all([block[1:] for block in found if block[0] == prompt] == alike for prompt in range(len(batch))):
        found = [(slice(None), *block) for block in alike]
    yield from found


def _check(asking: Places, asked: Places) -> None:
    for prompt, (queries, keys) in enumerate(zip(asking, asked, strict=True)):
        if not queries or not keys or min(keys) > max(queries):
            raise GraphError(
                f"nothing would be knocked out in prompt {prompt}: no query of {queries} sees a key of {keys}",
                where=user_line(),
            )
        for query in queries:
            if set(range(query + 1)) <= set(keys):
                raise GraphError(
                    f"query {query} of prompt {prompt} would see no key at all: leave it one", where=user_line()
                )
