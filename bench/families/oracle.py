"""The oracle: plain Hugging Face with hand-written hooks, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from polytrace.description import Leaf

TOLERANCE = 1e-5  # of max(1, max|plain|), in float32


@dataclass(slots=True)
class Seen:
    """What one forward showed."""

    logits: Tensor  # [1, tokens, vocabulary]
    attentions: tuple[Tensor, ...] = ()  # by layers that attend: [1, heads, queries, keys]
    calls: dict[tuple[str, str], Any] = field(default_factory=dict)  # (path, "input" or "output") of first calls


def run_plain(plain: Any, ids: list[int], edited: str | None = None, vector: Tensor | None = None) -> Seen:
    """Every module's first argument and output; with `vector` added to the last token's row of a module's output."""
    calls: dict[tuple[str, str], Any] = {}

    def taking(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            calls.setdefault((path, "input"), _copy(first))

        return hook

    def giving(path: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if path == edited:
                hidden: Any = (output if isinstance(output, Tensor) else output[0]).clone()
                hidden[:, -1] += vector
                output = hidden if isinstance(output, Tensor) else (hidden, *output[1:])
            calls.setdefault((path, "output"), _copy(output))
            return output

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for path, module in plain.named_modules():
            hooks.callback(module.register_forward_pre_hook(taking(path), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(giving(path)).remove)
        logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits.clone()
    return Seen(logits=logits, calls=calls)


def attentions_of(plain: Any, ids: list[int]) -> tuple[Tensor, ...]:
    """The attention weights that the model tells of, layer by layer; none where it tells of none."""
    try:
        with torch.no_grad():
            told = plain(input_ids=torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
    except Exception:  # noqa: BLE001 - many families cannot be asked
        return ()
    return tuple(own for own in told or () if isinstance(own, Tensor))


def is_causal(plain: Any, ids: list[int]) -> bool:
    """Whether another last token leaves the logits before it as they are."""
    with torch.no_grad():
        one, other = (
            plain(input_ids=torch.tensor([each]), use_cache=False).logits[:, :-1]
            for each in (ids, [*ids[:-1], ids[-1] + 1])
        )
    return differing(one, other) <= TOLERANCE


def differing(ours: Tensor, plain: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1; infinite for another shape."""
    if ours.shape != plain.shape:
        return float("inf")
    if plain.numel() == 0:
        return 0.0
    if not plain.is_floating_point():
        return 0.0 if torch.equal(ours, plain) else float("inf")
    off = (ours.double() - plain.double()).masked_fill(ours == plain, 0.0)  # infinities
    finite = plain.double().masked_fill(plain.isinf(), 0.0)
    return float(off.abs().max()) / max(1.0, float(finite.abs().max()))


def leaf_of(calls: Mapping[tuple[str, str], Any], path: str, side: str, leaf: Leaf) -> Tensor | None:
    """The tensor behind a site, as its view has it."""
    value: Any = calls.get((path, side))
    for step in leaf.selector:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    if not isinstance(value, Tensor):
        return None
    return value[None] if leaf.is_flat else value


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copy(own) for key, own in value.items()}
    return tuple(map(_copy, value)) if isinstance(value, (tuple, list)) else None


def tensors(values: Any) -> Iterator[Tensor]:
    """All of them, however deep."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for own in values:
            yield from tensors(own)
