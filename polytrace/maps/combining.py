"""What the body of a map says of values that are combined across prompts: `polytrace.mean(value)`.

These are marks, not values: the body returns them under a name, and `mapping.results` has what became of them. Each
request combines its own prompts where the model is, in float64 (`assembly`), and the client combines the requests
(`running`). So the result does not depend on how prompts are cut into requests: exactly for `max`, `min`, `count`,
`top_k` and sums of integers, and to 1e-12 of the largest magnitude that was added for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.storage import is_recorded


class Way(Enum):
    """How values of many prompts become one."""

    SUM = "sum"
    MEAN = "mean"
    MAX = "max"
    MIN = "min"
    COUNT = "count"
    COVARIANCE = "covariance"
    TOP_K = "top_k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """A value of the body, and the way in which it is combined."""

    way: Way
    value: Any  # recorded
    is_of_tokens: bool = False  # each token is a row of its own, `[1, tokens, ...]`; else each prompt, `[1, ...]`
    number: int = 0  # k of `top_k`, the correction of `covariance`
    where: str

    def described(self) -> list[Any]:
        """All of it that the result depends on beside the value, as plain JSON."""
        return [self.way.value, self.is_of_tokens, self.number]


def sum(value: Any, *, over: str = "prompts") -> Combined:
    """The sum over all prompts: float64 `[...]` of a value `[prompts, ...]`, int64 where it is of integers or bools.

    `over="tokens"`: the value is `[prompts, tokens, ...]` and every token counts as a row, here and below.
    """
    return _combined(Way.SUM, value, over)


def mean(value: Any, *, over: str = "prompts") -> Combined:
    """The mean over all prompts, float64."""
    return _combined(Way.MEAN, value, over)


def max(value: Any, *, over: str = "prompts") -> Combined:
    """The largest over all prompts, element by element; NaN where there is one. Half precision becomes float32."""
    return _combined(Way.MAX, value, over)


def min(value: Any, *, over: str = "prompts") -> Combined:
    """The smallest over all prompts, as `max`."""
    return _combined(Way.MIN, value, over)


def count(value: Any, *, over: str = "prompts") -> Combined:
    """In how many prompts each element is not 0 or False, int64."""
    return _combined(Way.COUNT, value, over)


def covariance(value: Any, *, over: str = "prompts", correction: int = 1) -> Combined:
    """The covariance of vectors `[prompts, features]` over all prompts: float64 `[features, features]`.

    The sum of products of what differs from the mean, over the number of rows less `correction`.
    """
    return _combined(Way.COVARIANCE, value, over, correction)


def top_k(value: Any, k: int) -> Combined:
    """The k largest of a score over all prompts: `[prompts]`, `[prompts, tokens]`, or with more dimensions.

    The result has `.values` `[k]`, largest first, `.prompts` `[k]` with the number of each in the dataset, and
    `.positions` `[k, dimensions - 1]` with its place in the prompt's own score. Of equal scores the earlier one goes
    first; NaN is larger than any number.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise GraphError(f"top_k takes how many to keep, not {k!r}", where=user_line())
    return _combined(Way.TOP_K, value, "prompts", k)


def _combined(way: Way, value: Any, over: str, number: int = 0) -> Combined:
    where = user_line()
    if not is_recorded(value):
        raise GraphError(
            f"polytrace.{way.value} combines a value of a map's body across prompts, not a {type(value).__name__}",
            where=where,
        )
    if over not in ("prompts", "tokens"):
        raise GraphError(f"values are combined over 'prompts' or over 'tokens', not over {over!r}", where=where)
    return Combined(way=way, value=value, is_of_tokens=over == "tokens", number=number, where=where)
