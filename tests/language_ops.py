"""What random programs do to values: operations of the table, written once for recorded and for plain tensors.

All of them are continuous or nearly so (what is compared are two ways of rounding), and none makes numbers much larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import polytrace

Run = Callable[..., Any]  # of the operands, and `size` numbers that were drawn
GENERATOR = torch.Generator().manual_seed(7)
MATRIX = torch.randn(128, 128, generator=GENERATOR) / 8
ROW = torch.randn(128, generator=GENERATOR)


@dataclass(frozen=True)
class Operation:
    """One way to go on from a value; `on` says of which."""

    run: Run
    on: str  # any, features (of the last of three or more), whole (no pad rows, two or more dimensions)
    num_operands: int = 1


def fit(value: Any, shape: tuple[int, ...]) -> Any:
    """Its numbers again and again in another shape, no larger than one."""
    size = 1
    for length in shape:
        size *= length
    flat = value.flatten().float()
    if flat.shape[0] < size:
        flat = flat.repeat(-(-size // flat.shape[0]))
    return flat[:size].reshape(shape).tanh()


def _unary(run: Run) -> Operation:
    return Operation(lambda v, a, b: run(v), "any")


def _features(run: Run) -> Operation:
    return Operation(run, "features")


def _whole(run: Run) -> Operation:
    return Operation(run, "whole")


def _pair(run: Run, on: str = "any") -> Operation:
    return Operation(lambda v, w, a, b: run(v, w), on, 2)


def _written(v: Any, a: int, b: int) -> Any:
    own = v.clone()
    own[..., a % own.shape[-1]] = 0.5
    own[..., -1] += own[..., 0]
    own.mul_(0.5)
    return own


def _viewed(v: Any, a: int, b: int) -> Any:
    own = v * 1.0
    own.transpose(-1, -2)[..., 0, :].clamp_(-0.5, 0.5)
    return own


def _cond(v: Any, w: Any) -> Any:
    """Recorded values by `polytrace.cond`, plain ones by Python's own if."""
    is_larger = v.sum() > w.sum()
    if type(v) is Tensor:
        return v * 0.5 if is_larger else w - 0.25
    return polytrace.cond(is_larger, lambda: v * 0.5, lambda: w - 0.25)


def _mask(length: int) -> Tensor:
    return torch.arange(length) % 3 == 0


