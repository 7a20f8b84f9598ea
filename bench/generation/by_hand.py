"""Hugging Face's `generate` with hooks written by hand: one user at a time, or all of them as one batch.

The batch's hooks are those that somebody who knows all users beforehand would write: one at each layer, which adds a
table of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.generation.users import User
from bench.plain import Plain

Tokens = list[tuple[int, ...]]


def one_by_one(plain: Plain, users: Sequence[User]) -> Tokens:
    """New tokens of each user, each by a call of its own."""
    return [tokens for user in users for tokens in as_one_batch(plain, [user])]


def as_one_batch(plain: Plain, users: Sequence[User]) -> Tokens:
    """New tokens of each user, by one call; all prompts have one length."""
    model: Any = plain.model
    ids = torch.tensor([user.ids for user in users])
    with torch.inference_mode(), _hooked(plain, users):
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=users[0].new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [tuple(row) for row in made[:, ids.shape[1] :].tolist()]


@contextmanager
def _hooked(plain: Plain, users: Sequence[User]) -> Iterator[None]:
    model: Any = plain.model
    handles = []
    try:
        for number, layer in enumerate(model.model.layers):
            rows = [row for row, user in enumerate(users) if user.layer == number]
            if rows:
                vectors = [vector for row in rows if (vector := users[row].vector) is not None]
                handles.append(layer.register_forward_hook(_adds(torch.tensor(rows), torch.stack(vectors)[:, None])))
        units = [user.unit for user in users if user.unit is not None]
        if units:
            takes_out = _takes_out(torch.stack(units)[:, None])
            for layer in model.model.layers:
                for module in (layer, layer.self_attn, layer.mlp):
                    handles.append(module.register_forward_hook(takes_out))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adds(rows: Tensor, vectors: Tensor) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Tensor) -> None:
        output[rows] += vectors

    return hook


def _takes_out(units: Tensor) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden -= (hidden * units).sum(-1, keepdim=True) * units

    return hook
