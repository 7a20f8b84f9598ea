"""Which tokens of prompts a method is about, and where these are in left-padded views.

*Places* are a list a prompt, of positions counted from 0 without pads. *Parts* are what places are in a view: indices
of sequences and columns that `value[part]` and `value[part] = other` take, one where all prompts have the same columns,
else one a prompt; so the engine knows which rows an edit leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.places import Prompts, position_in, positions_of

if TYPE_CHECKING:
    from polytrace.model import Model

Places = list[list[int]]
Part = tuple[int | slice, slice | list[int]]  # sequences, columns; the columns stay a dimension

_WHERE = "an int, several, a text that stands in every prompt once, or for each prompt positions or a text of its own"


def places_in(model: Model, batch: Prompts, where: Any) -> Places:
    """Places that a user names; None is every token. Raises GraphError for one that is not there, and for none."""
    if where is None:
        return [list(range(length)) for length in batch.lengths]
    found = _named(model, batch, where)
    if not any(found):
        raise GraphError(f"{where!r} is no token of any prompt: give positions as {_WHERE}", where=user_line())
    return found


def _named(model: Model, batch: Prompts, where: Any) -> Places:
    count = len(batch)
    if isinstance(where, str):
        return [_of_text(model, batch, prompt, where) for prompt in range(count)]
    if scalar(where) is not None:
        return [[position_in(batch, prompt, where)] for prompt in range(count)]
    if isinstance(where, slice):
        return [list(range(length))[where] for length in batch.lengths]
    listed = list(where)
    if all(scalar(one) is not None and not isinstance(one, str) for one in listed):
        return [[position_in(batch, prompt, one) for one in listed] for prompt in range(count)]
    if len(listed) != count:
        raise GraphError(
            f"positions of {len(listed)} prompts for {count} prompts; they are {_WHERE}", where=user_line()
        )
    return [
        _of_text(model, batch, prompt, own)
        if isinstance(own, str)
        else [position_in(batch, prompt, one) for one in ([own] if scalar(own) is not None else own)]
        for prompt, own in enumerate(listed)
    ]


def parts_of(lengths: Sequence[int], places: Places) -> list[Part]:
    """The places in a left-padded view; prompts without any are left out."""
    columns = _columns(lengths, places)
    if all(own == columns[0] for own in columns):
        return [(slice(None), _compact(columns[0]))] if columns[0] else []
    return [(prompt, _compact(own)) for prompt, own in enumerate(columns) if own]


def columns_of(batch: Prompts, prompt: int, places: list[int]) -> slice | list[int]:
    """One prompt's places in the batch's view."""
    pads = batch.longest - batch.lengths[prompt]
    return _compact([pads + place for place in places])


def paired_parts(batch: Prompts, places: Places, other: Prompts, others: Places) -> list[tuple[Part, Part]]:
    """Places of two batches side by side, as a copy from one to the other takes them."""
    for prompt, (own, its) in enumerate(zip(places, others, strict=True)):
        if len(own) != len(its):
            raise GraphError(
                f"prompt {prompt} has {batch.lengths[prompt]} tokens in one run and {other.lengths[prompt]} in the "
                f"other, so {len(own)} positions there would be {len(its)} here: give prompts of equal length, or "
                "positions such as -1 or a text",
                where=user_line(),
            )
    one, two = parts_of(batch.lengths, places), parts_of(other.lengths, others)
    if len(one) == len(two) and all(isinstance(ours[0], slice) for ours in (*one, *two)):
        return list(zip(one, two, strict=True))
    mine, theirs = _columns(batch.lengths, places), _columns(other.lengths, others)
    return [((n, _compact(mine[n])), (n, _compact(theirs[n]))) for n in range(len(batch)) if mine[n]]


@dataclass(frozen=True, slots=True)
class Axis:
    """Positions that a sweep visits one after another."""

    labels: list[Any]
    wheres: list[Any]  # as `places_in` takes them
    is_named: bool  # labels are the user's own

    def places(self, model: Model, batch: Prompts, number: int) -> Places:
        """Of one step. Prompts that are too short for a column of a ragged view have none."""
        where = self.wheres[number]
        if self.is_named or not batch.are_ragged or scalar(where) is None:
            return places_in(model, batch, where)
        return [[length + where] if -where <= length else [] for length in batch.lengths]


def axis_of(batch: Prompts, positions: Any) -> Axis:
    """The steps of a sweep: None is each token, a dict gives names to places.

    Tokens of prompts that differ in length are counted from the end.
    """
    if isinstance(positions, Mapping):
        if not positions:
            raise GraphError("no position is chosen", where=user_line())
        return Axis(list(positions), list(positions.values()), is_named=True)
    if positions is None or isinstance(positions, slice):
        numbers, _ = positions_of(batch, None)
        chosen: list[Any] = numbers if positions is None else numbers[positions]
        return Axis(chosen, chosen, is_named=False)
    if isinstance(positions, str):
        return Axis([positions], [positions], is_named=True)
    chosen = [positions] if scalar(positions) is not None else list(positions)
    if not chosen:
        raise GraphError("no position is chosen", where=user_line())
    for prompt in range(len(batch)):
        for one in chosen:
            if not isinstance(one, str):
                position_in(batch, prompt, one)
    return Axis(chosen, chosen, is_named=True)


def texts_at(model: Model, batch: Prompts, axis: Axis) -> list[list[str]] | None:
    """By prompt, the token at each step; None where steps have names, or several tokens."""
    if any(isinstance(label, str) for label in axis.labels):
        return None
    steps = [axis.places(model, batch, number) for number in range(len(axis.labels))]
    if any(len(own) > 1 for step in steps for own in step):
        return None
    return [
        [batch.texts[prompt][step[prompt][0]] if step[prompt] else "" for step in steps] for prompt in range(len(batch))
    ]


def absent_in(steps: Sequence[Places]) -> list[tuple[int, int]]:
    """Prompts, and steps of a sweep that they have no token for."""
    return [(prompt, step) for step, places in enumerate(steps) for prompt, own in enumerate(places) if not own]


def _columns(lengths: Sequence[int], places: Places) -> list[list[int]]:
    longest = max(lengths)
    return [[longest - length + place for place in own] for length, own in zip(lengths, places, strict=True)]


def _compact(columns: list[int]) -> slice | list[int]:
    first = columns[0]
    return slice(first, first + len(columns)) if columns == list(range(first, first + len(columns))) else columns


def _of_text(model: Model, batch: Prompts, prompt: int, text: str) -> list[int]:
    """The tokens of a prompt that have a part of a text."""
    whole = batch.given[prompt]
    if whole is not None:
        spans = model.tokenizer.encode(whole).offsets
    else:
        texts, spans, end = batch.texts[prompt], [], 0
        for own in texts:
            spans.append((end, end + len(own)))
            end += len(own)
        whole = "".join(texts)
    times = whole.count(text) if text else 0
    if times != 1:
        told = f"stands in prompt {prompt} {times} times" if times else f"is not in prompt {prompt}"
        raise GraphError(f"{text!r} {told} ({whole!r}): give positions as numbers", where=user_line())
    start = whole.index(text)
    text_end = start + len(text)
    start += len(text) - len(text.lstrip())  # a space before a word is part of its token, or a token that is not meant
    return [place for place, (first, last) in enumerate(spans) if first < text_end and last > start and first < last]
