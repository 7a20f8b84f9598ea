"""From the residual to logits: the model's own final norm and head, and what its forward does behind them.

Found by measuring, not by a list of families: some models divide, multiply or cap their logits, under names that mean
different things in different families. Of what a configuration could mean, that is taken with which the residual behind
the last layer becomes the model's own logits. One request of a few tokens, once a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from polytrace import functions
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.places import residual_leaf

if TYPE_CHECKING:
    from polytrace.model import Model

Change = Callable[[Any], Any]

_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}  # of the largest logit; of other dtypes:
_COARSE = 2e-2

_behind_heads: WeakKeyDictionary[Any, Change] = WeakKeyDictionary()


def unembed(model: Model, hidden: Any, *, negated: bool = False) -> Any:
    """Inside a trace: the logits `[..., vocabulary]` that the model would make of a residual `[..., features]`.

    Of the residual behind the last layer these are the model's own. Raises GraphError for a model whose logits are made
    in another way. The first call for a model, or `prepare_unembedding` before the trace, measures how. `negated`: of
    minus what the final norm gives.
    """
    if model.base not in _behind_heads:
        raise GraphError(
            "call polytrace.methods.prepare_unembedding(model) before the trace that calls unembed", where=user_line()
        )
    normed = model.ln_final(hidden)
    return _behind_heads[model.base](model.lm_head(-normed if negated else normed))


def behind_head(model: Model, logits: Any) -> Any:
    """Inside a trace: what the model's forward makes of `lm_head.output`. It has to be prepared as `unembed`."""
    return _behind_heads[model.base](logits)


def prepare_unembedding(model: Model) -> None:
    """Finds out, once a model, how residuals become logits. Outside of a trace.

    Raises GraphError where they do not become the model's logits by its final norm and head.
    """
    base = model.base
    if base in _behind_heads:
        return
    missing = [name for name in ("ln_final", "lm_head") if name not in base.description.standard]
    if missing:
        raise GraphError(
            f"no lens on {base.description.name}: it has no module that is known as {' or '.join(missing)}",
            where=user_line(),
        )
    candidates = list(_candidates(base))
    with base.trace([list(range(min(8, base.description.vocab_size)))], edits=()):
        own = base.output.logits.float()
        raw = base.lm_head(base.ln_final(base.layers[-1].resid_post))
        largest = own.abs().max().save()
        found = functions.stack([(change(raw).float() - own).abs().max() for change in candidates]).save()
    differences = [float(one) for one in found]
    best = min(range(len(differences)), key=differences.__getitem__)
    limit = _TOLERANCE.get(residual_leaf(base).dtype, _COARSE) * max(1.0, float(largest))
    if not differences[best] <= limit:
        raise GraphError(
            f"no lens on {base.description.name}: behind its last layer, final norm and head give logits that differ "
            f"by {differences[best]:.3g} from its own (up to {float(largest):.3g}), so its forward does something else",
            where=user_line(),
        )
    _behind_heads[base] = candidates[best]


def _candidates(model: Model) -> list[Change]:
    """What a forward may do behind its head, by what its configuration has. What changes nothing comes last."""
    config = model.config
    factors = [1.0]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        value = config.get(name)
        if isinstance(value, (int, float)) and value:
            factors = [float(value), 1 / float(value), *factors]
    caps = [config.get(name) for name in ("final_logit_softcapping", "logits_soft_cap")]
    found: list[Change] = [_Capped(factor, float(cap)) for cap in caps if cap for factor in factors]
    return [*found, *(_Scaled(factor) for factor in factors)]


@dataclass(frozen=True, slots=True)
class _Scaled:
    factor: float

    def __call__(self, logits: Any) -> Any:
        return logits if self.factor == 1.0 else logits * self.factor


@dataclass(frozen=True, slots=True)
class _Capped:
    factor: float
    cap: float

    def __call__(self, logits: Any) -> Any:
        scaled = logits if self.factor == 1.0 else logits * self.factor
        return (scaled / self.cap).tanh() * self.cap


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalNorm:
    """The final norm as numbers: `gain * (h - its mean, if centred) / sqrt(spread + epsilon) + shift`.

    `spread` is the mean square of what stands before it. Tensors `[features]`, float32.
    """

    gain: Any
    shift: Any
    is_centred: bool  # a LayerNorm; else an RMSNorm
    epsilon: float

    def __call__(self, hidden: Any) -> Any:
        """Of tensors here, not in a trace."""
        if self.is_centred:
            hidden = hidden - hidden.mean(-1, keepdim=True)
        spread = hidden.pow(2).mean(-1, keepdim=True)
        return self.gain * hidden * (spread + self.epsilon).rsqrt() + self.shift


_SMALL = 1e-2  # of a residual by which the epsilon is measured


def final_norm(model: Model) -> FinalNorm:
    """What the final norm does, measured by what it makes of a few residuals: no family names its parts alike.

    Needs torch. Raises GraphError where it is neither a LayerNorm nor an RMSNorm.
    """
    import torch

    leaf = residual_leaf(model)
    size = leaf.tail[-1]
    sign = torch.ones(size)
    sign[::2] = -1.0
    sign = sign - sign.mean()  # of an odd number of features
    trial = torch.randn(size, generator=torch.Generator().manual_seed(0)) + 0.5
    rows = torch.stack([torch.zeros(size), sign, torch.ones(size), _SMALL * sign, trial])
    with model.base.trace([[0]]):
        given = model.ln_final(rows.to(getattr(torch, leaf.dtype))).float().save()
    shift, whole, ones, small, wanted = given
    gain = (whole - shift) / sign
    parts = gain.abs() > 1e-3
    ratio = float((((small - shift) / sign)[parts] / gain[parts]).median())
    found = FinalNorm(
        gain=gain,
        shift=shift,
        is_centred=float((ones - shift).abs().max()) < 1e-2 * float(gain.abs().max()),
        epsilon=max(0.0, _SMALL**2 * (1 / ratio**2 - 1)),
    )
    difference = float((found(trial) - wanted).abs().max())
    if not difference <= 2e-2 * max(1.0, float(wanted.abs().max())):
        raise GraphError(
            f"the final norm of {model.description.name} is neither a LayerNorm nor an RMSNorm: "
            f"as either it would be off by {difference:.3g}",
            where=user_line(),
        )
    return found