UNARY: dict[str, Run] = {
    "neg": lambda v: -v,
    "abs": lambda v: v.abs(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "relu": lambda v: v.relu(),
    "leaky_relu": lambda v: F.leaky_relu(v, 0.2),
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": lambda v: F.hardtanh(v, -1.5, 2.0),
    "softshrink": F.softshrink,
    "tanhshrink": F.tanhshrink,
    "selu": F.selu,
    "sin": torch.sin,
    "cos": lambda v: v.cos(),
    "atan": torch.atan,
    "asinh": torch.asinh,
    "erf": torch.erf,
    "sinc": torch.sinc,
    "log1p": lambda v: torch.log1p(v.abs()),
    "sqrt": lambda v: (v * v + 0.5).sqrt(),
    "rsqrt": lambda v: torch.rsqrt(v.square() + 1.0),
    "reciprocal": lambda v: (1.5 + v.abs()).reciprocal(),
    "pow": lambda v: v.tanh() ** 3,
    "rpow": lambda v: 2.0 ** v.clamp(-2, 2),
    "exp": lambda v: v.clamp_max(1.0).exp(),
    "expm1": lambda v: torch.expm1(v.clamp(max=1.0)),
    "clamp": lambda v: v.clamp(-1.0, 1.5),
    "rsub": lambda v: 1.0 - v,
    "rdiv": lambda v: 2.0 / (2.0 + v.abs()),
    "where": lambda v: torch.where(v > 0, v, v * 0.3),
    "where_method": lambda v: v.where(v < 0.5, 0.5),
    "masked_fill": lambda v: v.masked_fill(v < -1.0, -1.0),
    "lerp": lambda v: v.lerp(v.tanh(), 0.4),
    "double": lambda v: (v.double() * 0.7).float(),
    "bfloat": lambda v: v.to(torch.float64).sin().to(torch.float32),
    "threshold": lambda v: F.threshold(v, 0.0, 0.0),
    "nan_to_num": lambda v: v.nan_to_num(0.0, 1.0, -1.0),
    "addcmul": lambda v: torch.addcmul(v, v.tanh(), v.sigmoid(), value=0.5),
    "addcdiv": lambda v: v.addcdiv(v, v.abs() + 1.0),
    "heaviside": lambda v: v * (v >= 0).to(v.dtype),
    "logit": lambda v: torch.special.logit(v.sigmoid(), eps=0.2),
    "xlogy": lambda v: torch.special.xlogy(v.tanh(), v.abs() + 1.0),
    "copysign": lambda v: v.abs().copysign(v),
    "maximum": lambda v: torch.maximum(v, -v * 0.5),
    "dropout": lambda v: F.dropout(v, 0.3, training=False),
    "polar": lambda v: torch.polar(v.abs(), v.clamp(-1, 1)).real,
}

FEATURES: dict[str, Run] = {
    "softmax": lambda v, a, b: v.softmax(-1),
    "log_softmax": lambda v, a, b: F.log_softmax(v, dim=-1),
    "softmin": lambda v, a, b: F.softmin(v, dim=-1),
    "sum": lambda v, a, b: v.sum(-1, keepdim=True) / v.shape[-1],
    "mean": lambda v, a, b: v - v.mean(-1, keepdim=True),
    "std": lambda v, a, b: v / (1.0 + v.std(-1, keepdim=True)) if v.shape[-1] > 1 else v,
    "var_mean": lambda v, a, b: torch.var_mean(v, dim=-1, correction=0, keepdim=True)[1],
    "amax": lambda v, a, b: v.amax(-1, keepdim=True),
    "aminmax": lambda v, a, b: torch.aminmax(v, dim=-1, keepdim=True).min,
    "max": lambda v, a, b: v.max(-1, keepdim=True).values,
    "logsumexp": lambda v, a, b: torch.logsumexp(v, -1, keepdim=True),
    "norm": lambda v, a, b: v.norm(dim=-1, keepdim=True) * 0.2,
    "vector_norm": lambda v, a, b: torch.linalg.vector_norm(v, ord=1, dim=-1, keepdim=True) / v.shape[-1],
    "normalize": lambda v, a, b: F.normalize(v + 1.0, dim=-1),
    "layer_norm": lambda v, a, b: F.layer_norm(v, (v.shape[-1],), eps=0.1),
    "rms_norm": lambda v, a, b: F.rms_norm(v, (v.shape[-1],), eps=0.1),
    "cumsum": lambda v, a, b: v.cumsum(-1) / v.shape[-1],
    "cummax": lambda v, a, b: v.cummax(-1).values,
    "logcumsumexp": lambda v, a, b: v.logcumsumexp(-1),
    "sort": lambda v, a, b: v.sort(-1, descending=bool(a % 2)).values,
    "topk": lambda v, a, b: v.topk(1 + a % v.shape[-1], dim=-1).values,
    "kthvalue": lambda v, a, b: v.kthvalue(1 + a % v.shape[-1], dim=-1, keepdim=True).values,
    "median": lambda v, a, b: v.median(-1, keepdim=True).values,
    "argmax": lambda v, a, b: v.gather(-1, v.argmax(-1, keepdim=True)),
    "take_along_dim": lambda v, a, b: v.take_along_dim(v.argsort(-1)[..., -1:], -1),
    "flip": lambda v, a, b: v.flip(-1),
    "roll": lambda v, a, b: v.roll(a, -1),
    "narrow": lambda v, a, b: v.narrow(-1, 0, 1 + a % v.shape[-1]),
    "slice": lambda v, a, b: v[..., a % v.shape[-1] :],
    "steps": lambda v, a, b: v[..., :: 1 + a % 3],
    "index": lambda v, a, b: v[..., [a % v.shape[-1], -1]],
    "index_tensor": lambda v, a, b: v[..., torch.tensor([b % v.shape[-1], a % v.shape[-1], 0])],
    "index_mask": lambda v, a, b: v[..., _mask(v.shape[-1])],
    "index_select": lambda v, a, b: v.index_select(-1, torch.tensor([a % v.shape[-1], b % v.shape[-1]])),
    "chunk": lambda v, a, b: v.chunk(2, -1)[0],
    "split": lambda v, a, b: torch.split(v, 1 + a % v.shape[-1], dim=-1)[-1],
    "unbind": lambda v, a, b: torch.stack(v.unbind(-1)[:2], -1),
    "cat": lambda v, a, b: torch.cat([v, v[..., :1].tanh()], -1),
    "pad": lambda v, a, b: F.pad(v, (1, a % 3), value=0.5),
    "diff": lambda v, a, b: v.diff(dim=-1) if v.shape[-1] > 1 else v,
    "unsqueeze": lambda v, a, b: v.unsqueeze(-1).expand(*v.shape, 2).flatten(-2),
    "repeat_interleave": lambda v, a, b: v.repeat_interleave(2, -1)[..., :128],
    "unfold": lambda v, a, b: v.unfold(-1, 2, 1).mean(-1) if v.shape[-1] > 1 else v,
    "matmul": lambda v, a, b: v @ MATRIX[: v.shape[-1], : 1 + a % 64],
    "linear": lambda v, a, b: F.linear(v, MATRIX[: 1 + a % 64, : v.shape[-1]], ROW[: 1 + a % 64]),
    "mv": lambda v, a, b: (v @ ROW[: v.shape[-1]]).unsqueeze(-1) * 0.2,
    "einsum": lambda v, a, b: torch.einsum("...d,de->...e", v, MATRIX[: v.shape[-1], : 1 + b % 64]),
    "scatter": lambda v, a, b: v.index_fill(-1, torch.tensor([a % v.shape[-1]]), 0.25),
    "index_add": lambda v, a, b: v.index_copy(-1, torch.tensor([a % v.shape[-1]]), v[..., :1]),
    "fft": lambda v, a, b: torch.fft.rfft(v, norm="ortho").real,
    "ifft": lambda v, a, b: torch.fft.ifft(torch.fft.fft(v).imag).real,
    "add_row": lambda v, a, b: v + ROW[: v.shape[-1]],
    "written": _written,
    "glu": lambda v, a, b: F.glu(v) if v.shape[-1] % 2 == 0 else v,
    "cosine": lambda v, a, b: F.cosine_similarity(v + 1.0, ROW[: v.shape[-1]], dim=-1).unsqueeze(-1),
    "prod": lambda v, a, b: v.tanh().prod(-1, keepdim=True),
}

WHOLE: dict[str, Run] = {
    "transpose": lambda v, a, b: v.transpose(0, -1),
    "permute": lambda v, a, b: v.permute(*reversed(range(v.dim()))),
    "movedim": lambda v, a, b: v.movedim(0, -1),
    "mT": lambda v, a, b: v.mT.contiguous(),
    "flatten": lambda v, a, b: v.flatten(),
    "flatten_two": lambda v, a, b: v.flatten(0, 1),
    "reshape": lambda v, a, b: v.reshape(1, -1),
    "select": lambda v, a, b: v.select(0, a % v.shape[0]),
    "pick": lambda v, a, b: v[a % v.shape[0] :, ..., None],
    "mean_first": lambda v, a, b: v.mean(0),
    "amin_all": lambda v, a, b: v.amin().reshape(1),
    "sum_two": lambda v, a, b: v.sum((0, 1), keepdim=True) / (v.shape[0] * v.shape[1]),
    "softmax_first": lambda v, a, b: v.softmax(0),
    "cumsum_first": lambda v, a, b: v.cumsum(0) / v.shape[0],
    "sort_first": lambda v, a, b: v.sort(0).values,
    "tril": lambda v, a, b: v.tril(),
    "triu": lambda v, a, b: torch.triu(v, diagonal=1),
    "diagonal": lambda v, a, b: v.diagonal(dim1=-2, dim2=-1),
    "gram": lambda v, a, b: v @ v.mT / v.shape[-1],
    "outer": lambda v, a, b: torch.outer(v.flatten()[:8], v.flatten()[-8:]),
    "tensordot": lambda v, a, b: torch.tensordot(v, v, dims=([-1], [-1])).flatten()[:64] / v.shape[-1],
    "std_first": lambda v, a, b: v.var(0, correction=0),
    "viewed": _viewed,
    "index_first": lambda v, a, b: v[[a % v.shape[0], -1]],
    "roll_first": lambda v, a, b: v.roll(a, 0),
    "tile": lambda v, a, b: v.tile((2,))[..., :128],
    "rot90": lambda v, a, b: v.rot90(),
    "stack": lambda v, a, b: torch.stack([v, v.flip(0)]).mean(0),
    "meshed": lambda v, a, b: v.unsqueeze(0).expand(2, *v.shape).sum(0),
    "cov": lambda v, a, b: v.flatten(1).tanh().cov(correction=0).reshape(1, -1),
    "cdist": lambda v, a, b: torch.cdist(v.flatten(0, -2), MATRIX[:3, : v.shape[-1]]),
    "attend": lambda v, a, b: F.scaled_dot_product_attention(v, v, v),
    "quantile": lambda v, a, b: v.quantile(0.5, dim=-1),
}

PAIRS: dict[str, Run] = {
    "add": lambda v, w: v + w,
    "sub": lambda v, w: v.sub(w, alpha=0.5),
    "mul": lambda v, w: v * w,
    "div": lambda v, w: v / (1.5 + w.abs()),
    "max_of": torch.maximum,
    "minimum": lambda v, w: v.minimum(w),
    "where_of": lambda v, w: torch.where(w > 0.1, v, w),
    "lerp_of": lambda v, w: torch.lerp(v, w, 0.3),
    "hypot": lambda v, w: torch.hypot(v, w + 2.0),
    "atan2": lambda v, w: torch.atan2(v, w.abs() + 1.0),
    "logaddexp": torch.logaddexp,
    "cat_of": lambda v, w: torch.cat([v, w], -1)[..., -128:],
    "stack_of": lambda v, w: torch.stack([v, w], -1).amax(-1),
    "addcmul_of": lambda v, w: torch.addcmul(v, w, w.sigmoid()),
    "fmod": lambda v, w: v - w * 0.25,
    "vecdot": lambda v, w: torch.linalg.vecdot(v, w).unsqueeze(-1) / v.shape[-1],
    "pair_einsum": lambda v, w: torch.einsum("...d,...d->...", v, w).unsqueeze(-1) / v.shape[-1],
    "mse": lambda v, w: F.mse_loss(v, w, reduction="none"),
    "smooth_l1": lambda v, w: F.smooth_l1_loss(v, w, reduction="none"),
    "masked_scatter": lambda v, w: v.masked_scatter(v > 1e9, w),
}

ON = {
    "vecdot": "features",
    "pair_einsum": "features",
    "cat_of": "whole",
    "stack_of": "whole",
    "masked_scatter": "whole",
}

OPERATIONS: dict[str, Operation] = {
    **{name: _unary(run) for name, run in UNARY.items()},
    **{name: _features(run) for name, run in FEATURES.items()},
    **{name: _whole(run) for name, run in WHOLE.items()},
    **{name: _pair(run, ON.get(name, "any")) for name, run in PAIRS.items()},
    "cond": _pair(_cond, "whole"),
}
