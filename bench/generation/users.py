"""What users of the benchmark ask for: a prompt, how many tokens more, and what they change at every step."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cones.workloads import Shape

_FIRST_PLAIN_TOKEN = 3
_SIZE = 2.0  # of what is added, as a multiple of 1: residual streams of these models begin at about that


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """One request. What is changed is changed at every token, those of the prompt too."""

    ids: tuple[int, ...]
    new_tokens: int
    layer: int | None = None  # behind which `vector` is added
    vector: Tensor | None = None  # [hidden]
    unit: Tensor | None = None  # [hidden]; a direction taken out of what attention and MLP add, and of every layer


def plain_users(shape: Shape, count: int, *, tokens: int, new_tokens: int, shared: int = 0) -> list[User]:
    """Users who change nothing. Their first `shared` tokens are the same, no others are so by design."""
    common = random.Random(5).choices(range(_FIRST_PLAIN_TOKEN, shape.vocabulary), k=shared)
    users = []
    for number in range(count):
        own = random.Random(1000 + number).choices(range(_FIRST_PLAIN_TOKEN, shape.vocabulary), k=tokens - shared - 1)
        users.append(
            User(
                ids=(*common, _FIRST_PLAIN_TOKEN + number % (shape.vocabulary - _FIRST_PLAIN_TOKEN), *own),
                new_tokens=new_tokens,
            )
        )
    return users


def steered_users(shape: Shape, count: int, *, tokens: int, new_tokens: int) -> list[User]:
    """The same users, each with a vector of its own behind another layer."""
    return [
        User(
            ids=user.ids,
            new_tokens=new_tokens,
            layer=number % shape.layers,
            vector=_SIZE * _unit(shape.hidden, number),
        )
        for number, user in enumerate(plain_users(shape, count, tokens=tokens, new_tokens=new_tokens))
    ]


def ablating_users(shape: Shape, count: int, *, tokens: int, new_tokens: int) -> list[User]:
    """The same users, each without a direction of its own at three sites of every layer."""
    return [
        User(ids=user.ids, new_tokens=new_tokens, unit=_unit(shape.hidden, 500 + number))
        for number, user in enumerate(plain_users(shape, count, tokens=tokens, new_tokens=new_tokens))
    ]


def _unit(width: int, seed: int) -> Tensor:
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = drawn / drawn.norm()
    return unit
