"""Expressions of which little should travel between ranks, each on a value that these split: by trace and by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROMPT = [7, 3, 5, 9, 11, 2, 4]


@dataclass(frozen=True)
class Expression:
    """What a user writes of a site's value, and the elements that each rank needs to receive, at most."""

    name: str
    write: Callable[[Any], Any]  # of a recorded value, or of a tensor
    received: Callable[[int, int], int]  # (tokens, ranks) -> elements, all ranks together


VECTOR = torch.randn(512, generator=torch.Generator().manual_seed(0))


def _pairs(tokens: int, ranks: int) -> int:  # two numbers a token and rank
    return 2 * tokens * ranks * (ranks - 1)


EXPRESSIONS = (
    Expression("one feature", lambda x: x[..., 5], lambda t, r: t * (r - 1)),
    Expression("one feature of one token", lambda x: x[:, -1, 5], lambda t, r: r - 1),
    Expression("some features", lambda x: x[:, 2, [1, 17, 30, 2]], lambda t, r: 4 * (r - 1)),
    Expression("a slice", lambda x: x[:, :, 3:9:2], lambda t, r: 6 * t * (r - 1)),
    Expression("scaled, then one", lambda x: (x.float() * 2 + 1).relu()[..., 7], lambda t, r: t * (r - 1)),
    Expression("largest", lambda x: x.argmax(-1), lambda t, r: 2 * _pairs(t, r)),
    Expression("largest with its place", lambda x: x.max(-1, keepdim=True)[0], lambda t, r: 2 * _pairs(t, r)),
    Expression("top", lambda x: x.topk(3, -1)[1], lambda t, r: 3 * 2 * _pairs(t, r)),
    Expression("bottom", lambda x: x.topk(3, dim=-1, largest=False)[0], lambda t, r: 3 * 2 * _pairs(t, r)),
    Expression("probability", lambda x: x.softmax(-1)[:, :, 4], lambda t, r: _pairs(t, r) + t * (r - 1)),
    Expression("log probability", lambda x: x.log_softmax(-1)[:, -1, 9], lambda t, r: _pairs(t, r) + t * (r - 1)),
    Expression("partition", lambda x: x.logsumexp(-1), _pairs),
    Expression("partition of infinity", lambda x: (x * 0 + float("inf")).logsumexp(-1).isinf().float(), _pairs),
    Expression("sum", lambda x: x.sum(-1), _pairs),
    Expression("mean of all", lambda x: x.mean((1, 2)), lambda t, r: _pairs(1, r)),
    Expression("spread", lambda x: x.amax(-1) - x.amin(-1), _pairs),
    Expression("product", lambda x: x @ VECTOR[: x.shape[-1]].to(x.dtype), _pairs),
    Expression("masked sum", lambda x: (x * VECTOR[: x.shape[-1]].to(x.dtype)).sum(-1), _pairs),
    Expression("entropy", lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1), lambda t, r: 3 * _pairs(t, r)),
)


def whole_values(plain: Any, modules: Mapping[str, str]) -> dict[str, Tensor]:
    """The outputs of modules of the plain model for the prompt."""
    seen: dict[str, Tensor] = {}
    handles = [
        plain.get_submodule(path).register_forward_hook(
            lambda m, a, out, name=name: seen.__setitem__(name, out.clone())
        )
        for name, path in modules.items()
    ]
    with torch.no_grad():
        plain(input_ids=torch.tensor([PROMPT]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen
