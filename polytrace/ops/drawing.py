"""Rows of what draws: its numbers depend on the request's seed and the node's place alone."""

from __future__ import annotations

from polytrace.ops.spec import OpSpec, Reach, op


def _drawn(
    name: str,
    *kwargs: str,
    torch: str = "function",
    reach: Reach = Reach.PLACE,
    first: tuple[str, ...] = (),
) -> OpSpec:
    return op(name, *kwargs, torch=torch, is_random=True, reach=reach, first=first)


def _made(name: str, *kwargs: str, first: str) -> OpSpec:
    """Without an operand: `torch.randn(3)` draws where it is written, `functions.randn(3)` where values are."""
    usual = {"is_random": True, "is_made": True, "reach": Reach.PLACE}
    return op(name, *kwargs, torch="polytrace", first=tuple(first.split()), **usual)


ROWS = (
    _drawn("randn_like", "dtype"),
    _drawn("rand_like", "dtype"),
    _drawn("randint_like", "low", "high", "dtype"),
    # what torch has in place only: `torch.empty_like(h).normal_()`
    _drawn("normal_like", "mean", "std", torch="Tensor.normal_"),
    _drawn("uniform_like", "from", "to", torch="Tensor.uniform_"),
    _drawn("exponential_like", "lambd", torch="Tensor.exponential_"),
    _drawn("bernoulli_like", "p", torch="Tensor.bernoulli_"),
    _drawn("normal", "std", first=("mean",)),
    _drawn("bernoulli", "p", torch="both"),
    _drawn("poisson"),
    _drawn("multinomial", "num_samples", "replacement", torch="both", reach=Reach.WHOLE),
    _drawn("dropout", "p", "training", torch="functional torch.dropout"),
    _drawn("alpha_dropout", "p", "training", torch="functional"),
    _made("randn", "dtype", first="size"),
    _made("rand", "dtype", first="size"),
    _made("randint", "high", "size", "dtype", first="low high"),
    _made("randperm", "dtype", first="n"),
)
