"""What a map records for each member of its dataset: one body for all prompts, or the body of each item of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from polytrace.errors import GraphError
from polytrace.graph import Options
from polytrace.maps.assembly import Member
from polytrace.maps.bodies import Bodies, Measured, Output, Recorded, output_shapes, record
from polytrace.maps.combining import Way
from polytrace.maps.datasets import Datum

if TYPE_CHECKING:
    from polytrace.model import Model


class Source(Protocol):
    """Where a datum's graph comes from."""

    def member(self, datum: Datum) -> Member:
        """The datum, ready to be put into a request. Raises MixesPromptsError where the body mixes prompts."""

    def measured(self, member: Member) -> Measured:
        """What its values look like."""

    def told(self, datum: Datum) -> str:
        """All that its results depend on beside the body."""


class EachPrompt:
    """A dataset of prompts: `body()` is recorded once, or once for each number of tokens if it asks for that."""

    def __init__(self, model: Model, body: Callable[..., Any], options: Options) -> None:
        self._bodies = Bodies(model, body, options)

    def member(self, datum: Datum) -> Member:
        return Member(number=datum.number, sequence=datum.sequence, recorded=self._bodies.of(datum.sequence))

    def measured(self, member: Member) -> Measured:
        return self._bodies.measured(member.sequence)

    def told(self, datum: Datum) -> str:
        return repr(datum.sequence)


class EachItem:
    """A sweep: one prompt, and `body(item)` recorded for each item."""

    def __init__(self, model: Model, body: Callable[..., Any], options: Options, sequence: tuple[int, ...]) -> None:
        self._model = model
        self._body = body
        self._options = options
        self._sequence = sequence
        self._last: tuple[int, Recorded] | None = None

    def member(self, datum: Datum) -> Member:
        return Member(number=datum.number, sequence=self._sequence, recorded=self._recorded(datum))

    def measured(self, member: Member) -> Measured:
        shapes = output_shapes(self._model, member.recorded, self._sequence, self._options)
        for name, shape in shapes.items():
            if shape.shape[:1] != (1,):
                raise GraphError(
                    f"{name!r} has shape {list(shape.shape)}: a value of a sweep has the prompt as its first "
                    "dimension, as in value[None]",
                    where=member.recorded.outputs[name].where,
                )
        return Measured(tokens=len(self._sequence), shapes=shapes, grown=dict.fromkeys(shapes, ()))

    def told(self, datum: Datum) -> str:
        return self._recorded(datum).digest

    def _recorded(self, datum: Datum) -> Recorded:
        if self._last is None or self._last[0] != datum.number:
            made = record(self._model, self._body, [self._sequence], self._options, datum.item)
            self._last = (datum.number, made)
        return self._last[1]


def check_combined(outputs: Mapping[str, Output], measured: Measured) -> None:
    """Raises GraphError for a value that has no form in which it could be combined."""
    for name, output in outputs.items():
        if output.combined is None:
            continue
        way, shape, grown = output.combined.way, measured.shapes[name].shape, measured.grown[name]
        told = f"polytrace.{way.value} of {name!r}: "
        if way is Way.TOP_K:
            if any(dim > 1 for dim in grown):
                raise GraphError(
                    f"{told}of a score {list(shape)} only the second dimension may be tokens; dimensions "
                    f"{list(grown)} are",
                    where=output.where,
                )
            continue
        if output.combined.is_of_tokens:
            if len(shape) < 2 or any(dim > 1 for dim in grown):
                raise GraphError(
                    f"{told}over='tokens' takes a value [prompts, tokens, ...], not {list(shape)}", where=output.where
                )
        elif grown:
            raise GraphError(
                f"{told}its dimension {grown[0]} is tokens, which prompts have different numbers of: reduce it, pick a "
                "position, or write over='tokens'",
                where=output.where,
            )
        rank = len(shape) - output.combined.is_of_tokens
        if way is Way.COVARIANCE and rank != 2:
            raise GraphError(f"{told}it is of one vector a row, and a row here is {list(shape)}", where=output.where)
