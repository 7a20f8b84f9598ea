"""Shapes asked of the service: of everything where torch is not installed, of called modules where it is.

One question answers for all nodes that a value is made of, and the answers are kept by what was asked: the structure,
the lengths of the prompts that it reads from, the form of its constants. A loop over prompts of one length asks once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

from polytrace.backend import Backend
from polytrace.certificate import ValueShape
from polytrace.errors import GraphError
from polytrace.graph import Constant, Invoke, Mask, Node, NodeId, Options, Read
from polytrace.pruning import alone
from polytrace.recording import Recording
from polytrace.step_questions import as_prompts
from polytrace.tensors import RawTensor

Answers = dict[tuple[Hashable, ...], tuple[ValueShape | None, ...]]


class AskedShapes:
    """Shape and dtype of every node of one recording. `answers` outlives it: the model keeps it."""

    def __init__(
        self,
        recording: Recording,
        leaf: Callable[[Node], ValueShape | None],
        invokes: Sequence[Invoke],
        backend: Backend,
        answers: Answers,
        *,
        is_late: bool = False,
    ) -> None:
        """`is_late`: what acts at several steps of a generation is meant at the last of them."""
        self._recording = recording
        self._leaf = leaf
        self._invokes = invokes
        self._backend = backend
        self._answers = answers
        self._is_late = is_late
        self._known: dict[NodeId, ValueShape] = {}

    def of(self, node: NodeId) -> ValueShape:
        """Raises GraphError with the user's line when the graph up to here cannot be honoured."""
        if node not in self._known:
            leaf = self._leaf(self._recording.nodes[node])
            if leaf is not None:
                self._known[node] = leaf
            else:
                self._ask(node)
        return self._known[node]

    def _ask(self, wanted: NodeId) -> None:
        nodes, places = self._recording.part(wanted)
        constants: Mapping[str, RawTensor] = self._recording.constants.tensors
        invokes = self._invokes
        if self._recording.loops.are_used or self._recording.goes_on:
            nodes, invokes, more = as_prompts(nodes, invokes, is_late=self._is_late)
            constants = {**constants, **more}
        # what the shapes follow from: the nodes without lines, prompts by their lengths, constants by their form
        key = tuple([self._form(node, invokes, constants) for node in nodes])
        if key not in self._answers:
            self._answers[key] = self._backend.validate(alone(nodes, invokes, constants, Options())).nodes
        for node, place in places.items():
            shape = self._answers[key][place]
            if shape is not None:
                self._known[node] = shape
        if wanted not in self._known:
            raise GraphError("the service does not say this value's shape", where=self._recording.nodes[wanted].where)

    def _form(self, node: Node, invokes: Sequence[Invoke], constants: Mapping[str, RawTensor]) -> Hashable:
        if isinstance(node, (Read, Mask)):
            if invokes[node.invoke].inputs is not None:
                return (replace(node, where=""), self._leaf(node))
            lengths = tuple([len(sequence) for sequence in invokes[node.invoke].sequences])
            return (node.site if isinstance(node, Read) else None, lengths)
        if isinstance(node, Constant):
            raw = constants[node.name]
            # what a mask or an index selects is a matter of its values
            content = None if "float" in raw.dtype else raw.digest or raw.state or bytes(raw.data)
            return (raw.dtype, raw.shape, content)
        return repr(replace(node, where=""))
