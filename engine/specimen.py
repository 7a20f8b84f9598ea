"""A tiny twin of a model, run once with data: what every module took and gave, and what attention was given.

It has the model's own class and configuration with fewer and smaller layers. All tokens are at position 0, where rotary
embeddings turn nothing, and norms have the gains that they begin with, so that queries and keys keep their direction
through both. Families that attend by a formula of their own run it, and are listened to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from engine.attention import NAME as ENGINE
from engine.manners import attention_of, forward_names, use_attention
from engine.operations import watch_operations
from engine.own_formula import FormulaFinder, OwnFormula
from engine.positions import numbered_modules, numbering
from engine.recorder import tensors_of
from engine.shrinking import shrink
from engine.twin_weights import draw_weights

NAME = "polytrace-specimen"
NUM_TOKENS = 9


@dataclass(slots=True)
class Seen:
    """What happened in one forward, in its order."""

    calls: list[tuple[str, str, Any]] = field(default_factory=list)  # path, "input" or "output", value
    attended: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # by module: q, k, v, z as [T, H, C]
    formulas: dict[str, OwnFormula] = field(default_factory=dict)  # by path: of those that attend by their own


def make_specimen(config: Any, attention: str, *, keeps_heads: bool = False) -> nn.Module:
    """On the CPU, in float32, with matrices that make differences large."""
    small = copy.deepcopy(config)
    shrink(small, 1, keeps_heads=keeps_heads)
    AttentionInterface.register(NAME, _attention)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(small)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        twin: Any = kind._from_config(small, dtype=torch.float32).eval()
        draw_weights(twin, has_odd_vectors=False)
    if attention == ENGINE:
        twin.set_attn_implementation(NAME)
    else:
        use_attention(twin, attention)
    twin.set_experts_implementation("eager")
    module: nn.Module = twin
    return module


def run_specimen(twin: Any) -> Seen:
    """One forward."""
    seen = Seen()
    is_engines = attention_of(twin) == NAME

    def before(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            seen.calls.append((path, "input", _copy(first)))

        return hook

    def after(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen.calls.append((path, "output", _copy(output)))

    for path, module in twin.named_modules():
        module.register_forward_pre_hook(before(path), with_kwargs=True)
        module.register_forward_hook(after(path))
    ids = torch.arange(1, NUM_TOKENS + 1)[None]
    for module, give in numbering(numbered_modules(twin), torch.zeros_like(ids)):
        module.register_forward_pre_hook(give, with_kwargs=True)
    token = _into.set(seen)
    listening: Any = nullcontext()
    finder: FormulaFinder | None = None
    if not is_engines:
        finder = FormulaFinder(dict(twin.named_modules()), seen.formulas)
        listening = watch_operations(dict(twin.named_modules()), finder.watch)
    try:
        with torch.no_grad(), listening:
            twin(input_ids=ids, use_cache=False, **_at_first_position(twin, ids))
        if finder is not None:
            seen.attended.update({id(twin.get_submodule(path)): heads for path, heads in finder.fused.items()})
    finally:
        _into.reset(token)
    return seen


def _at_first_position(twin: Any, ids: Tensor) -> dict[str, Any]:
    """What a forward is given beside its tokens."""
    given: dict[str, Any] = {"position_ids": torch.zeros_like(ids)}
    if attention_of(twin) != NAME:
        # With a mask given nobody takes equal positions for as many sequences.
        given["attention_mask"] = torch.ones_like(ids)
        taken = forward_names(twin)
        given = {name: value for name, value in given.items() if name in taken}
    return given


_into: ContextVar[Seen | None] = ContextVar("anatomy", default=None)  # the forward that runs now


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    share = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(share, 1).transpose(2, 3) * (scaling or query.shape[3] ** -0.5)
    later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    z = scores.masked_fill(later, -torch.inf).softmax(-1) @ value.repeat_interleave(share, 1)
    heads = tuple(part[0].transpose(0, 1).clone() for part in (query, key, value, z))
    seen = _into.get()
    if seen is not None:
        seen.attended[id(module)] = heads
    return z.transpose(1, 2).contiguous(), None


def _copy(value: Any) -> Any:
    """Of tensors that have a row a token."""
    if isinstance(value, Tensor):
        has_rows = value.shape[:2] == (1, NUM_TOKENS) or (value.ndim > 1 and value.shape[0] == NUM_TOKENS)
        return value.clone() if has_rows else None
    return tuple(map(_copy, value)) if isinstance(value, (tuple, list)) else None


def gives_layers_tokens(twin: nn.Module, layers: str) -> bool:
    """Whether what layers are given beside the hidden states is of tokens' embeddings: a later stage has none."""
    listed: Any = twin.get_submodule(layers)
    one, other = (_beside_hidden(twin, listed, first) for first in (1, 2))
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _beside_hidden(twin: nn.Module, layers: Any, first: int) -> list[Tensor]:
    """The tensors that layers get behind their first argument, for a prompt of successive tokens."""
    given: list[Tensor] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = [*args[1:], *kwargs.values()] if args else list(kwargs.values())[1:]
        given.extend(value.clone() for value in tensors_of(others) if value.is_floating_point())

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    ids = torch.arange(first, first + NUM_TOKENS)[None]
    try:
        with torch.no_grad():
            twin(input_ids=ids, use_cache=False, **_at_first_position(twin, ids))
    finally:
        for handle in handles:
            handle.remove()
    return given
