"""A norm with its scale as it was in the run: a linear map, `y = r * (x - c mean(x)) * weight + bias`.

What it is made of is measured by calling the norm on vectors whose result tells weight, bias and whether it centres
(LayerNorm does, RMSNorm does not; Gemma's adds 1 to its weight), so no family is known here. `r`, one number a row, is
the one that fits the row's own result. All of it are values of the trace.

A form depends on no prompt, so directions are pulled through it wherever they are needed, before the pass; `r`, which
is known where the norm is, is multiplied with what came of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polytrace.methods.imports import needs_torch
from polytrace.modules import Module

_LARGE = 1024.0  # a power of two: the norm's epsilon is nothing beside its square


@dataclass(frozen=True, slots=True, kw_only=True)
class NormForm:
    """A norm but for its scale. D = features."""

    weight_D: Any
    bias_D: Any
    centres: Any  # 1.0 or 0.0

    def push(self, parts: Any) -> Any:
        """What parts `[..., D]` of the norm's input are of its output, at scale 1; the bias is nobody's part."""
        return (parts - self.centres * parts.mean(-1, keepdim=True)) * self.weight_D

    def pull(self, direction: Any) -> Any:
        """The direction `[..., D]` in the norm's input that one in its output is, at scale 1."""
        weighted = direction * self.weight_D
        return weighted - self.centres * weighted.mean(-1, keepdim=True)

    def scale(self, given_nD: Any, got_nD: Any) -> tuple[Any, Any]:
        """`r` of rows that went in and came out, `[n, 1]`, and by how much the worst is off, of the largest value."""
        pushed, wanted = self.push(given_nD), got_nD - self.bias_D
        scale = (wanted * pushed).sum(-1, keepdim=True) / (pushed * pushed).sum(-1, keepdim=True).clamp_min(1e-30)
        error = (wanted - scale * pushed).abs().amax() / wanted.abs().amax().clamp_min(1e-30)
        return scale, error


def norm_form(norm: Module) -> NormForm:
    """Inside of a trace; float32."""
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
    return NormForm(weight_D=weight, bias_D=bias, centres=centres)
