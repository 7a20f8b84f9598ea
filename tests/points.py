"""Programs that read and edit points inside of attention, as traces and by hand: the eager formula, written out.

The oracle is an attention function of its own, registered with transformers, that computes scores, softmax and sums as
transformers' eager ones do, one sequence at a time, and calls the edits where they belong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from families import Family
from programs import difference, find
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

POINTS = ("q_rot", "k_rot", "v", "scores", "pattern", "z")
_NAME = "points_by_hand"

Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Look:
    """One user: an edit at a point of one layer, and all points of that layer and a later one read."""

    prompts: Prompts
    layer: int
    edit: str | None  # the point
    head: int  # of what is edited; of the key/value heads at keys and values
    column: int  # counted from the end: of the token or the query
    reads_whole: bool  # or the last column alone

    @property
    def later(self) -> int:
        return self.layer + 1


def looks(family: Family, prompts: Sequence[Prompts]) -> list[Look]:
    """Every point edited over some prompts and heads, and nothing."""
    found = []
    for number, own in enumerate(prompts):
        shortest = min(map(len, own))
        for place, edit in enumerate((None, *POINTS)):
            layer, column = (number + place) % (family.num_layers - 1), -1 - (number + place) % min(shortest, 2)
            reads_whole = column < -1 or place % 2 == 0  # else the edited column alone
            found.append(Look(own, layer, edit, (number + place) % 2, column, reads_whole))
    return found


def change(point: str, value: Any, look: Look, first: int = 0) -> None:
    """The edit, in place; of a view, or of one sequence whose first key is the view's column `first`."""
    head, column = look.head, look.column
    if point == "scores":
        if first == 0:  # a pad else
            value[:, head, column, 0] = float("-inf")
        value[:, head, column, -4:] *= 0.5
    elif point == "pattern":
        value[:, head, column] *= 0.25
    else:
        value[:, column, head] *= -8.0


def record_look(model: Any, family: Family, look: Look, **options: Any) -> tuple[Any, list[Any]]:
    """The trace and the values that it saves, in the order of `look_by_hand`."""
    saved = []
    with model.trace([list(prompt) for prompt in look.prompts], **options) as tracer:
        if look.edit is not None:
            change(look.edit, getattr(_attention(model, family, look.layer), look.edit), look)
        for layer in (look.layer, look.later):
            for point in POINTS:
                value = getattr(_attention(model, family, layer), point)
                if not look.reads_whole:
                    value = value[:, :, -1] if point in ("scores", "pattern") else value[:, -1]
                saved.append(value.save())
        saved.append(model.lm_head.output[:, -1].save())
    return tracer, saved


def look_by_hand(plain: PreTrainedModel, family: Family, look: Look) -> list[Tensor]:
    """The same of the plain model, prompt by prompt, as left-padded views."""
    longest = max(map(len, look.prompts))
    parts = [_one_prompt(plain, family, look, prompt, longest - len(prompt)) for prompt in look.prompts]
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def furthest(ours: list[Tensor], plain: list[Tensor]) -> float:
    """Largest difference, of the largest value: a softmax turns what scores are off, of theirs, into what it is off."""
    mine, theirs = (torch.cat([v.masked_fill(v.isneginf(), 0).flatten() for v in values]) for values in (ours, plain))
    return difference([mine], [theirs])


def _one_prompt(
    plain: PreTrainedModel, family: Family, look: Look, prompt: tuple[int, ...], pads: int
) -> Iterator[Tensor]:
    seen: dict[tuple[int, str], Tensor] = {}
    layers = {id(_attention(plain, family, layer)): layer for layer in (look.layer, look.later)}

    def at(module: nn.Module, point: str, value: Tensor) -> Tensor:
        layer = layers.get(id(module))
        if layer == look.layer and point == look.edit:
            value = value.clone()
            if len(prompt) + look.column >= 0:
                change(point, value, look, pads)
        if layer is not None:
            seen[layer, point] = value.clone()
        return value

    logits: list[Tensor] = []
    handle = plain.get_submodule("lm_head").register_forward_hook(lambda module, args, out: logits.append(out))
    with attending(plain, at), torch.no_grad():
        plain(input_ids=torch.tensor([prompt]), use_cache=False)
    handle.remove()
    for layer in (look.layer, look.later):
        for point in POINTS:
            value = seen[layer, point]
            if point in ("scores", "pattern"):
                keys = value.new_full((*value.shape[:3], pads), -torch.inf if point == "scores" else 0.0)
                value = torch.cat([keys, value], 3)
                value = torch.cat([value.new_zeros(*value.shape[:2], pads, value.shape[3]), value], 2)
                yield value if look.reads_whole else value[:, :, -1]
            else:
                value = torch.cat([value.new_zeros(1, pads, *value.shape[2:]), value], 1)
                yield value if look.reads_whole else value[:, -1]
    yield logits[0][:, -1]


@contextmanager
def attending(plain: PreTrainedModel, at: Callable[[nn.Module, str, Tensor], Tensor]) -> Iterator[None]:
    """The plain model attends by the formula below inside, and `at` sees every point."""

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_rest: Any,
    ) -> tuple[Tensor, None]:
        query, key, value = (
            at(module, point, heads.transpose(1, 2)).transpose(1, 2)
            for point, heads in (("q_rot", query), ("k_rot", key), ("v", value))
        )
        share = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        tokens = torch.arange(query.shape[2])
        is_hidden = tokens > tokens[:, None]
        if sliding_window is not None:
            is_hidden |= tokens <= tokens[:, None] - sliding_window
        scores = at(module, "scores", scores.masked_fill(is_hidden, -torch.inf))
        if s_aux is None:
            pattern = scores.softmax(-1)
        else:
            sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            pattern = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        pattern = at(module, "pattern", pattern)
        return at(module, "z", (pattern @ value).transpose(1, 2)), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    before = plain.config._attn_implementation
    plain.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        plain.set_attn_implementation(before)


def _attention(model: Any, family: Family, layer: int) -> Any:
    return find(model, f"{family.layers}.{layer}.{family.attention}")
