"""The block of `model.edit(...)`, and the model whose traces start from what was recorded there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from types import TracebackType
from typing import Any, NoReturn

from polytrace.certificate import ValueShape
from polytrace.edits.open_shapes import opened
from polytrace.edits.sets import EditSet, check_edits, check_name, plain_label, refuse_save
from polytrace.errors import GraphError
from polytrace.graph import Constant, Invoke, Node, NodeId, Options
from polytrace.invoke_block import InvokeBlock
from polytrace.lines import user_line
from polytrace.model import Model
from polytrace.modules import Module
from polytrace.positions import with_positions
from polytrace.recording import Recording
from polytrace.storage import State
from polytrace.tracing import Tracer, open_trace

_LONGEST = 61  # tokens of the prompts that stand for later ones where a shape is asked for


class EditedModel(Model):
    """A model whose traces start from edits. It shares everything else with the model that it was made of."""

    def __init__(self, base: Model, edits: Sequence[EditSet]) -> None:
        own = {name: value for name, value in vars(base).items() if not isinstance(value, Module)}
        self.__dict__.update(own, _model=self, base=base.base, edits_of_traces=(*base.edits_of_traces, *edits))

    def __iter__(self) -> NoReturn:
        raise GraphError(
            "model.edit() gives the edited model alone, and it is no list: write `with model.edit() as edited:`",
            where=user_line(),
        )

    @property
    def mask(self) -> Any:
        """In the block of an edit: `[sequences, longest]`, True where the later prompts' view has a token."""
        tracer = open_trace()
        if tracer is None or tracer.model.base is not self.base:
            raise GraphError("the mask exists inside the block of `with model.edit() as edited:`", where=user_line())
        return tracer.mask


class EditBlock:
    """`with model.edit(...) as edited`: what is recorded in the block applies to every prompt of `edited`'s traces."""

    def __init__(self, model: Model, name: str | None, *, is_shared: bool, is_in_place: bool) -> None:
        self._model = model
        self._name = name
        self._is_shared = is_shared
        self._is_in_place = is_in_place
        self._tracer = EditTracer(model)
        self._edited = EditedModel(model, ())
        if name is not None:
            check_name(name, user_line())

    def __enter__(self) -> EditedModel:
        self._tracer.__enter__()
        return self._edited

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tracer.__exit__(kind, error, traceback)
        edits = self._tracer.edits
        if edits is None:
            return
        if self._name is not None:
            edits = self._model.keep_edits(self._name, edits, is_shared=self._is_shared)
        for model in (self._edited, self._model) if self._is_in_place else (self._edited,):
            model.__dict__["edits_of_traces"] = (*model.edits_of_traces, edits)


class EditTracer(Tracer):
    """Records edits. They have one invoke, for whatever prompts each later one has."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, None, Options(), False)
        self.recording = _EditRecording(model.description, self)
        self.edits: EditSet | None = None  # once the block has ended well
        self._invoke = 0

    @property
    def told(self) -> str:
        return "an edit runs when a later trace starts from it, so a recorded value has no data"

    @property
    def hint(self) -> str:
        return ""

    def invoke(
        self, prompts: Any = None, *, chat: Mapping[str, Any] | None = None, pixel_values: Any = None
    ) -> InvokeBlock:
        self._refuse_prompts()

    def shape_of(self, node: NodeId) -> ValueShape:
        one, other = (view.shape_of(node) for view in self._views)
        return ValueShape(shape=opened(one.shape, other.shape), dtype=one.dtype)

    def lengths_of(self, invoke: int) -> None:  # type: ignore[override]
        """Nobody knows them yet."""

    def _sequences(self) -> NoReturn:
        self._refuse_prompts()

    def _refuse_prompts(self) -> NoReturn:
        raise GraphError(
            "an edit has no prompts of its own: it applies to every prompt of the traces that start from it",
            where=user_line(),
        )

    @cached_property
    def _views(self) -> tuple[Tracer, Tracer]:
        """What is recorded, as seen by two choices of prompts that differ in number and length."""
        longest = max(2, min(_LONGEST, self.model.description.limits.max_sequence_tokens))
        return _View(self, 3, longest), _View(self, 2, longest - 1)

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            nodes, _ = self.recording.finish()
            check_edits(nodes, self.where)
            used = {node.name for node in nodes if isinstance(node, Constant)}
            constants = {name: raw for name, raw in self.recording.constants.tensors.items() if name in used}
            self.edits = EditSet(label=plain_label(f"edit at {self.where}"), nodes=nodes, constants=constants)
        self.recording.closed = "this value belongs to an edit, whose block has ended"


class _View(Tracer):
    """An edit's values as they are for some prompts."""

    def __init__(self, edit: EditTracer, num_sequences: int, length: int) -> None:
        super().__init__(edit.model, None, edit.options, False, home=edit)
        self._invokes = [Invoke(sequences=((0,) * length,) * num_sequences)]
        self.recording = copy(edit.recording)
        self.recording.nodes = _Nodes(edit.recording.nodes, self.lengths_of(0))  # type: ignore[assignment]


class _Nodes(Sequence[Node]):
    """An edit's nodes as they are recorded, with positions for prompts of these lengths."""

    def __init__(self, nodes: Sequence[Node], lengths: Sequence[int]) -> None:
        self._nodes = nodes
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, place: Any) -> Any:
        return with_positions(self._nodes[place], self._lengths)


class _EditRecording(Recording):
    is_edit = True

    def save(self, state: State, value: Any, *, is_member: bool = False) -> None:
        raise refuse_save(user_line())


def resolved(model: Model, items: Sequence[Any], version: int | None = None) -> tuple[EditSet, ...]:
    """What is given as edits: names (`"happy"`, `"happy@2"`), edited models, adapters. Raises NotFoundError."""
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise GraphError(f"edits are given as a list, as in edits=[{_told(items)}]", where=user_line())
    found: list[EditSet] = []
    for item in items:
        if isinstance(item, str):
            name, _, number = item.partition("@")
            if number and not number.isdecimal():
                raise GraphError(f"{item!r} is no edit: a version is a number, as in 'happy@2'", where=user_line())
            found.append(model.kept_edits(name, int(number) if number else version))
        elif isinstance(item, EditSet):
            found.append(item)
        elif isinstance(item, EditedModel):
            found += item.edits_of_traces
        elif hasattr(item, "edits_for"):
            found.append(item.edits_for(model))
        else:
            raise GraphError(
                f"edits are names, edited models and adapters, not a {type(item).__name__}", where=user_line()
            )
    return tuple(found)


def _told(item: Any) -> str:
    return repr(item) if isinstance(item, str) else f"<{type(item).__name__}>"
