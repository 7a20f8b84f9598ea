"""Long columns of values written short: what repeats is written once.

A folded sequence is a list of values and of repeats, `[count, item, ...]`, whose items are values and repeats again:
`[7, [3, 0, 1]]` is 7 0 1 0 1 0 1. A column of integers is one integer where all are equal, a folded sequence, or
`{"steps": [first, step, ...]}` with the steps folded. Unfolding knows the length beforehand, so a few bytes never grow
into more than was agreed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from polytrace.codec import brief
from polytrace.errors import WireError

MAX_DEPTH = 4  # of repeats in repeats
_WINDOW = 4  # values that are looked for together
_MAX_VALUE = 1 << 65  # the difference of two 64-bit integers fits


def fold(values: Sequence[Hashable]) -> list[Any]:
    """The sequence with its repeats folded; `unfold` gives it back. Values are no tuples."""
    items = list(values)
    for _ in range(MAX_DEPTH):
        folded = _fold_once(items)
        if len(folded) == len(items):
            break
        items = folded
    return items


def unfold(folded: Any, length: int, check: Callable[[Any], bool]) -> list[Any]:
    """The `length` values of a folded sequence, each a value that `check` takes. Raises WireError."""
    size = size_of(folded, check, length)
    if size != length:
        raise WireError(f"a column has {size} values where {length} belong")
    return _expanded(folded)


def size_of(folded: Any, check: Callable[[Any], bool], limit: int, depth: int = 0) -> int:
    """How many values a folded sequence has. Takes no memory. Raises WireError beyond the limit."""
    if not isinstance(folded, list):
        raise WireError(f"a folded sequence is a list, not {brief(folded)}")
    if depth > MAX_DEPTH:
        raise WireError(f"repeats nest deeper than {MAX_DEPTH}")
    size = 0
    for item in folded:
        if isinstance(item, list):
            if len(item) < 2 or type(item[0]) is not int or not 1 <= item[0] <= limit:
                raise WireError(f"a repeat is a count from 1 to {limit} and what it repeats")
            size += item[0] * size_of(item[1:], check, limit, depth + 1)
        elif check(item):
            size += 1
        else:
            raise WireError(f"{brief(item)} does not belong into this column")
        if size > limit:
            raise WireError(f"a column has more than {limit} values")
    return size


def fold_column(values: Sequence[int]) -> Any:
    """A column of integers."""
    first = values[0]
    if values.count(first) == len(values):
        return first
    steps = [after - before for before, after in pairwise(values)]
    by_steps = [first, *fold(steps)]
    if len(by_steps) == 2:
        return {"steps": by_steps}
    plain = fold(values)
    return plain if _weight(plain) <= _weight(by_steps) else {"steps": by_steps}


def unfold_column(plain: Any, length: int, low: int, high: int) -> int | list[int]:
    """One integer that stands for all `length` of a column, or the list of them. Each is from `low` to below `high`."""
    if type(plain) is int:
        values = [plain]
    elif isinstance(plain, dict) and plain.keys() == {"steps"}:
        values = list(accumulate(unfold(plain["steps"], length, _is_integer)))
    else:
        values = unfold(plain, length, _is_integer)
    if values and not (low <= min(values) and max(values) < high):
        wrong = min(values) if min(values) < low else max(values)
        raise WireError(f"{wrong} stands in a column of integers from {low} to {high - 1}")
    return plain if type(plain) is int else values


def weight_of(column: Any) -> int:
    """About how much room a column takes."""
    return 1 if isinstance(column, int) else _weight([*column.values()] if isinstance(column, dict) else column)


def _fold_once(items: list[Any]) -> list[Any]:
    """One pass: wherever the last few items stand once more, all their repeats become one item."""
    found: list[Any] = []
    last: dict[Hashable, int] = {}  # where an item, or a window of items, stood last since the last repeat
    ends: dict[int, int] = {}  # by distance: where a run of items equal to those before them ended
    place = 0
    while place < len(items):
        window = ("window", *items[place : place + _WINDOW])
        for start in {last.get(items[place], place), last.get(window, place)} - {place}:
            length = place - start
            stop = ends.get(length, 0)
            if stop <= place:
                stop = ends[length] = _end_of_run(items, place, length)
            count = (stop - start) // length
            if (count - 1) * length >= _WINDOW - 1:
                found[len(found) - length :] = [(count, *items[start:place])]
                place = start + count * length
                last = {}
                break
        else:
            last[items[place]] = last[window] = place
            found.append(items[place])
            place += 1
    return found


def _end_of_run(items: list[Any], place: int, length: int) -> int:
    """The first place from `place` on whose item is not that of `length` places before."""
    while place < len(items) and items[place] == items[place - length]:
        place += 1
    return place


def _expanded(folded: list[Any]) -> list[Any]:
    values: list[Any] = []
    for item in folded:
        if isinstance(item, list):
            values += _expanded(item[1:]) * item[0]
        else:
            values.append(item)
    return values


def _weight(folded: Sequence[Any]) -> int:
    return sum(_leaves(folded))


def _leaves(items: Sequence[Any]) -> Iterator[int]:
    for item in items:
        yield _weight(item) if isinstance(item, (tuple, list)) else 1


def _is_integer(value: Any) -> bool:
    return type(value) is int and -_MAX_VALUE < value < _MAX_VALUE
