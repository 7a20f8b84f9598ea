"""The manners in which a model can be run: how the sequences of a pass lie, and by whose attention they attend.

A family is run in the first manner that works. Packed needs the engine's attention, and layers that do not mix a row
with its neighbours. Where each sequence runs alone the engine's attention still has its points; a family that does not
use transformers' interface, or hands masks of its own to it, runs as it was written: by its eager formula, which has
patterns as tensors, or, where that gives other numbers than the one that transformers chooses, by that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from engine.attention import NAME, use_packed_attention
from engine.encoders import has_encoder
from polytrace.description import PassLayout

_EAGER = "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """One of them."""

    layout: PassLayout
    attention: str  # as transformers' implementations of attention are called

    @property
    def has_engine_attention(self) -> bool:
        """Whether attention is the engine's, with its points."""
        return self.attention == NAME

    def prepare(self, model: PreTrainedModel) -> None:
        """Makes a model attend so from now on; ServiceError when its family cannot."""
        if self.has_engine_attention:
            use_packed_attention(model)
        else:
            use_attention(model, self.attention)


def manners_of(model: PreTrainedModel) -> tuple[Manner, ...]:
    """All of a model as transformers made it, the best first."""
    padded = dict.fromkeys((NAME, _EAGER, attention_of(model)))
    if has_encoder(model):  # which sees all of a prompt at once
        padded.pop(NAME)
        return tuple(Manner(layout=PassLayout.PADDED, attention=attention) for attention in padded)
    return (
        Manner(layout=PassLayout.PACKED, attention=NAME),
        *(Manner(layout=PassLayout.PADDED, attention=attention) for attention in padded),
    )


def attention_of(model: PreTrainedModel) -> str:
    """The implementation of attention that a model has now."""
    return getattr(model.config.get_text_config(), "_attn_implementation", None) or _EAGER


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Makes a model attend by an implementation of its own family; some cannot be asked to, but look there."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = name


def forward_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The arguments of a model's forward."""
    forward: Callable[..., Any] = type(model).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = forward.__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
