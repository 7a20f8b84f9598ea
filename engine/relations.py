"""Whether named values are what their names say, in numbers, and how nearly.

Owns the comparisons that `engine.checking` makes of what a forward showed, and the one tolerance. What is compared is a
small part of a residual that may be a thousand times larger, so an error is measured beside the part: beyond what
rounding to the values' own dtype can do, element by element, at most `TOLERANCE` of the part's size may be left. Where
rounding alone may be as large as half of the part, nothing is shown and that is said. And how far logits by two
formulas of one model may be apart, for gates (`largest_gap`). Knows no names and no modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polytrace.description import Outcome

# R = rows, H = query heads, G = key/value heads, K = positions of keys, C = features of a head, D = hidden

TOLERANCE = 1e-3  # of the size (root of the sum of squares) of what is compared, beyond rounding; in every dtype
_MOST_ROUNDING = 0.5  # of that size: with more, a relation shows nothing
_TINY = 1e-30
_FORMULAS = 1e-3  # of the largest logit, between two formulas of one model


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One relation of one layer, or of the model, on one shard."""

    layer: int | None
    names: tuple[str, ...]  # that it is about
    says: str
    outcome: Outcome
    error: float | None = None
    told: str | None = None
    blames: tuple[str, ...] = ()  # names that are withdrawn when it fails
    is_of_writing: bool = False  # what fails is their edit: they can still be read


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How nearly two values agree."""

    outcome: Outcome
    error: float | None = None
    told: str | None = None


def largest_gap(dtype: torch.dtype) -> float:
    """How far logits by two formulas of one model may be from each other, of the largest."""
    return max(_FORMULAS, 8 * torch.finfo(dtype).eps)


def rounding_of(tensor: Tensor) -> float:
    """The relative step of its dtype."""
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


def measured(given: Tensor, expected: Tensor, rounding: Tensor) -> Measured:
    """`rounding`: what each element may differ by. Errors are measured by what is expected."""
    if given.shape != expected.shape:
        told = f"it is of shape {list(given.shape)} and not {list(expected.shape)}"
        return Measured(outcome=Outcome.FAILS, told=told)
    difference = (given.float() - expected.float()).abs()
    parts = [(difference - rounding).clamp_min(0.0), difference, rounding, expected.float()]
    excess, off, hidden, norm = torch.stack([part.norm() for part in parts]).tolist()
    if not all(map(math.isfinite, (excess, off, norm))):
        return Measured(outcome=Outcome.UNCHECKED, told="there are values that are not finite in the trial")
    if excess > TOLERANCE * max(norm, _TINY):
        return Measured(outcome=Outcome.FAILS, error=excess / max(norm, _TINY), told=_off(off, norm))
    if norm == 0.0:
        return Measured(outcome=Outcome.UNCHECKED, told="it is zero everywhere in the trial")
    if hidden > _MOST_ROUNDING * norm:
        told = f"what is compared is hardly larger than what rounding to {_name(given)} may do"
        return Measured(outcome=Outcome.UNCHECKED, told=told)
    return Measured(outcome=Outcome.HOLDS, error=excess / norm)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _off(off: float, norm: float) -> str:
    return f"it is off by {off / norm:.2g} of the size of what is compared" if norm else "what is compared is zero"


def sum_of(total: Tensor, base: Tensor, *added: tuple[Tensor, float]) -> Measured:
    """Whether `total` is `base` and so many times what is added. Errors are measured by what is added."""
    if any(one.shape != total.shape for one in (base, *(own for own, _ in added))):
        shapes = [list(own.shape) for own in (base, *(own for own, _ in added))]
        return Measured(outcome=Outcome.FAILS, told=f"{shapes} do not add up to {list(total.shape)}")
    parts = [own.float() * scale for own, scale in added]
    change = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
    eps = max(map(rounding_of, (total, base, *(own for own, _ in added))))
    between = torch.stack([(base.float() + part).abs() for part in parts]).sum(0) if len(parts) > 1 else 0.0
    rounding = eps * (total.float().abs() + torch.stack(parts).abs().sum(0) + between)
    found = measured(total.float() - base.float(), change, rounding)
    if found.outcome is Outcome.FAILS and found.told is not None:
        return replace(found, told=found.told.replace("compared", "added"))
    if found.outcome is Outcome.UNCHECKED and bool(change.any()):
        told = f"what is added is hardly larger than the residual's rounding to {_name(total)} in the trial"
        return replace(found, told=told)
    return found


def factor_of(total: Tensor, base: Tensor, added: Tensor) -> float:
    """How many times `added` is what was added, as nearly as one number can say; 0 where nothing was."""
    change, own = (total.float() - base.float()).flatten(), added.float().flatten()
    size = float(own @ own)
    return float(change @ own) / size if size else 0.0


def cap_of(capped: Tensor, plain: Tensor) -> float | None:
    """The soft-cap that made the largest of some values what it is: `cap * tanh(plain / cap)`; None when none did."""
    if capped.shape != plain.shape:
        return None
    place = int(plain.float().abs().flatten().argmax())
    before, after = (float(own.flatten()[place]) for own in (plain, capped))
    if before == 0.0 or not 0.0 < after / before < 1.0:
        return None
    least, most = 1e-3, 50.0  # of plain / cap: tanh(u) / u falls from 1 to 0
    for _ in range(60):
        middle = (least + most) / 2
        least, most = (middle, most) if math.tanh(middle) / middle > after / before else (least, middle)
    return abs(before) / least


def softmax_of(pattern_RHK: Tensor, scores_RHK: Tensor, sinks_H: Tensor | None) -> Measured:
    """Whether a pattern is the softmax of its scores, with the sink's share where there is one."""
    scores = scores_RHK.float()
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.float()[None, :, None].expand(*scores.shape[:2], 1)], 2)
    expected = scores.softmax(2)[..., : pattern_RHK.shape[2]]
    found = measured(pattern_RHK, expected, 16 * rounding_of(pattern_RHK) * expected)
    told = "rows sum to 1" if sinks_H is None else "rows sum to less than 1: the rest is the sink's"
    return replace(found, told=told) if found.outcome is Outcome.HOLDS else found


