"""What makes tensors without looking at values: draws of random ops, and tensors of given sizes.

A draw comes from a CPU generator of its own, whatever the device, so that all shards draw the same numbers: they depend
on the request's seed and the number of the draw alone. On the meta device nothing is drawn: the same functions tell the
shapes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.copies import to_device

_META = torch.device("meta")
_DEFAULT = torch.float32  # whatever this process's default is


def draw(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: tuple[int, ...] | None, device: torch.device
) -> Tensor:
    """The value of a random op.

    `seed` is (request seed, number of the draw), and behind the prompts of a generation the step; it is not needed on
    the meta device.
    """
    tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
    target = tensors[0].device if tensors else device
    if target == _META:
        with torch.device("meta"):
            return _DRAWN[name](None, *args, **kwargs)
    if seed is None:
        raise ValueError(f"{name} needs the request's seed and the number of the draw")
    digest = hashlib.blake2b(":".join(map(str, seed)).encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    if name in _WITH_MASKS:
        return _DRAWN[name](generator, *args, **kwargs)
    own = [part.cpu() if isinstance(part, Tensor) else part for part in args]
    named = {key: part.cpu() if isinstance(part, Tensor) else part for key, part in kwargs.items()}
    return to_device(_DRAWN[name](generator, *own, **named), target)


def make(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> Tensor:
    """A tensor of sizes alone: `zeros`, `arange`."""
    made: Tensor = _MADE[name](*args, **{"device": device, **kwargs})
    return made


# --- draws: the first argument is the generator, None for shapes only

_Generator = torch.Generator | None


def _floating(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise TypeError(f"only floating dtypes are drawn, not {str(dtype).removeprefix('torch.')}")
    return dtype


def _randn(generator: _Generator, *sizes: Any, dtype: torch.dtype = _DEFAULT, **named: Any) -> Tensor:
    return torch.randn(*sizes, dtype=_floating(dtype), generator=generator, **named)


def _rand(generator: _Generator, *sizes: Any, dtype: torch.dtype = _DEFAULT, **named: Any) -> Tensor:
    return torch.rand(*sizes, dtype=_floating(dtype), generator=generator, **named)


def _randint(generator: _Generator, *bounds: Any, dtype: torch.dtype = torch.int64, **named: Any) -> Tensor:
    return torch.randint(*bounds, dtype=dtype, generator=generator, **named)


def _randperm(generator: _Generator, n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randperm(n, dtype=dtype, generator=generator)


def _randn_like(generator: _Generator, input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return _randn(generator, input.shape, dtype=dtype or input.dtype)


def _rand_like(generator: _Generator, input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return _rand(generator, input.shape, dtype=dtype or input.dtype)


def _randint_like(
    generator: _Generator,
    input: Tensor,
    *bounds: int,
    low: int = 0,
    high: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    given = [*bounds, *([] if high is None else [high])]
    if not 1 <= len(given) <= 2:
        raise TypeError("randint_like needs its high, and may have a low before it")
    low = given[0] if len(given) == 2 else low
    return torch.randint(low, given[-1], input.shape, dtype=dtype or input.dtype, generator=generator)


def _normal(generator: _Generator, mean: Any, std: Any = 1.0) -> Tensor:
    if not isinstance(mean, Tensor) and not isinstance(std, Tensor):
        raise TypeError("normal of two numbers has no shape: write functions.randn(shape) * std + mean")
    return torch.normal(mean, std, generator=generator)


def _empty(input: Tensor) -> Tensor:
    return torch.empty(input.shape, dtype=_floating(input.dtype), device=input.device)


def _normal_like(generator: _Generator, input: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return _empty(input).normal_(mean, std, generator=generator)


def _uniform_like(generator: _Generator, input: Tensor, *bounds: float, **named: float) -> Tensor:
    low, high = (*bounds, *(0.0, 1.0)[len(bounds) :])
    return _empty(input).uniform_(named.get("from", low), named.get("to", high), generator=generator)


def _exponential_like(generator: _Generator, input: Tensor, lambd: float = 1.0) -> Tensor:
    return _empty(input).exponential_(lambd, generator=generator)


def _bernoulli_like(generator: _Generator, input: Tensor, p: float | Tensor = 0.5) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device).bernoulli_(p, generator=generator)


def _bernoulli(generator: _Generator, input: Tensor, p: float | None = None) -> Tensor:
    return torch.bernoulli(input, generator=generator) if p is None else torch.bernoulli(input, p, generator=generator)


def _poisson(generator: _Generator, input: Tensor) -> Tensor:
    return torch.poisson(input, generator=generator)


def _multinomial(generator: _Generator, input: Tensor, num_samples: int, replacement: bool = False) -> Tensor:
    return torch.multinomial(input, num_samples, replacement, generator=generator)


def _kept(generator: _Generator, input: Tensor, p: float) -> Tensor:
    """Where dropout keeps an element, on the input's device."""
    if not 0 <= p <= 1:
        raise ValueError(f"the share that dropout puts out is from 0 to 1, not {p}")
    drawn = torch.rand(input.shape, generator=generator, dtype=torch.float32)
    return to_device(drawn, input.device) >= p


def _dropout(generator: _Generator, input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    if not training:
        return input
    scale = 1 / (1 - p) if p < 1 else 0.0
    return torch.where(_kept(generator, input, p), input * scale, input.new_zeros(()))


def _alpha_dropout(generator: _Generator, input: Tensor, p: float = 0.5, training: bool = False) -> Tensor:
    """Klambauer et al. 2017, section 3: what is put out has selu's lowest value, then mean and variance are kept."""
    if not training:
        return input
    lowest = -1.7580993408473766
    scale = ((1 - p) * (1 + p * lowest**2)) ** -0.5 if p < 1 else 0.0
    kept = torch.where(_kept(generator, input, p), input, input.new_full((), lowest))
    return kept * scale - scale * p * lowest


_DRAWN: dict[str, Callable[..., Tensor]] = {
    "randn": _randn,
    "rand": _rand,
    "randint": _randint,
    "randperm": _randperm,
    "randn_like": _randn_like,
    "rand_like": _rand_like,
    "randint_like": _randint_like,
    "normal": _normal,
    "normal_like": _normal_like,
    "uniform_like": _uniform_like,
    "exponential_like": _exponential_like,
    "bernoulli": _bernoulli,
    "bernoulli_like": _bernoulli_like,
    "poisson": _poisson,
    "multinomial": _multinomial,
    "dropout": _dropout,
    "alpha_dropout": _alpha_dropout,
}
_WITH_MASKS = frozenset({"dropout", "alpha_dropout"})  # the value stays on its device

_MADE: dict[str, Callable[..., Tensor]] = {
    "zeros": torch.zeros,
    "ones": torch.ones,
    "full": torch.full,
    "arange": torch.arange,
    "linspace": torch.linspace,
    "logspace": torch.logspace,
    "eye": torch.eye,
}
