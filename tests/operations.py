"""Operations in forwards of four families, and the oracle: plain Hugging Face with a function replaced by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.mixtral import modeling_mixtral

LAYER = 1
TOLERANCE = 1e-5  # of max(1, max|plain|), in float32

Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """An operation, and which call of which function it is in the plain model."""

    name: str
    operation: Callable[[Any], Any]  # of the model as a user has it
    keys: tuple[Any, ...]  # from the operation to the tensor: a port, and the way into its value
    owner: Callable[[Any], Any]  # of the plain model
    function: str  # an attribute of the owner
    call: int  # how many calls of it come before in one forward
    is_flat: bool = False  # the plain model has no dimension of sequences there

    def read(self, model: Any) -> Any:
        """The operation's recorded value."""
        value = self.operation(model)
        for key in self.keys:
            value = getattr(value, key) if isinstance(key, str) else value[key]
        return value

    def assign(self, model: Any, given: Any) -> None:
        """Replaces it."""
        value = self.operation(model)
        for key in self.keys[:-1]:
            value = getattr(value, key) if isinstance(key, str) else value[key]
        if isinstance(self.keys[-1], str):
            setattr(value, self.keys[-1], given)
        else:
            value[self.keys[-1]] = given


def _layer(model: Any) -> Any:
    return model.model.layers[LAYER]


def _block(model: Any) -> Any:
    return model.transformer.h[LAYER]


def _torch(model: Any) -> Any:
    return torch


CASES: dict[str, tuple[Case, ...]] = {
    "llama": (
        Case("act", lambda m: _layer(m).mlp.source.act_fn_0, ("output",), lambda p: _layer(p).mlp.act_fn, "forward", 0),
        Case(
            "rotary",
            lambda m: _layer(m).self_attn.source.apply_rotary_pos_emb_0,
            ("output", 1),
            lambda p: modeling_llama,
            "apply_rotary_pos_emb",
            LAYER,
        ),
        Case(
            "half",
            lambda m: _layer(m).self_attn.source.apply_rotary_pos_emb_0.source.rotate_half_1,
            ("output",),
            lambda p: modeling_llama,
            "rotate_half",
            2 * LAYER + 1,
        ),
        Case(
            "attention",
            lambda m: _layer(m).self_attn.source.attention_interface_0,
            ("output", 0),
            lambda p: modeling_llama,
            "eager_attention_forward",
            LAYER,
        ),
        Case(
            "query",
            lambda m: _layer(m).self_attn.source.attention_interface_0,
            ("inputs", 0, 1),
            lambda p: modeling_llama,
            "eager_attention_forward",
            LAYER,
        ),
        Case(
            "norm",
            lambda m: _layer(m).post_attention_layernorm.source.torch_rsqrt_0,
            ("output",),
            _torch,
            "rsqrt",
            2 * LAYER + 1,
        ),
        Case("head", lambda m: m.source.lm_head_0, ("input",), lambda p: p.lm_head, "forward", 0),
    ),
    "gpt2": (
        Case("tanh", lambda m: _block(m).mlp.act.source.torch_tanh_0, ("output",), _torch, "tanh", LAYER),
        Case("split", lambda m: _block(m).attn.source.split_1, ("output", 1), lambda p: Tensor, "split", LAYER),
        Case(
            "projection",
            lambda m: _block(m).attn.source.self_c_proj_0,
            ("output",),
            lambda p: _block(p).attn.c_proj,
            "forward",
            0,
        ),
    ),
    "gemma2": (
        Case("cap", lambda m: m.source.torch_tanh_0, ("output",), _torch, "tanh", 4),
        Case(
            "norm",
            lambda m: _layer(m).pre_feedforward_layernorm.source._norm_0.source.torch_rsqrt_0,
            ("output",),
            _torch,
            "rsqrt",
            4 * LAYER + 2,
        ),
    ),
    "mixtral": (
        Case("weights", lambda m: _layer(m).mlp.gate.source.torch_topk_0, ("output", 0), _torch, "topk", LAYER, True),
        Case(
            "router",
            lambda m: _layer(m).mlp.gate.source.torch_nn_functional_softmax_0,
            ("output",),
            lambda p: torch.nn.functional,
            "softmax",
            2 * LAYER + 1,  # behind attention's
            True,
        ),
        Case(
            "experts",
            lambda m: _layer(m).mlp.source.experts_0,
            ("output",),
            lambda p: _layer(p).mlp.experts,
            "forward",
            0,
            True,
        ),
        Case(
            "half",
            lambda m: _layer(m).self_attn.source.apply_rotary_pos_emb_0.source.rotate_half_0,
            ("inputs", 0, 0),
            lambda p: modeling_mixtral,
            "rotate_half",
            2 * LAYER,
        ),
    ),
}


def halved(value: Any) -> Any:
    """An edit that every logit feels."""
    return value * 0.5 + 0.2


def by_hand(plain: Any, ids: Sequence[int], case: Case, edit: Edit | None = None) -> tuple[Tensor, Tensor]:
    """What one prompt has at the operation, `[1, ...]`, and its logits; with an edit of what is handed on there."""
    seen: list[Tensor] = []
    with _replaced(case, plain, seen, edit), torch.no_grad():
        logits: Tensor = plain(input_ids=torch.tensor([list(ids)]), use_cache=False).logits
    (value,) = seen
    return value[None] if case.is_flat else value, logits


@contextmanager
def _replaced(case: Case, plain: Any, seen: list[Tensor], edit: Edit | None) -> Iterator[None]:
    owner = case.owner(plain)
    original = getattr(owner, case.function)
    calls = 0
    port, *way = case.keys

    def look(value: Any) -> Any:
        """What the operation's port is replaced by."""
        tensor = value[way[0]] if way else value
        seen.append(tensor.clone())
        if edit is None:
            return value
        return tuple(edit(one) if place == way[0] else one for place, one in enumerate(value)) if way else edit(tensor)

    def function(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls - 1 != case.call:
            return original(*args, **kwargs)
        if port == "output":
            return look(original(*args, **kwargs))
        place = way.pop() if port == "inputs" else 0
        way.clear()
        args = tuple(look(one) if number == place else one for number, one in enumerate(args))
        return original(*args, **kwargs)

    with put_in_place(owner, case.function, function):
        yield


@contextmanager
def put_in_place(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A function of a module or an object is another one, and then its own again."""
    original, is_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
