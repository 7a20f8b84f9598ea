"""A map whose body works on several prompts at once: all of them in one request, if they fit into one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import ValueShape
from polytrace.errors import GraphError
from polytrace.graph import Options, Request
from polytrace.maps.assembly import Member, request_of_all
from polytrace.maps.bodies import Measured, Recorded, node_shapes, record
from polytrace.maps.combining import Way
from polytrace.maps.datasets import Datum
from polytrace.maps.index import DatasetDigest
from polytrace.maps.parts import Part, put_contribution, raw_of
from polytrace.maps.rowwise import MixesPromptsError
from polytrace.maps.working import Worker
from polytrace.tensors import RawTensor

if TYPE_CHECKING:
    from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class AtOnce:
    """All prompts as one view, ready to run."""

    model: Model
    options: Options
    recorded: Recorded
    measured: Measured
    members: tuple[Member, ...]
    skipped: dict[int, str]
    total: int  # of the dataset
    dataset: str

    @property
    def member(self) -> Member:
        """The first prompt, with the graph of all."""
        return self.members[0]

    @property
    def request(self) -> Request:
        """All of them in one."""
        sequences = [member.sequence for member in self.members]
        return request_of_all(self.recorded, sequences, self.measured, self.options)

    def run(self) -> Part:
        """The one part of the map."""
        worker = Worker(self.model.backend, self.measured, self.options, False)
        values = worker.values(self.request)
        tensors: dict[str, RawTensor] = {}
        for name, output in self.recorded.outputs.items():
            if output.combined is None:
                tensors[name] = raw_of(values[f"{name}/0"])
            else:
                put_contribution(tensors, name, 0, worker.contribution(name, self.members, values))
        return Part(
            number=0,
            prompts=range(self.total),
            skipped=self.skipped,
            path=None,
            tensors=tensors,
            names=tuple(name for name in self.recorded.outputs if name in tensors),
            is_whole=True,
        )


def all_at_once(
    model: Model,
    body: Callable[..., Any],
    options: Options,
    data: Iterable[Datum],
    mixed: MixesPromptsError,
    total: int | None,
) -> AtOnce:
    """Records the body with all prompts. Raises GraphError with the numbers where a pass does not take them."""
    limit = model.description.limits.pass_tokens
    fitting: list[Datum] = []
    skipped: dict[int, str] = {}
    digest, tokens = DatasetDigest(), 0
    for datum in data:
        digest.add(repr(datum.sequence) if datum.problem is None else "skipped")
        if datum.problem is not None:
            skipped[datum.number] = datum.problem
            continue
        fitting.append(datum)
        tokens += len(datum.sequence)
        if tokens > limit:
            known = f" of {total}" if total is not None else ""
            raise GraphError(
                f"{mixed.told}, so all of them must fit into one pass, which takes "
                f"{limit} tokens; the first {datum.number + 1}{known} have {tokens}. Combine across prompts with "
                "polytrace.mean, sum, max, min, count, covariance or top_k, or map fewer prompts",
                where=mixed.where,
            )
    sequences = [datum.sequence for datum in fitting]
    recorded = record(model, body, sequences, options)
    shapes = node_shapes(model, recorded, sequences, options)
    is_ragged = len({len(sequence) for sequence in sequences}) > 1
    found: dict[str, ValueShape] = {}
    for name, output in recorded.outputs.items():
        shape = shapes[output.node]
        assert shape is not None
        if output.combined is not None:
            if shape.shape[:1] != (len(sequences),):
                raise GraphError(
                    f"polytrace.{output.combined.way.value} of {name!r}: its first dimension is prompts, and here it "
                    f"is {list(shape.shape)} with {len(sequences)} prompts",
                    where=output.where,
                )
            of_tokens = output.combined.is_of_tokens or (output.combined.way is Way.TOP_K and len(shape.shape) > 1)
            if is_ragged and of_tokens:
                raise GraphError(
                    f"polytrace.{output.combined.way.value} of {name!r}: {mixed}, and in one view of prompts of "
                    "different lengths pads would be counted as tokens",
                    where=output.where,
                )
            shape = ValueShape(shape=(1, *shape.shape[1:]), dtype=shape.dtype)
        found[name] = shape
    measured = Measured(tokens=max(map(len, sequences)), shapes=found, grown=dict.fromkeys(found, ()))
    members = tuple(Member(number=datum.number, sequence=datum.sequence, recorded=recorded) for datum in fitting)
    return AtOnce(
        model=model,
        options=options,
        recorded=recorded,
        measured=measured,
        members=members,
        skipped=skipped,
        total=len(fitting) + len(skipped),
        dataset=digest.value(),
    )
