"""Shapes inferred without data are those of the run, and what cannot run is refused with the user's own line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.meta import result_of
from engine.ops import DTYPE_NAMES, resolve, run_op
from engine.shapes import infer
from polytrace.description import Leaf, Limits, ModelDescription, ModuleInfo, ParameterInfo, Rows, SiteInfo
from polytrace.errors import GraphError, TooLargeError
from polytrace.graph import (
    Call,
    Constant,
    DType,
    Graph,
    Invoke,
    Mask,
    Node,
    NodeId,
    Op,
    Parameter,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Site,
    Write,
    operands,
)
from polytrace.tensors import RawTensor
from scheduling.plan import ValueFacts

# D = hidden, V = vocabulary, H = heads
D, V, H = 8, 12, 2


class TinyModel(nn.Module):
    """The modules that a graph may call, at the paths of the description below."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.norm = nn.LayerNorm(D)
        self.lm_head = nn.Linear(D, V, bias=False)


def module(path: str, **more: Any) -> ModuleInfo:
    return ModuleInfo(
        path=path, class_name="Module", first_stage=0, **({"is_list": False, "is_decoder_layer": False} | more)
    )


def site_info(path: str, order: int, tail: tuple[int, ...], dtype: str = "float32", **more: Any) -> SiteInfo:
    leaf = Leaf(selector=(), tail=tail, dtype=dtype, **more)
    rows = Rows.KEPT if path == "lm_head" else Rows.ALL
    return SiteInfo(
        module=path, port=Port.OUTPUT, visit=0, order=order, stage=0, structure="tensor", rows=rows, leaves=(leaf,)
    )


def description(**limits: int) -> ModelDescription:
    return ModelDescription(
        name="tiny",
        class_name="Tiny",
        dtype="float32",
        vocab_size=V,
        hidden_size=D,
        num_layers=2,
        layers="model.layers",
        stages=1,
        ranks=1,
        fingerprint="0",
        config={},
        modules=(
            module("", call_refusal="it is the whole model"),
            module("model.layers", is_list=True),
            module("model.layers.0", is_decoder_layer=True, call_refusal="it needs the rotary tables"),
            module("model.layers.1", is_decoder_layer=True, call_refusal="it needs the rotary tables"),
            module("model.layers.0.mlp"),
            module("model.norm"),
            module("lm_head"),
        ),
        sites=(
            site_info("model.layers.0.mlp", 0, (D,), "bfloat16"),
            site_info("model.layers.0", 1, (D,)),
            site_info("model.layers.1", 2, (D,), write_refusal="it is shared"),
            site_info("lm_head", 3, (V,)),
        ),
        parameters=(
            ParameterInfo(path="lm_head.weight", shape=(V, D), dtype="float32", stage=0, sharded_dim=0),
            ParameterInfo(path="model.norm.weight", shape=(D,), dtype="float32", stage=0, sharded_dim=None),
        ),
        limits=Limits(max_sequence_tokens=64, **limits),
        key_value_bytes=1,
        hidden_bytes=1,
        row_multiple=1,
        has_kept_rows=True,
    )


@pytest.fixture(scope="session")
def meta() -> TinyModel:
    with torch.device("meta"):
        return TinyModel().eval()


LAYER = Site(module="model.layers.0", port=Port.OUTPUT)
MLP = Site(module="model.layers.0.mlp", port=Port.OUTPUT)
LOGITS = Site(module="lm_head", port=Port.OUTPUT)


