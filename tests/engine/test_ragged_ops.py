"""No row of the op table lets pad rows count: what a program may still reduce is the same whatever the pads hold.

Every tensor of every example stands for a site's view of prompts of which the first is one token shorter. An op that is
not refused is run with two contents of that pad row; where a sum over a part of its result is admitted, that part must
not differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_examples import DETERMINED
from torch import Tensor, nn

from engine.ops import DTYPE_NAMES, run_op
from engine.shapes import infer
from polytrace.description import Leaf
from polytrace.errors import GraphError
from polytrace.grammar import returns_several
from polytrace.graph import (
    Constant,
    DType,
    Graph,
    Invoke,
    Node,
    NodeId,
    Op,
    Operand,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Site,
)
from polytrace.ops import OPS
from polytrace.tensors import RawTensor
from tests.engine.test_ragged import DESCRIPTION


class Trial:
    """One call with one of its tensors read from the model."""

    def __init__(self, name: str, args: Any, kwargs: Any, read: Tensor) -> None:
        self.name, self.args, self.kwargs, self.read = name, args, kwargs, read
        self.nodes: list[Node] = []
        self.constants: dict[str, RawTensor] = {}
        plain = tuple([self._operand(part) for part in args])
        named = {key: self._operand(part) for key, part in kwargs.items()}
        self.call = Op(name=name, args=plain, kwargs=named, where="user.py:1")
        self.made = self._add(self.call)
        leaf = Leaf(selector=(), tail=tuple(read.shape[2:]), dtype=DTYPE_NAMES[read.dtype])
        site = replace(DESCRIPTION.sites[0], leaves=(leaf,))
        self.description = replace(DESCRIPTION, sites=(site,))
        lengths = [read.shape[1] - (number == 0) for number in range(read.shape[0])]
        self.invokes = (Invoke(sequences=tuple((1,) * length for length in lengths)),)

    def _operand(self, part: Any) -> Operand:
        if part is self.read:
            return self._add(Read(site=Site(module="layers.0", port=Port.OUTPUT), invoke=0, where="user.py:1"))
        if isinstance(part, Tensor):
            part = part.contiguous()
            data = part.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            name = f"c{len(self.constants)}"
            self.constants[name] = RawTensor(
                dtype=DTYPE_NAMES[part.dtype], shape=tuple(part.shape), data=memoryview(data)
            )
            return self._add(Constant(name=name, where="user.py:1"))
        if isinstance(part, torch.dtype):
            return DType(DTYPE_NAMES[part])
        if isinstance(part, slice):
            return part
        if isinstance(part, (tuple, list)):
            return type(part)([self._operand(member) for member in part])
        operand: Operand = part
        return operand

    def _add(self, node: Node) -> Ref:
        self.nodes.append(node)
        return Ref(NodeId(len(self.nodes) - 1))

    def is_admitted(self, *more: tuple[str, tuple[Any, ...]]) -> bool:
        """Whether the call, and ops behind it, pass; anything but pad rows is no reason to be refused here."""
        nodes, value = list(self.nodes), self.made
        for name, args in more:
            nodes.append(Op(name=name, args=(value, *args), where="user.py:2"))
            value = Ref(NodeId(len(nodes) - 1))
        if returns_several(self.call) and not more:
            nodes.append(Op(name="item", args=(value, 0), where="user.py:2"))
            value = Ref(NodeId(len(nodes) - 1))
        nodes.append(Save(name="x", value=value, where="user.py:3"))
        request = Request(graph=Graph(nodes=tuple(nodes)), invokes=self.invokes, constants=self.constants)
        try:
            infer(self.description, request, nn.Module())
        except GraphError as error:
            if "pad rows would be counted" in str(error):
                return False
            if "complex values do not travel" not in str(error) and "depends on values" not in str(error):
                raise
        return True

    def run(self, view: Tensor) -> Any:
        """The result with another content of the view."""

        def put(part: Any) -> Any:
            if part is self.read:
                return view
            return type(part)([put(member) for member in part]) if isinstance(part, (tuple, list)) else part

        return run_op(self.name, put(self.args), {key: put(part) for key, part in self.kwargs.items()})


def trials(name: str) -> Iterator[Trial]:
    for args, kwargs in DETERMINED[name]:
        parts = [*args, *kwargs.values()]
        for part in [member for each in parts for member in (each if isinstance(each, list) else [each])]:
            is_view = isinstance(part, Tensor) and part.dtype is torch.float32 and part.dim() >= 2
            if is_view and part.shape[0] > 1 and part.shape[1] > 1:
                yield Trial(name, args, kwargs, part)


def parts_of(value: Tensor) -> Iterator[tuple[Any, ...]]:
    """Ways to a part of a value, as ops: all of it, and the first and last place of each dimension."""
    yield ()
    for dim, size in enumerate(value.shape):
        yield (("narrow", (dim, 0, 1)),)
        yield (("narrow", (dim, size - 1, 1)),)


def equal(one: Tensor, other: Tensor) -> bool:
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    return torch.equal(one.nan_to_num(), other.nan_to_num()) if one.is_floating_point() else torch.equal(one, other)


# Which places these pick is in the index: the program's choice, as in h[:, 0].
PICKS = {"getitem", "gather", "index_select", "take_along_dim", "take", "unbind"}


@pytest.mark.parametrize("name", [name for name in DETERMINED if not OPS[name].needs_values and name not in PICKS])
def test_what_may_be_summed_does_not_depend_on_pads(name: str) -> None:
    for trial in trials(name):
        if not trial.is_admitted():
            continue
        changed = trial.read.clone()
        changed[0, 0] = changed[0, 0] * 0.7 + 0.2
        try:
            before, after = trial.run(trial.read), trial.run(changed)
        except RuntimeError:
            continue  # not this matrix
        several = [] if isinstance(before, Tensor) else [*range(min(3, len(before)))]
        for place in several or [None]:
            item = () if place is None else (("item", (place,)),)
            one, other = (before, after) if place is None else (before[place], after[place])
            for way in parts_of(one):
                dims = tuple(range(one.dim()))
                whole = (*item, *way, ("to", (DType("float32"),)), ("sum", (dims,) if dims else ()))
                if one.is_complex() or one.numel() == 0 or not trial.is_admitted(*whole):
                    continue
                left, right = (run_op(*way[0][:1], (each, *way[0][1]), {}) if way else each for each in (one, other))
                assert equal(left, right), (trial.args, trial.kwargs, place, way)


def test_ops_that_mix_rows_are_refused_over_tokens_and_ops_that_do_not_are_taken() -> None:
    refused, taken = set(), set()
    for name in DETERMINED:
        for trial in trials(name):
            (taken if trial.is_admitted() else refused).add(name)
    assert {
        "conv1d",
        "svdvals",
        "det",
        "matrix_exp",
        "kron",
        "cov",
        "histc",
        "fft2",
        "group_norm",
        "pdist",
        "trace",
    } <= refused
    assert {"cumsum", "sort", "logsumexp", "median", "einsum", "scaled_dot_product_attention"} <= refused
    assert not {"exp", "erfinv", "addcmul", "layer_norm", "rms_norm", "gelu", "embedding", "where", "lerp"} & refused
    assert {"fft", "cosine_similarity", "softmax", "topk", "mse_loss", "cdist", "linear", "gather", "flip"} <= taken
