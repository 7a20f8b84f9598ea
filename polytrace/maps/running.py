"""What is known of combined values so far, and how the next request's part of them is taken in. Needs numpy.

A *contribution* is what one request gave of one value: a few arrays by name, kept in the part's file. Taking the same
contributions in the same order gives the same bits, so a map that goes on behind a crash takes in what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from polytrace.errors import GraphError
from polytrace.maps.combining import Combined, Way

Array = NDArray[Any]
Contribution = Mapping[str, Array]


class TopK(NamedTuple):
    """The largest of a score over all prompts, the largest first."""

    values: Any  # [k]
    prompts: Any  # [k] int64, numbers in the dataset
    positions: Any  # [k, dimensions - 1] int64, places in the prompt's own score


class Running(Protocol):
    """One combined value."""

    def take(self, given: Contribution) -> None:
        """Takes the next request's contribution in."""

    def result(self) -> Any:
        """An array, or a TopK of arrays; None before the first contribution."""


def running(name: str, combined: Combined) -> Running:
    """A value of which nothing is known yet; its name is for errors."""
    if combined.way is Way.TOP_K:
        return _Top(combined.number)
    if combined.way is Way.COVARIANCE:
        return _Covariance(name, combined)
    if combined.way is Way.MEAN:
        return _Mean(name, combined)
    return _Folded(name, combined, *_FOLDS[combined.way])


def _check_shape(name: str, combined: Combined, known: Array, own: Array) -> None:
    """numpy would stretch one to the other."""
    if known.shape != own.shape:
        raise GraphError(
            f"polytrace.{combined.way.value} of {name!r}: prompts have values of shapes {list(known.shape)} and "
            f"{list(own.shape)}, and only one shape can be combined",
            where=combined.where,
        )


class _Folded:
    """A sum, a count or an extreme."""

    def __init__(self, name: str, combined: Combined, array: str, fold: np.ufunc) -> None:
        self._name, self._combined, self._array, self._fold = name, combined, array, fold
        self._value: Array | None = None

    def take(self, given: Contribution) -> None:
        own = given[self._array]
        if self._value is not None:
            _check_shape(self._name, self._combined, self._value, own)
        self._value = own if self._value is None else np.asarray(self._fold(self._value, own))

    def result(self) -> Array | None:
        return self._value


_FOLDS: dict[Way, tuple[str, np.ufunc]] = {
    Way.SUM: ("sum", np.add),
    Way.COUNT: ("times", np.add),
    Way.MAX: ("max", np.maximum),
    Way.MIN: ("min", np.minimum),
}


class _Mean:
    def __init__(self, name: str, combined: Combined) -> None:
        self._sum = _Folded(name, combined, "sum", np.add)
        self._count = 0

    def take(self, given: Contribution) -> None:
        self._sum.take(given)
        self._count += int(given["count"])

    def result(self) -> Array | None:
        total = self._sum.result()
        return None if total is None else np.asarray(total, np.float64) / self._count


class _Covariance:
    """Chan, Golub and LeVeque's way to join the moments of two sets of rows (1979)."""

    def __init__(self, name: str, combined: Combined) -> None:
        self._name, self._combined, self._correction = name, combined, combined.number
        self._count = 0
        self._mean: Array | None = None
        self._products: Array | None = None  # sums of products of what differs from the mean

    def take(self, given: Contribution) -> None:
        if "rows" in given:
            rows = np.asarray(given["rows"], np.float64)
            count, mean = len(rows), rows.mean(0)
            rest = rows - mean
            products = rest.T @ rest
        else:
            count, mean, products = int(given["count"]), given["mean"], given["products"]
        if self._mean is None or self._products is None:
            self._count, self._mean, self._products = count, mean, products
            return
        _check_shape(self._name, self._combined, self._mean, mean)
        total = self._count + count
        apart = mean - self._mean
        self._products = self._products + products + np.outer(apart, apart) * (self._count * count / total)
        self._mean = self._mean + apart * (count / total)
        self._count = total

    def result(self) -> Array | None:
        """NaN where there are too few rows for the correction."""
        if self._products is None:
            return None
        degrees = self._count - self._correction
        return self._products / degrees if degrees > 0 else np.full_like(self._products, np.nan)


class _Top:
    def __init__(self, number: int) -> None:
        self._number = number
        self._best: Contribution | None = None

    def take(self, given: Contribution) -> None:
        both = [given] if self._best is None else [self._best, given]
        self._best = _best(both, self._number)

    def result(self) -> TopK | None:
        best = self._best
        return None if best is None else TopK(best["values"], best["prompts"], best["positions"])


def top_contribution(
    values: Sequence[Array], places: Sequence[Array], numbers: Sequence[int], sizes: tuple[int, ...], number: int
) -> Contribution:
    """The largest of a request: of each prompt's own largest and their places in its score, which is flat.

    `sizes`: of the score's dimensions behind that of prompts; the first of them does not matter.
    """
    found = []
    for own, place, prompt in zip(values, places, numbers, strict=True):
        positions = np.empty((len(place), len(sizes)), np.int64)
        rest = place
        for dim in range(len(sizes) - 1, 0, -1):
            rest, positions[:, dim] = np.divmod(rest, sizes[dim])
        if sizes:
            positions[:, 0] = rest
        found.append({"values": own, "prompts": np.full(len(own), prompt, np.int64), "positions": positions})
    return _best(found, number)


def _best(parts: Sequence[Contribution], number: int) -> Contribution:
    """The largest of several; of equal ones the earlier part's, and in a part the earlier."""
    values = np.concatenate([part["values"] for part in parts])
    order = _descending(values)[:number]
    return {name: np.concatenate([part[name] for part in parts])[order] for name in ("values", "prompts", "positions")}


def _descending(values: Array) -> Array:
    """Largest first, NaN before all, equal ones in the order in which they stand."""
    backwards = np.argsort(values[::-1], kind="stable")[::-1]
    return len(values) - 1 - backwards