def weighted_sum(z_RHC: Tensor, pattern_RHK: Tensor, v_KGC: Tensor) -> Measured:
    """Whether z is the values, weighted by the pattern."""
    share = z_RHC.shape[1] // max(v_KGC.shape[1], 1)
    values_HKC = v_KGC.float().repeat_interleave(share, 1).transpose(0, 1)
    pattern_HRK = pattern_RHK.float().transpose(0, 1)
    expected, sizes = pattern_HRK @ values_HKC, pattern_HRK @ values_HKC.abs()
    rounding = max(rounding_of(z_RHC), rounding_of(v_KGC), 1e-6) * sizes
    return measured(z_RHC.transpose(0, 1), expected, rounding)


def sum_of_parts(given: Tensor, total: Tensor, sizes: Tensor) -> Measured:
    """Whether a module gave the sum of parts, whose sizes add up to `sizes`; each of them was rounded."""
    rounding = max(rounding_of(given), 1e-6) * (given.float().abs() + sizes)
    return measured(given, total, rounding)


def equal(given: Tensor, expected: Tensor) -> Measured:
    """Whether values that the same operations made agree, among other numbers of rows."""
    rounding = 4 * rounding_of(given) * expected.float().abs()
    found = measured(given, expected, rounding)
    if found.outcome is Outcome.FAILS and given.shape == expected.shape:
        close = 4 * rounding_of(given) * float(expected.float().abs().max())  # of sums that cancel
        if float((given.float() - expected.float()).abs().max()) <= close:
            return Measured(outcome=Outcome.HOLDS, error=found.error)
    return found
