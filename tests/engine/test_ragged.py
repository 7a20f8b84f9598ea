"""Reductions over left-padded rows are refused unless a mask, a position or equal lengths make them right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from engine.shapes import infer
from polytrace.description import Leaf, Limits, ModelDescription, ModuleInfo, Rows, SiteInfo
from polytrace.errors import GraphError
from polytrace.graph import Call, Constant, Graph, Invoke, Mask, Node, NodeId, Op, Port, Read, Ref, Request, Save, Site
from polytrace.tensors import RawTensor

# D = hidden
D = 8


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, 3)


DESCRIPTION = ModelDescription(
    name="tiny",
    class_name="Tiny",
    dtype="float32",
    vocab_size=12,
    hidden_size=D,
    num_layers=1,
    layers="layers",
    stages=1,
    ranks=1,
    fingerprint="0",
    config={},
    modules=tuple(
        ModuleInfo(path=path, class_name="M", is_list=False, is_decoder_layer=False, first_stage=0)
        for path in ("", "norm", "head", "layers.0")
    ),
    sites=(
        SiteInfo(
            module="layers.0",
            port=Port.OUTPUT,
            visit=0,
            order=0,
            stage=0,
            structure="tensor",
            rows=Rows.ALL,
            leaves=(Leaf(selector=(), tail=(D,), dtype="float32"),),
        ),
    ),
    parameters=(),
    limits=Limits(max_sequence_tokens=64),
    key_value_bytes=1,
    hidden_bytes=1,
    row_multiple=1,
    has_kept_rows=True,
)


class Value:
    """A value of a program being written, with enough of torch's surface to read like a user's code."""

    def __init__(self, program: Program, ref: Ref) -> None:
        self.program = program
        self.ref = ref

    def op(self, name: str, *args: object, **kwargs: object) -> Value:
        return self.program.op(name, self, *args, **kwargs)

    def __getitem__(self, index: object) -> Value:
        return self.op("getitem", index)

    def __mul__(self, other: object) -> Value:
        return self.op("mul", other)

    def __add__(self, other: object) -> Value:
        return self.op("add", other)

    def __invert__(self) -> Value:
        return self.op("bitwise_not")

    def __matmul__(self, other: object) -> Value:
        return self.op("matmul", other)


class Program:
    """A request over two prompts; `h` is the layer's output and `mask` the view's mask."""

    def __init__(self, lengths: tuple[int, ...] = (3, 5), others: tuple[int, ...] = (5, 5)) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, RawTensor] = {}
        self.invokes = tuple(Invoke(sequences=tuple((1,) * length for length in group)) for group in (lengths, others))
        self.h = self.read(0)
        self.mask = self.add(Mask(invoke=0, where=self.where))

    @property
    def where(self) -> str:
        return f"user.py:{len(self.nodes)}"

    def add(self, node: Node) -> Value:
        self.nodes.append(node)
        return Value(self, Ref(NodeId(len(self.nodes) - 1)))

    def read(self, invoke: int) -> Value:
        return self.add(Read(site=Site(module="layers.0", port=Port.OUTPUT), invoke=invoke, where=self.where))

    def op(self, name: str, *args: object, **kwargs: object) -> Value:
        plain = tuple(_plain(part) for part in args)
        return self.add(
            Op(name=name, args=plain, kwargs={k: _plain(v) for k, v in kwargs.items()}, where=self.where)  # type: ignore[arg-type, misc]
        )

    def call(self, module: str, value: Value) -> Value:
        return self.add(Call(module=module, args=(value.ref,), where=self.where))

    def zeros(self, *shape: int) -> Value:
        name = f"c{len(self.constants)}"
        size = 4 * int(torch.Size(shape).numel())
        self.constants[name] = RawTensor(dtype="float32", shape=shape, data=memoryview(bytes(size)))
        return self.add(Constant(name=name, where=self.where))

    def check(self) -> None:
        save = Save(name="saved", value=self.h.ref, where="save")
        graph = Graph(nodes=(*self.nodes, save))
        with torch.device("meta"):
            meta = TinyModel()
        infer(DESCRIPTION, Request(graph=graph, invokes=self.invokes, constants=self.constants), meta)


def _plain(part: object) -> object:
    if isinstance(part, Value):
        return part.ref
    if isinstance(part, (tuple, list)):
        return type(part)(_plain(member) for member in part)
    return part


Use = Callable[[Program], Value]

REFUSED: dict[str, Use] = {
    "sum over tokens": lambda p: p.h.op("sum", 1),
    "sum over all": lambda p: p.h.op("sum"),
    "mean with keepdim": lambda p: p.h.op("mean", dim=1, keepdim=True),
    "mean over a negative dim": lambda p: p.h.op("mean", -2),
    "mean over several dims": lambda p: p.h.op("mean", (0, 1)),
    "std with a flag": lambda p: p.h.op("std", False),
    "max over tokens": lambda p: p.h.op("max", 1),
    "argmax over tokens": lambda p: p.h.op("argmax", dim=1),
    "topk over tokens": lambda p: p.h.op("topk", 2, 1),
    "sort over tokens": lambda p: p.h.op("sort", dim=1),
    "softmax over tokens": lambda p: p.h.op("softmax", 1),
    "cumsum over tokens": lambda p: p.h.op("cumsum", dim=1),
    "norm of all": lambda p: p.h.op("norm"),
    "vector norm over tokens": lambda p: p.h.op("vector_norm", 2, 1),
    "normalize over tokens": lambda p: p.h.op("normalize"),
    "cosine over tokens": lambda p: p.h.op("cosine_similarity", p.read(1)),
    "layer norm over tokens and features": lambda p: p.h.op("layer_norm", (5, D)),
    "after arithmetic": lambda p: ((p.h * 2) + p.zeros(D)).op("mean", 1),
    "after a constant with a row for each column": lambda p: (p.h + p.zeros(1, 5, D)).op("mean", 1),
    "after another invoke's values": lambda p: (p.read(1) + p.h).op("mean", 1),
    "after a comparison": lambda p: p.h.op("gt", 0.0).op("sum", 1),
    "after a module": lambda p: p.call("head", p.call("norm", p.h)).op("mean", 1),
    "after a cast and a transpose": lambda p: p.h.op("double").op("transpose", 1, 2).op("mean", -1),
    "after flattening tokens into features": lambda p: p.h.op("flatten", 1).op("sum", 1),
    "after flattening prompts into tokens": lambda p: p.h.op("reshape", (10, D)).op("mean", 0),
    "after a view with heads": lambda p: p.h.op("view", 2, 5, 2, D // 2).op("sum", 1),
    "after unflattening": lambda p: p.h.op("reshape", (10, D)).op("unflatten", 0, (2, 5)).op("mean", 1),
    "after permuting": lambda p: p.h.op("permute", 1, 0, 2).op("mean", 0),
    "after slicing off the first": lambda p: p.h[:, 1:].op("mean", 1),
    "after slicing to a number": lambda p: p.h[:, :4].op("mean", 1),
    "after slicing more than the shortest": lambda p: p.h[:, -4:].op("mean", 1),
    "after narrow": lambda p: p.h.op("narrow", 1, 0, 3).op("mean", 1),
    "after picking a prompt": lambda p: p.h[0].op("mean", 0),
    "after a new dimension": lambda p: p.h[:, None].op("mean", 2),
    "after choosing features": lambda p: p.h[:, :, 3].op("mean", 1),
    "after choosing features by a list": lambda p: p.h[..., [0, 1]].op("mean", 1),
    "after the norm over features": lambda p: p.h.op("norm", dim=-1).op("mean", -1),
    "after an assignment": lambda p: p.h.op("setitem", (slice(None), 0), 0.0).op("mean", 1),
    "after an assignment to a view": lambda p: p.h.op("set_view", (("getitem", (0,), ()),), 0.0).op("mean", 1),
    "after joining": lambda p: p.op("cat", (p.h, p.h), 1).op("mean", 1),
    "after joining with another invoke": lambda p: p.op("cat", (p.h, p.read(1))).op("mean", 1),
    "after stacking": lambda p: p.op("stack", (p.h, p.h)).op("mean", 2),
    "after expanding": lambda p: p.h.op("norm", dim=-1, keepdim=True).op("expand", 2, 5, D).op("sum", 1),
    "after a top-k of features": lambda p: p.h.op("topk", 2).op("item", 0).op("mean", 1),
    "after a maximum of features": lambda p: p.h.op("max", -1).op("item", 0).op("mean", 1),
    "after a maximum of prompts": lambda p: p.h.op("max", 0).op("item", 0).op("mean", 0),
    "after splitting": lambda p: p.h.op("split", 2, 1).op("item", 0).op("mean", 1),
    "after unbinding prompts": lambda p: p.h.op("unbind").op("item", 1).op("mean", 0),
    "after chunking features": lambda p: p.h.op("chunk", 2, dim=-1).op("item", 1).op("mean", 1),
    "a product over tokens": lambda p: p.h.op("transpose", 1, 2) @ p.h,
    "a batched product over tokens": lambda p: p.h.op("transpose", 1, 2).op("bmm", p.read(1)),
    "einsum over tokens": lambda p: p.op("einsum", "btd,btd->bd", p.h, p.h),
    "einsum without an arrow": lambda p: p.op("einsum", "btd,btd", p.h, p.h),
    "einsum with dots": lambda p: p.op("einsum", "...td,...td->...d", p.h, p.h),
    "einsum that sums its dots": lambda p: p.op("einsum", "...d->d", p.h),
    "renorm of each feature": lambda p: p.h.op("renorm", p=2, dim=2, maxnorm=1.0),
    "cosine with fewer dimensions": lambda p: p.op("cosine_similarity", p.zeros(2, 1, 1, 1), p.h, 2),
    "a transform over tokens": lambda p: p.h.op("fftn", dim=(0, 1)),
    "attention by hand": lambda p: (p.h @ p.h.op("transpose", 1, 2)).op("softmax", -1),
    "values weighted by unmasked weights": lambda p: (p.h @ p.h.op("transpose", 1, 2)) @ p.h,
    "ones like it": lambda p: p.op("ones_like", p.h).op("sum", 1),
    "masked plus unmasked": lambda p: (p.h * p.mask[..., None] + p.h).op("mean", 1),
}

ALLOWED: dict[str, Use] = {
    "a transform over features": lambda p: p.h.op("fftn", dim=(2,)).op("real")[:, -1],
    "features shifted": lambda p: p.h.op("fftshift", dim=-1),
    "over features": lambda p: p.h.op("mean", -1),
    "over prompts": lambda p: p.h.op("mean", 0),
    "softmax over features": lambda p: p.h.op("softmax", -1),
    "layer norm over features": lambda p: p.h.op("layer_norm", (D,)),
    "topk of features": lambda p: p.h.op("topk", 2),
    "maximum of two": lambda p: p.h.op("max", p.h),
    "projection": lambda p: p.h @ p.zeros(D, 3),
    "linear": lambda p: p.h.op("linear", p.zeros(3, D)),
    "einsum over features": lambda p: p.op("einsum", "btd,de->bte", p.h, p.zeros(D, 2)),
    "all pairs of tokens": lambda p: p.h @ p.h.op("transpose", 1, 2),
    "the last position": lambda p: p.h[:, -1].op("mean"),
    "positions of each prompt": lambda p: p.h[[0, 1], [2, 4]].op("sum"),
    "some positions": lambda p: p.h[:, [3, 4]].op("mean", 1),
    "the last positions that all have": lambda p: p.h[:, -3:].op("mean", 1),
    "of these the first": lambda p: p.h[:, 1:][:, 1:][:, :2].op("mean", 1),
    "selected": lambda p: p.h.op("select", 1, -1).op("mean"),
    "gathered": lambda p: p.h.op("index_select", 1, p.zeros(2).op("long")).op("mean", 1),
    "unbound tokens": lambda p: p.h.op("unbind", 1).op("item", 4).op("mean"),
    "the end of a split": lambda p: p.h.op("split", (2, 3), dim=1).op("item", 1).op("mean", 1),
    "the mask itself": lambda p: p.mask.op("sum", 1),
    "the mask as numbers": lambda p: p.mask.op("float")[..., None].op("mean", 1),
    "multiplied by the mask": lambda p: (p.h * p.mask[..., None]).op("sum", 1),
    "divided by lengths after it": lambda p: (
        (p.h * p.mask[..., None]).op("sum", 1).op("div", p.mask.op("sum", 1)[:, None])
    ),
    "mask first": lambda p: (p.mask[..., None] * p.h).op("sum", 1),
    "where": lambda p: p.op("where", p.mask[..., None], p.h, 0.0).op("sum", 1),
    "masked fill": lambda p: p.h.op("masked_fill", (~p.mask)[..., None], -1e9).op("softmax", 1),
    "added mask": lambda p: (p.h + (p.mask.op("float") * -1.0)[..., None]).op("amax", 1),
    "assigned by mask": lambda p: p.h.op("setitem", ~p.mask, 0.0).op("sum", 1),
    "picked by mask": lambda p: p.h[p.mask].op("mean", 0),
    "masked then cast and flattened": lambda p: (
        (p.h * p.mask[..., None]).op("double").op("reshape", (10, D)).op("sum", 0)
    ),
    "einsum with the mask": lambda p: p.op("einsum", "bt,btd->bd", p.mask.op("float"), p.h),
    "product with the mask": lambda p: p.mask.op("float")[:, None] @ p.h,
    "attention by hand": lambda p: (
        (p.h @ p.h.op("transpose", 1, 2)).op("masked_fill", (~p.mask)[:, None], -1e9).op("softmax", -1) @ p.h
    ),
    "masked product": lambda p: (p.h * p.mask[..., None] * p.h).op("sum", 1),
    "another invoke's tokens": lambda p: p.read(1).op("mean", 1),
    "their difference at a position": lambda p: (p.h + p.read(1))[:, -1].op("norm"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_counting_pad_rows_is_refused(name: str) -> None:
    program = Program()
    REFUSED[name](program)
    with pytest.raises(GraphError) as caught:
        program.check()
    assert caught.value.where == f"user.py:{len(program.nodes) - 1}"
    assert "tracer.mask[..., None]" in caught.value.message and "value.at(pos)" in caught.value.message


@pytest.mark.parametrize("name", ALLOWED)
def test_what_counts_no_pad_row_is_allowed(name: str) -> None:
    program = Program()
    ALLOWED[name](program)
    program.check()


@pytest.mark.parametrize("name", REFUSED)
def test_prompts_of_one_length_are_never_refused(name: str) -> None:
    program = Program(lengths=(5, 5))
    REFUSED[name](program)
    program.check()


def test_one_prompt_is_never_refused() -> None:
    program = Program(lengths=(5,), others=(4, 5))
    program.h.op("softmax", 1)[0].op("mean")
    program.check()
