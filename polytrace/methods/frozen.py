"""A norm with its scale as it was in the run: a linear map, `y = r * (x - c mean(x)) * weight + bias`.

What it is made of is measured by calling the norm on vectors whose result tells weight, bias and whether it centres
(LayerNorm does, RMSNorm does not; Gemma's adds 1 to its weight), so no family is known here. `r`, one number a row, is
the one that fits the row's own result. All of it are values of the trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polytrace.methods.choices import needs_torch
from polytrace.modules import Module

_LARGE = 1024.0  # a power of two: the norm's epsilon is nothing beside its square


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenNorm:
    """Of some rows n, with D features."""

    weight_D: Any
    bias_D: Any
    centres: Any  # 1.0 or 0.0
    scale_n1: Any  # r
    error: Any  # of the row that fits worst, relative to its largest value: 0.0 but for rounding

    def apply(self, parts_nPD: Any) -> Any:
        """What parts `[n, parts, features]` of the norm's input are of its output; the bias is nobody's part."""
        centred = parts_nPD - self.centres * parts_nPD.mean(-1, keepdim=True)
        return centred * (self.scale_n1 * self.weight_D)[:, None]

    def pull(self, direction_nD: Any) -> Any:
        """The direction `[n, features]` in the norm's input that one in its output is."""
        weighted = direction_nD * (self.scale_n1 * self.weight_D)
        return weighted - self.centres * weighted.mean(-1, keepdim=True)


def freeze_norm(norm: Module, given_nD: Any, got_nD: Any) -> FrozenNorm:
    """The norm on rows that went into it and came out of it, inside of a trace; float32."""
    torch = needs_torch("a norm's linear form")
    features = norm._model.description.hidden_size
    signs = torch.ones(features)
    signs[1::2] = -1.0
    if features % 2:
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0])  # their mean is 0
    dtype = getattr(torch, norm._model.description.dtype)
    probes = torch.stack([_LARGE * signs, -_LARGE * signs, torch.ones(features)])
    up, down, flat = norm(probes.to(dtype)).float().unbind(0)
    weight, bias = (up - down) / (2 * signs), (up + down) / 2
    passed = ((flat - bias) * weight).sum() / (weight * weight).sum().clamp_min(1e-30)
    centres = 1.0 - passed.clamp(0.0, 1.0).round()  # LayerNorm makes nothing of a vector that is the same everywhere
    centred = (given_nD - centres * given_nD.mean(-1, keepdim=True)) * weight
    wanted = got_nD - bias
    scale = (wanted * centred).sum(-1, keepdim=True) / (centred * centred).sum(-1, keepdim=True).clamp_min(1e-30)
    error = (wanted - scale * centred).abs().amax() / wanted.abs().amax().clamp_min(1e-30)
    return FrozenNorm(weight_D=weight, bias_D=bias, centres=centres, scale_n1=scale, error=error)
