"""What of a model is found by asking it: how its norms work, and whether embeddings are what the first layer takes.

One small request for each model: its norms are called on a few constants, and two tokens run through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polytrace.methods.transformer_lens.blocks import Block, positions_of
from polytrace.model import Model
from polytrace.modules import Module
from polytrace.ports import Members

if TYPE_CHECKING:
    from torch import Tensor

_LARGE = 1024.0  # beside its square no epsilon of a norm shows
_SMALL = 2.0**-8  # ... and beside this one's it does
_ADDED = 0.02  # of the largest of the embeddings: sums may be off by so much, and by the dtype's rounding


@dataclass(frozen=True, slots=True)
class NormFacts:
    """How norms of one class work."""

    is_centring: bool  # LayerNorm; else an RMS norm
    eps: float
    width: int
    dtype: str  # of the model

    def centred(self, value: Any) -> Any:
        """In float32, less its mean where the norm takes that off."""
        exact = value.float()
        return exact - exact.mean(-1, keepdim=True) if self.is_centring else exact

    def scale_of(self, value: Any) -> Any:
        """What the norm divides by, `[..., 1]` in float32."""
        return (self.centred(value).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def with_weights(self, norm: Module, normalized: Any) -> Any:
        """What the norm makes of a value that is normalised already."""
        weight, bias = self.weight_and_bias(norm)
        return normalized * weight + bias

    def weight_and_bias(self, norm: Module) -> tuple[Any, Any]:
        """As the norm applies them, `[width]` in float32: Gemma's weights are stored less 1. In an open trace."""
        probe = probes(self.width)
        given = norm(_cast(probe, self.dtype)).float()
        if self.is_centring:
            bias = given[0]
            return (given[2] - bias) * (self.scale_of(probe[2]) / self.centred(probe[2])), bias
        return (given[0] - given[1]) / 2 * (self.scale_of(probe[0]) / _LARGE), (given[0] + given[1]) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of one model."""

    norms: Mapping[str, NormFacts] = field(default_factory=dict)  # by class
    embed_sums: bool  # the first layer takes what the embeddings give


def probes(width: int) -> Tensor:
    """`[4, width]`: large ones, their negative, large and small values that alternate in sign."""
    import torch

    ones = torch.ones(width)
    signs = torch.ones(width)
    signs[1::2] = -1.0
    return torch.stack([ones * _LARGE, -ones * _LARGE, signs * _LARGE, signs * _SMALL])


def find_facts(model: Model, blocks: tuple[Block, ...]) -> Facts:
    """Asks the model."""
    width = model.description.hidden_size
    paths = [path for block in blocks for path in (block.ln1, block.ln2, block.ln1_post, block.ln2_post) if path]
    final = model.description.standard.get("ln_final")
    norms = {model._index.modules[path].class_name: path for path in [*([final] if final else []), *paths]}
    last = model.description.vocab_size - 1
    with model.base.trace([[min(1, last), min(2, last)]]):
        constants = _cast(probes(width), model.description.dtype)
        probed = {kind: model.get_submodule(path)(constants).float().save() for kind, path in norms.items()}
        embedded = _embedded(model).save()
    return Facts(
        norms={kind: _norm_facts(model, given) for kind, given in probed.items()},
        embed_sums=_holds(model, embedded),
    )


def _norm_facts(model: Model, given: Any) -> NormFacts:
    """From what a norm made of the probes: one that centres makes nothing of equal values, whatever their sign."""
    width, dtype = model.description.hidden_size, model.description.dtype
    ones, negative, large, small = given.double()
    spread = float((large - ones).abs().max())
    is_centring = float((ones - negative).abs().max()) <= 1e-2 * spread
    bias = ones if is_centring else (ones + negative) / 2
    clear = (large - bias).abs().argmax()
    share = float((small - bias)[clear] / (large - bias)[clear]) ** 2  # power / (power + eps), nearly
    power = float(NormFacts(is_centring, 0.0, width, dtype).scale_of(probes(width)[3])) ** 2
    measured = float(f"{max(power * (1 / share - 1), 0.0):.2g}")
    said = [float(value) for name, value in model.config.items() if "eps" in name and isinstance(value, float)]
    close = [value for value in said if measured / 1.5 <= value <= measured * 1.5]  # half precision measures roughly
    return NormFacts(is_centring, close[0] if close else measured, width, dtype)


def _embedded(model: Model) -> Any:
    given, positions = model.embed_tokens.output, positions_of(model)
    first = model.layers[0].resid_pre
    if given.shape[-1] != first.shape[-1]:
        return _off(first, first, first)  # a projection stands between
    return _off(given, 0 * given if positions is None else _output(model, positions), first)


def _off(before: Any, added: Any, sum_: Any) -> Any:
    import torch

    off = (before.float() + added.float() - sum_.float()).abs().amax()
    return torch.stack([off, added.float().abs().amax(), sum_.float().abs().amax()])


def _output(model: Model, path: str) -> Any:
    found = model.get_submodule(path).output
    return found[0] if isinstance(found, Members) else found


def _holds(model: Model, told: Any) -> bool:
    import torch

    off, added, total = told.tolist()
    return bool(off <= _ADDED * added + 8 * torch.finfo(getattr(torch, model.description.dtype)).eps * total)


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    import torch

    return tensor.to(getattr(torch, dtype))