class Program:
    """Writes a request node by node; every node is on its own line of `user.py`."""

    def __init__(self, *lengths: tuple[int, ...]) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, RawTensor] = {}
        self.lengths = lengths or ((5,),)

    @property
    def where(self) -> str:
        return f"user.py:{len(self.nodes)}"

    def add(self, node: Node) -> Ref:
        self.nodes.append(node)
        return Ref(NodeId(len(self.nodes) - 1))

    def read(self, site: Site = LAYER, invoke: int = 0) -> Ref:
        return self.add(Read(site=site, invoke=invoke, where=self.where))

    def mask(self, invoke: int = 0) -> Ref:
        return self.add(Mask(invoke=invoke, where=self.where))

    def op(self, name: str, *args: Any, **kwargs: Any) -> Ref:
        return self.add(Op(name=name, args=args, kwargs=kwargs, where=self.where))

    def call(self, path: str, *args: Any) -> Ref:
        return self.add(Call(module=path, args=args, where=self.where))

    def constant(self, value: Tensor) -> Ref:
        name = f"constant{len(self.constants)}"
        data = memoryview(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.constants[name] = RawTensor(dtype=DTYPE_NAMES[value.dtype], shape=tuple(value.shape), data=data)
        return self.add(Constant(name=name, where=self.where))

    def request(self) -> Request:
        nodes = list(self.nodes)
        if not any(isinstance(node, Save) for node in nodes):
            nodes.append(Save(name="saved", value=Ref(NodeId(0)), where="save.py:1"))
        invokes = tuple(Invoke(sequences=tuple((1,) * length for length in lengths)) for lengths in self.lengths)
        return Request(graph=Graph(nodes=tuple(nodes)), invokes=invokes, constants=self.constants)

    def facts(self, meta: nn.Module, **limits: int) -> tuple[ValueFacts | None, ...]:
        return infer(description(**limits), self.request(), meta)

    def shape(self, meta: nn.Module) -> tuple[int, ...]:
        found = self.facts(meta)[len(self.nodes) - 1]
        assert found is not None
        return found.shape

    def refusal(self, meta: nn.Module, **limits: int) -> str:
        """The message of the refusal, which must name the last line."""
        with pytest.raises((GraphError, TooLargeError)) as caught:
            self.facts(meta, **limits)
        assert caught.value.where == f"user.py:{len(self.nodes) - 1}"
        for word in ("meta", "aten::", "Traceback", "fake", "\n"):
            assert word not in caught.value.message
        return caught.value.message


# --- what every kind of node looks like


def test_reads_masks_constants_parameters_and_calls_have_their_facts(meta: TinyModel) -> None:
    program = Program((5,), (3, 4))
    hidden = program.read()
    program.read(MLP, invoke=1)
    program.mask(invoke=1)
    program.constant(torch.zeros(3, 2, dtype=torch.float16))
    program.add(Parameter(path="lm_head.weight", where="p"))
    normed = program.add(Call(module="model.norm", args=(hidden,), where="c"))
    program.add(Call(module="lm_head", args=(normed,), where="c"))
    program.op("topk", hidden, 2)
    program.op("item", Ref(NodeId(7)), 1)
    program.add(Write(site=LAYER, invoke=0, value=hidden, in_place=False, where="w"))
    facts = program.facts(meta)
    assert [(fact.shape, fact.dtype, fact.num_bytes) if fact else None for fact in facts] == [
        ((1, 5, D), "float32", 1 * 5 * D * 4),
        ((2, 4, D), "bfloat16", 2 * 4 * D * 2),
        ((2, 4), "bool", 8),
        ((3, 2), "float16", 12),
        ((V, D), "float32", V * D * 4),
        ((1, 5, D), "float32", 5 * D * 4),
        ((1, 5, V), "float32", 5 * V * 4),
        None,
        ((1, 5, 2), "int64", 80),
        None,
        None,
    ]


# --- random programs, against the run itself


def is_unknown_mask(program: Program, values: list[Tensor], index: Any) -> bool:
    """Whether an index is a boolean value that is neither a constant's nor a mask's."""
    if not isinstance(index, Ref) or values[index.node].dtype is not torch.bool:
        return False
    pending = [index.node]
    while pending:
        node = program.nodes[pending.pop()]
        if isinstance(node, Read):
            return True
        pending.extend(operands(node))
    return False


def templates(draw: st.DrawFn, pick: Any, number: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """One random call of the table over earlier values."""
    value, other = pick(), pick()
    dim = number(-3, 3)
    kind = draw(st.sampled_from(sorted(TEMPLATES)))
    made: tuple[str, tuple[Any, ...], dict[str, Any]] = TEMPLATES[kind](kind, value, other, dim, number)
    return made


TEMPLATES: dict[str, Any] = {
    **{
        name: lambda n, a, b, d, k: (n, (a, b), {})
        for name in ("add", "mul", "sub", "div", "maximum", "eq", "lt", "matmul", "mm", "rmatmul", "type_as", "outer")
    },
    **{
        name: lambda n, a, b, d, k: (n, (a, d), {})
        for name in ("sum", "mean", "amax", "argmax", "softmax", "logsumexp", "cumsum", "unsqueeze", "std", "all")
    },
    **{
        name: lambda n, a, b, d, k: (n, (a,), {})
        for name in (
            "exp",
            "gelu",
            "sum",
            "mean",
            "norm",
            "isnan",
            "flatten",
            "half",
            "long",
            "bool",
            "relu",
            "t",
            "clone",
        )
    },
    "keepdim": lambda n, a, b, d, k: ("sum", (a,), {"dim": d, "keepdim": True}),
    "dims": lambda n, a, b, d, k: ("mean", (a,), {"dim": (0, d)}),
    "dtype": lambda n, a, b, d, k: ("sum", (a,), {"dtype": DType("float64")}),
    "scalar": lambda n, a, b, d, k: ("mul", (a, k(0, 3)), {}),
    "half scalar": lambda n, a, b, d, k: ("add", (a, 0.5), {}),
    "to": lambda n, a, b, d, k: ("to", (a, DType("bfloat16")), {}),
    "cat": lambda n, a, b, d, k: ("cat", ((a, b),), {"dim": d}),
    "stack": lambda n, a, b, d, k: ("stack", ([a, b, a], d), {}),
    "view": lambda n, a, b, d, k: ("view", (a, k(-1, 8), k(1, 8)), {}),
    "reshape": lambda n, a, b, d, k: ("reshape", (a, (k(1, 8), -1)), {}),
    "transpose": lambda n, a, b, d, k: ("transpose", (a, d, k(0, 2)), {}),
    "permute": lambda n, a, b, d, k: ("permute", (a, (2, 0, 1)), {}),
    "expand": lambda n, a, b, d, k: ("expand", (a, k(1, 3), -1, -1), {}),
    "repeat": lambda n, a, b, d, k: ("repeat", (a, k(1, 2), 1, k(1, 3)), {}),
    "narrow": lambda n, a, b, d, k: ("narrow", (a, d, k(0, 3), k(0, 3)), {}),
    "select": lambda n, a, b, d, k: ("select", (a, d, k(-4, 4)), {}),
    "int": lambda n, a, b, d, k: ("getitem", (a, k(-6, 6)), {}),
    "slice": lambda n, a, b, d, k: ("getitem", (a, (slice(None), slice(k(-6, 6), k(-6, 6)))), {}),
    "last": lambda n, a, b, d, k: ("getitem", (a, (Ellipsis, -1, None)), {}),
    "by value": lambda n, a, b, d, k: ("getitem", (a, (slice(None), b)), {}),
    "list": lambda n, a, b, d, k: ("getitem", (a, ([0, k(-2, 6)],)), {}),
    "set": lambda n, a, b, d, k: ("setitem", (a, (slice(None), k(-6, 6)), b), {}),
    "set by value": lambda n, a, b, d, k: ("setitem", (a, (slice(None), b), k(0, 2)), {}),
    "set list": lambda n, a, b, d, k: ("setitem", (a, ([0, k(-2, 6)],), b), {}),
    "set number": lambda n, a, b, d, k: ("setitem", (a, (k(0, 3), Ellipsis), 1.5), {}),
    "set part": lambda n, a, b, d, k: (
        "set_view",
        (a, (("transpose", (0, 1), ()), ("getitem", (k(-6, 6),), ())), b),
        {},
    ),
    "where": lambda n, a, b, d, k: ("where", (b, a, 0.0), {}),
    "fill": lambda n, a, b, d, k: ("masked_fill", (a, b, 1.0), {}),
    "einsum": lambda n, a, b, d, k: ("einsum", ("abc,dc->abd", a, b), {}),
    "linear": lambda n, a, b, d, k: ("linear", (a, b), {}),
    "norm along": lambda n, a, b, d, k: ("vector_norm", (a,), {"dim": d}),
    "cosine": lambda n, a, b, d, k: ("cosine_similarity", (a, b), {"dim": d}),
    "layer norm": lambda n, a, b, d, k: ("layer_norm", (a, (D,)), {}),
    "one hot": lambda n, a, b, d, k: ("one_hot", (a, 300), {}),
    "random": lambda n, a, b, d, k: ("randn_like", (a,), {}),
    "clamp": lambda n, a, b, d, k: ("clamp", (a,), {"min": -1, "max": b}),
    "flip": lambda n, a, b, d, k: ("flip", (a, d), {}),
    "roll": lambda n, a, b, d, k: ("roll", (a, k(0, 3), d), {}),
}


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")  # of a single number; the run warns as torch does
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_inferred_shapes_and_dtypes_are_those_of_the_run(data: st.DataObject, meta: TinyModel) -> None:
    program = Program((5, 5), (3,))
    sources: list[Tensor] = [
        torch.randn(2, 5, D),
        torch.randn(1, 3, D, dtype=torch.bfloat16),
        torch.ones(2, 5, dtype=torch.bool),
        torch.tensor([0, 2, 1]),
        torch.randn(D, D),
        torch.tensor(1.5, dtype=torch.float64),
        torch.tensor(2),
        torch.randn(2, 5, D),
    ]
    program.read()
    program.read(MLP, invoke=1)
    program.mask()
    for constant in sources[3:7]:
        program.constant(constant)
    program.read()
    values = list(sources)

    def pick() -> Ref:
        return Ref(NodeId(data.draw(st.integers(0, len(values) - 1))))

    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    for _ in range(data.draw(st.integers(1, 8))):
        name, args, kwargs = data.draw(st.composite(templates)(pick, number))
        program.op(name, *args, **kwargs)
        try:
            resolved = {key: resolve(part, values) for key, part in kwargs.items()}
            values.append(run_op(name, resolve(args, values), resolved, seed=(0, len(values))))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            if "Class values" not in str(error):  # of one_hot: values are not looked at
                program.refusal(meta)
            return
        if not values[-1].numel():
            return  # torch checks less where there is nothing to do
        index = args[1][-1] if name in ("getitem", "setitem") and isinstance(args[1], tuple) else None
        if (
            isinstance(index, Ref)
            and is_unknown_mask(program, values, index)
            and (name == "getitem" or not values[index.node].dim())
        ):
            assert "depends on values" in program.refusal(meta)
            return
    facts = program.facts(meta)
    for value, fact in zip(values, facts, strict=False):
        assert fact is not None
        assert (fact.shape, fact.dtype) == (tuple(value.shape), DTYPE_NAMES[value.dtype])
        assert fact.num_bytes == value.numel() * value.element_size()


# --- shapes that depend on values


def test_a_constant_or_a_mask_may_pick_what_it_likes(meta: TinyModel) -> None:
    program = Program((5,), (2, 4))
    hidden = program.read()
    keep = program.constant(torch.tensor([True, False, True, True, False]))
    assert program.op("getitem", hidden, (slice(None), keep)) and program.shape(meta) == (1, 3, D)
    drop = program.op("bitwise_not", keep)
    assert program.op("getitem", hidden, (0, drop)) and program.shape(meta) == (2, D)
    assert program.op("getitem", hidden, (slice(None), [True, False, False, False, True])) and program.shape(meta) == (
        1,
        2,
        D,
    )
    ragged, mask = program.read(invoke=1), program.mask(invoke=1)
    assert program.op("getitem", ragged, mask) and program.shape(meta) == (6, D)
    last = program.op("sum", mask, 1)
    first = program.op("getitem", last, 0)
    assert program.op("getitem", ragged, (slice(None), slice(first, None))) and program.shape(meta) == (2, 2, D)
    counts = program.constant(torch.tensor([1, 0, 2, 0, 1]))
    assert program.op("repeat_interleave", hidden, counts, dim=1) and program.shape(meta) == (1, 4, D)
    assert program.op("one_hot", counts) and program.shape(meta) == (5, 3)


@pytest.mark.parametrize("name", ["mask", "slice", "where", "repeat", "one_hot"])
def test_a_shape_that_depends_on_recorded_values_is_refused(name: str, meta: TinyModel) -> None:
    program = Program()
    hidden = program.read()
    positive = program.op("gt", hidden, 0)
    best = program.op("argmax", hidden, -1)
    scalar = program.op("argmax", hidden)
    if name == "mask":
        program.op("getitem", hidden, positive)
    elif name == "slice":
        program.op("getitem", hidden, (slice(None), slice(scalar)))
    elif name == "where":
        program.op("where", positive)
    elif name == "repeat":
        program.op("repeat_interleave", hidden, program.op("getitem", best, 0), dim=1)
    else:
        program.op("one_hot", best)
    assert "shape depends on values" in program.refusal(meta)


def test_a_recorded_position_picks_one_place(meta: TinyModel) -> None:
    program = Program()
    hidden = program.read()
    best = program.op("argmax", program.op("norm", hidden, dim=-1))
    assert program.op("getitem", hidden, (0, best)) and program.shape(meta) == (D,)
    row = program.op("getitem", hidden, (0, 1))
    assert program.op("setitem", hidden, (0, best), row) and program.shape(meta) == (1, 5, D)
    rows = program.op("argmax", hidden, 1)
    assert program.op("getitem", hidden, (slice(None), rows)) and program.shape(meta) == (1, 1, D, D)


def test_assignment_through_a_recorded_mask_keeps_the_shape(meta: TinyModel) -> None:
    program = Program()
    hidden = program.read()
    negative = program.op("lt", hidden, 0)
    assert program.op("setitem", hidden, negative, 0.0) and program.shape(meta) == (1, 5, D)
    tokens = program.op("any", negative, -1)
    row = program.constant(torch.zeros(D))
    assert program.op("setitem", hidden, tokens, row) and program.shape(meta) == (1, 5, D)
    two_rows = program.constant(torch.zeros(2, D))
    program.op("setitem", hidden, tokens, two_rows)
    assert "shape depends on values" in program.refusal(meta)


# --- refusals


def refused(meta: TinyModel, name: str, *args: Any, **kwargs: Any) -> str:
    program = Program((5, 5))
    program.read()
    program.constant(torch.zeros(3))
    program.constant(torch.tensor([0, 5]))
    program.constant(torch.zeros(D, dtype=torch.bfloat16))
    program.op(name, Ref(NodeId(0)), *args, **kwargs)
    return program.refusal(meta)


def test_operands_that_do_not_fit_are_refused_with_their_shapes(meta: TinyModel) -> None:
    message = refused(meta, "add", Ref(NodeId(1)))
    assert "add" in message and f"float32[2, 5, {D}]" in message and "float32[3]" in message
    assert "one dtype" in refused(meta, "matmul", Ref(NodeId(3)))
    assert "out of range" in refused(meta, "softmax", 3)
    assert "out of bounds" in refused(meta, "getitem", (slice(None), 5))
    assert "index 5 is out of bounds" in refused(meta, "getitem", (slice(None), Ref(NodeId(2))))
    assert "index -6 is out of bounds" in refused(meta, "getitem", (slice(None), [0, -6]))
    assert "index 5 is out of bounds" in refused(meta, "setitem", (0, Ref(NodeId(2))), 0.0)
    assert "too many indices" in refused(meta, "getitem", (0, 0, 0, 0))
    assert "mask" in refused(meta, "getitem", [True, False, True])
    assert "holds numbers" in refused(meta, "getitem", [Ref(NodeId(2))])
    assert "None" in refused(meta, "getitem", True)
    assert refused(meta, "view", 7, -1)
    assert refused(meta, "sum", DType("int64"))
    assert refused(meta, "topk", 99)
    assert refused(meta, "set_view", (("getitem", (9,), ()),), 0)
    assert "copy" in refused(meta, "set_view", (("getitem", ([0, 1],), ()),), 0)
    assert refused(meta, "set_view", (("transpose", (0, 1), ()),), Ref(NodeId(1)))
    assert "does not take device" in refused(meta, "sum", device="cpu")


def test_names_that_do_not_exist_are_refused(meta: TinyModel) -> None:
    program = Program()
    program.read(Site(module="model.layers.7", port=Port.OUTPUT))
    assert "0-1" in program.refusal(meta)
    program = Program()
    program.read(Site(module="lm_heat", port=Port.OUTPUT))
    assert "lm_head" in program.refusal(meta)
    program = Program()
    program.read()
    program.op("softmaxx", Ref(NodeId(0)), -1)
    assert "softmax" in program.refusal(meta)


def test_a_module_that_cannot_be_called_is_refused(meta: TinyModel) -> None:
    program = Program()
    hidden = program.read()
    program.add(Call(module="model.layers.0", args=(hidden,), where=program.where))
    assert "rotary" in program.refusal(meta)
    program = Program()
    logits = program.read(LOGITS)
    program.add(Call(module="lm_head", args=(logits,), where=program.where))
    assert "lm_head" in program.refusal(meta) and f"[1, 5, {V}]" in program.refusal(meta)


def test_a_module_takes_values_of_its_own_dtype(meta: TinyModel) -> None:
    for path in ("model.norm", "lm_head"):
        program = Program()
        hidden = program.op("double", program.read())
        program.add(Call(module=path, args=(hidden,), where=program.where))
        assert "one dtype, not float32 and float64" in program.refusal(meta)


def test_a_write_needs_the_exact_shape(meta: TinyModel) -> None:
    program = Program()
    hidden = program.read()
    program.add(Write(site=LAYER, invoke=0, value=hidden, in_place=True, where=program.where))
    program.facts(meta)
    row = program.op("getitem", hidden, (slice(None), slice(0, 1)))
    program.add(Write(site=LAYER, invoke=0, value=row, in_place=False, where=program.where))
    message = program.refusal(meta)
    assert f"[1, 5, {D}]" in message and f"[1, 1, {D}]" in message and "model.layers.0.output" in message


def test_several_values_are_no_value(meta: TinyModel) -> None:
    uses: tuple[Callable[[Program, Ref], Ref], ...] = (
        lambda program, pair: program.op("add", pair, 1),
        lambda program, pair: program.add(Save(name="x", value=pair, where=program.where)),
        lambda program, pair: program.add(Write(site=LAYER, invoke=0, value=pair, in_place=False, where=program.where)),
        lambda program, pair: program.op("item", pair, 2),
        lambda program, pair: program.op("getitem", pair, 0),
    )
    for make in uses:
        program = Program()
        make(program, program.op("topk", program.read(), 2))
        assert program.refusal(meta)


def test_deep_nesting_is_refused(meta: TinyModel) -> None:
    program = Program()
    index: Any = program.read()
    for _ in range(5_000):
        index = [index]
    program.op("getitem", Ref(NodeId(0)), index)
    assert "nested" in program.refusal(meta)


# --- limits


def test_what_is_too_large_is_refused_and_takes_no_memory(meta: TinyModel) -> None:
    program = Program()
    hidden = program.read()
    program.op("repeat", hidden, 1 << 20, 1 << 10, 1)
    assert str((1 << 30) * 5 * D * 4) in program.refusal(meta)
    program = Program()
    program.op("expand", program.read(), 1 << 40, 5, D)
    assert "limit" in program.refusal(meta)
    program = Program()
    wide = program.op("expand", program.read(), 1 << 20, 5, D)
    program.op("unbind", wide)
    assert "would make 1048576 values" in program.refusal(meta)
    for name, args in (("split", (1,)), ("split", ([1] * 5_000,)), ("chunk", (5_000,))):
        program = Program()
        program.op(name, program.op("expand", program.read(), 1 << 20, 5, D), *args)
        assert "limit is" in program.refusal(meta)
    program = Program()
    program.op("one_hot", program.constant(torch.tensor([1])), 1 << 40)
    assert "limit" in program.refusal(meta)


def test_a_value_is_held_against_its_limit(meta: TinyModel) -> None:
    program = Program()
    hidden = program.read()
    assert program.facts(meta, max_value_bytes=5 * D * 4)
    program.op("cat", (hidden, hidden))
    assert "320 bytes" in program.refusal(meta, max_value_bytes=5 * D * 4)


def test_values_that_are_there_at_once_are_summed_against_the_limit(meta: TinyModel) -> None:
    program = Program()
    hidden = program.read()
    program.op("add", hidden, 1)
    program.op("add", hidden, 2)
    assert program.facts(meta, max_live_bytes=3 * 5 * D * 4)
    with pytest.raises(TooLargeError, match="values of 480 bytes at once; the limit is 479") as caught:
        program.facts(meta, max_live_bytes=3 * 5 * D * 4 - 1)
    assert caught.value.where == "user.py:0"


def test_values_of_other_layers_are_not_summed(meta: TinyModel) -> None:
    layer = 5 * D * 4
    program = Program()
    for site in (LAYER, Site(module="model.layers.1", port=Port.OUTPUT)):
        program.op("mul", program.read(site), 2.0)
    assert program.facts(meta, max_live_bytes=2 * layer)
    program.op("add", Ref(NodeId(1)), Ref(NodeId(3)))  # the first product waits for the second
    assert program.facts(meta, max_live_bytes=4 * layer)
    with pytest.raises(TooLargeError, match="640 bytes at once"):
        program.facts(meta, max_live_bytes=4 * layer - 1)


def test_logits_cost_what_is_picked_of_them(meta: TinyModel) -> None:
    program = Program((60,))
    logits = program.read(LOGITS)
    last = program.op("getitem", logits, (slice(None), -1))
    program.add(Save(name="last", value=last, where="s"))
    program.facts(meta, max_value_bytes=V * 4)
    program.op("softmax", logits, -1)
    with pytest.raises(TooLargeError):
        program.facts(meta, max_value_bytes=V * 4)


# --- speed


def test_a_thousand_nodes_ask_torch_once_for_each_different_one(meta: TinyModel) -> None:
    program = Program((9, 12))
    hidden = program.read()
    for place in range(250):
        part = program.op("getitem", hidden, (slice(None), place % 9))
        normed = program.op("mul", part, float(place))
        program.op("getitem", program.op("softmax", normed, -1), (slice(None), place % D))
    request = program.request()
    num_different = 9 + 250 + 1 + D  # places of a prompt, factors, the softmax, features
    result_of.cache_clear()
    infer(description(), request, meta)
    assert result_of.cache_info().misses == num_different and result_of.cache_info().hits == 0
    infer(description(), request, meta)
    assert result_of.cache_info().misses == result_of.cache_info().hits == num_different


def test_structure_that_repeats_is_worked_out_once(meta: TinyModel) -> None:
    """A sweep over invokes costs what one of them does, and some bookkeeping."""

    def sweep(num_invokes: int) -> Request:
        program = Program(*[(5,)] * num_invokes)
        for invoke in range(num_invokes):
            part = program.op("getitem", program.read(invoke=invoke), (slice(None), invoke % 5))
            program.op("softmax", program.call("lm_head", part), -1)
        return program.request()

    calls: list[Any] = []
    handle = meta.lm_head.register_forward_hook(lambda *call: calls.append(call))
    result_of.cache_clear()
    infer(description(), sweep(200), meta)
    handle.remove()
    assert len(calls) == 1  # five positions, one shape
    assert result_of.cache_info().misses == 6


def test_equal_structure_over_other_data_is_looked_at_again(meta: TinyModel) -> None:
    program = Program((5,), (5,))
    found = []
    for invoke, count in ((0, 2), (1, 4)):
        hidden = program.read(invoke=invoke)
        mask = program.constant(torch.arange(5) < count)
        repeats = program.constant(torch.full((5,), count))
        found += [
            program.op("getitem", hidden, (slice(None), mask)),
            program.op("getitem", mask, mask),
            program.op("getitem", hidden, (slice(None), slice(program.constant(torch.tensor(count)), None))),
            program.op("repeat_interleave", hidden, repeats, dim=1),
            program.op("one_hot", repeats),
        ]
    facts = program.facts(meta)
    shapes = [known.shape for ref in found if (known := facts[ref.node]) is not None]
    assert shapes[:5] == [(1, 2, D), (2,), (1, 3, D), (1, 10, D), (5, 3)]
    assert shapes[5:] == [(1, 4, D), (4,), (1, 1, D), (1, 20, D), (5, 5)]


def test_arguments_that_python_calls_equal_are_not_one_structure(meta: TinyModel) -> None:
    program = Program()
    whole = program.constant(torch.ones(2, 3, dtype=torch.int64))
    found = [program.op("mul", whole, factor) for factor in (1, True, 1.0, 0.0, -0.0)]
    found += [program.op("sum", whole, dim) for dim in (1, (1,), (0, 1))]
    facts = program.facts(meta)
    known = [(facts[ref.node] or ValueFacts(shape=(), dtype="", num_bytes=0)) for ref in found]
    assert [fact.dtype for fact in known[:5]] == ["int64", "int64", "float32", "float32", "float32"]
    assert [fact.shape for fact in known[5:]] == [(2,), (2,), ()]


def test_equal_shapes_with_and_without_pads_are_not_one_structure(meta: TinyModel) -> None:
    program = Program((5, 5), (5, 3))
    program.op("mean", program.read(invoke=0), 1)
    program.op("mean", program.read(invoke=1), 1)
    assert "pad rows would be counted" in program.refusal(meta)
