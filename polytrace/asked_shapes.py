"""Shapes asked of the service: of everything where torch is not installed, of called modules where it is.

One question answers for all nodes that a value is made of, and the answers are kept by what was asked, so a loop over
prompts of one length asks once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from polytrace.backend import Backend
from polytrace.certificate import ValueShape
from polytrace.errors import GraphError
from polytrace.graph import Graph, Invoke, Node, NodeId, Request
from polytrace.nodes import encode_nodes
from polytrace.recording import Recording

Answers = dict[str, tuple[ValueShape | None, ...]]


class AskedShapes:
    """Shape and dtype of every node of one recording. `answers` outlives it: the model keeps it."""

    def __init__(
        self,
        recording: Recording,
        leaf: Callable[[Node], ValueShape | None],
        invokes: Sequence[Invoke],
        backend: Backend,
        answers: Answers,
    ) -> None:
        self._recording = recording
        self._leaf = leaf
        self._invokes = invokes
        self._backend = backend
        self._answers = answers
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
        key = self._key(nodes)
        if key not in self._answers:
            constants = self._recording.constants.tensors
            request = Request(graph=Graph(nodes=nodes), invokes=tuple(self._invokes), constants=dict(constants))
            self._answers[key] = self._backend.validate(request).nodes
        for node, place in places.items():
            shape = self._answers[key][place]
            if shape is not None:
                self._known[node] = shape
        if wanted not in self._known:
            raise GraphError("the service does not say this value's shape", where=self._recording.nodes[wanted].where)

    def _key(self, nodes: Sequence[Node]) -> str:
        """What the shapes follow from: the graph without lines, the prompts' lengths, the constants' shapes."""
        encoded, sites, _ = encode_nodes(nodes)
        kinds = {name: (raw.dtype, raw.shape) for name, raw in self._recording.constants.tensors.items()}
        lengths = [[len(sequence) for sequence in invoke.sequences] for invoke in self._invokes]
        return json.dumps([[[node[0], *node[2:]] for node in encoded], sites, lengths, kinds])
