"""A tiny Llama-like model's site table, by hand, and a recorder of graphs for it: scheduling needs no model."""

from __future__ import annotations

from array import array
from math import prod
from typing import Any

from polytrace.certificate import Certificate
from polytrace.description import Leaf, Limits, ModelDescription, ModuleInfo, ParameterInfo, Rows, SiteInfo, index_sites
from polytrace.graph import (
    Backward,
    Call,
    Constant,
    Grad,
    GradWrite,
    Graph,
    Invoke,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    Options,
    Parameter,
    Port,
    Read,
    Ref,
    Request,
    Save,
    Sharing,
    Site,
    Write,
)
from polytrace.tensors import RawTensor, num_bytes
from scheduling.plan import Program, RequestId, ValueFacts
from scheduling.program import certify, work_out_program

HIDDEN, VOCAB, WIDE = 8, 32, 24


def tiny_llama(
    num_layers: int = 4,
    stages: int = 2,
    *,
    ranks: int = 1,
    limits: Limits | None = None,
    has_forks: bool = True,
) -> ModelDescription:
    """Layers spread evenly over stages; embeddings live on the first stage, norm and head on the last."""
    sites: list[SiteInfo] = []
    modules: list[ModuleInfo] = []
    parameters: list[ParameterInfo] = []

    def module(
        path: str, stage: int, *, is_list: bool = False, is_layer: bool = False, refusal: str | None = None
    ) -> None:
        info = ModuleInfo(
            path=path,
            class_name=path.rpartition(".")[2] or "TinyForCausalLM",
            is_list=is_list,
            is_decoder_layer=is_layer,
            first_stage=stage,
            call_refusal=refusal,
        )
        modules.append(info)

    def site(
        path: str, port: Port, stage: int, tail: int, *, rows: Rows = Rows.ALL, refusal: str | None = None
    ) -> None:
        info = SiteInfo(
            module=path,
            port=port,
            visit=0,
            order=len(sites),
            stage=stage,
            structure="tensor",
            rows=rows,
            leaves=(Leaf(selector=(), tail=(tail,), dtype="float32", read_refusal=refusal, write_refusal=refusal),),
        )
        sites.append(info)

    last = stages - 1
    module("", 0, refusal="it is the whole model")
    module("model", 0, refusal="it needs every stage")
    module("model.embed_tokens", 0)
    parameters.append(parameter("model.embed_tokens.weight", (VOCAB, HIDDEN), 0))
    site("model.embed_tokens", Port.OUTPUT, 0, HIDDEN)
    module("model.layers", 0, is_list=True)
    for layer in range(num_layers):
        stage, path = layer * stages // num_layers, f"model.layers.{layer}"
        module(path, stage, is_layer=True)
        module(f"{path}.self_attn", stage)
        module(f"{path}.mlp", stage)
        module(f"{path}.mlp.up_proj", stage)
        site(path, Port.INPUT, stage, HIDDEN)
        site(f"{path}.self_attn", Port.OUTPUT, stage, HIDDEN)
        site(f"{path}.mlp", Port.INPUT, stage, HIDDEN)
        site(
            f"{path}.mlp.up_proj", Port.OUTPUT, stage, WIDE, refusal="rows are sorted by expert" if layer == 1 else None
        )
        site(f"{path}.mlp", Port.OUTPUT, stage, HIDDEN)
        site(path, Port.OUTPUT, stage, HIDDEN)
        parameters.append(parameter(f"{path}.mlp.up_proj.weight", (WIDE, HIDDEN), stage))
    module("model.norm", last)
    site("model.norm", Port.OUTPUT, last, HIDDEN)
    module("lm_head", last)
    site("lm_head", Port.INPUT, last, HIDDEN, rows=Rows.KEPT)
    site("lm_head", Port.OUTPUT, last, VOCAB, rows=Rows.KEPT)
    parameters.append(parameter("lm_head.weight", (VOCAB, HIDDEN), last))
    return ModelDescription(
        name="tiny",
        class_name="TinyForCausalLM",
        dtype="float32",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=num_layers,
        layers="model.layers",
        stages=stages,
        ranks=ranks,
        fingerprint="tiny",
        config={},
        modules=tuple(modules),
        sites=tuple(sites),
        parameters=tuple(parameters),
        limits=limits or Limits(max_sequence_tokens=64),
        key_value_bytes=1,
        hidden_bytes=1,
        row_multiple=1,
        has_kept_rows=True,
        has_forks=has_forks,
    )


def parameter(path: str, shape: tuple[int, ...], stage: int) -> ParameterInfo:
    return ParameterInfo(path=path, shape=shape, dtype="float32", stage=stage, sharded_dim=None)


class Recorder:
    """Writes a graph down as a client would: one line a node, shapes by small rules of its own."""

    def __init__(
        self,
        description: ModelDescription,
        *invokes: list[list[int]],
        seed: int = 0,
        sharing: Sharing = Sharing.TENANT,
    ) -> None:
        self.description = description
        self.sites = index_sites(description)
        self.invokes = tuple(Invoke(sequences=tuple(map(tuple, sequences))) for sequences in invokes)
        self.nodes: list[Node] = []
        self.facts: list[ValueFacts | None] = []
        self.constants: dict[str, RawTensor] = {}
        self.options = Options(seed=seed, sharing=sharing)

    @property
    def where(self) -> str:
        """The line of the next node."""
        return f"a.py:{len(self.nodes)}"

    @property
    def request(self) -> Request:
        graph = Graph(nodes=tuple(self.nodes))
        return Request(graph=graph, invokes=self.invokes, constants=self.constants, options=self.options)

    def work_out(self, request_id: str = "r") -> Program:
        return work_out_program(RequestId(request_id), self.request, self.description, tuple(self.facts))

    def certify(self) -> Certificate:
        return certify(self.work_out(), tuple(self.facts), self.description)

    def read(self, module: str, port: Port = Port.OUTPUT, invoke: int = 0) -> Ref:
        site = Site(module=module, port=port)
        return self._add(Read(site=site, invoke=invoke, where=self.where), self.view(site, invoke))

    def write(
        self, module: str, value: Ref, port: Port = Port.OUTPUT, invoke: int = 0, *, in_place: bool = False
    ) -> Ref:
        site = Site(module=module, port=port)
        return self._add(Write(site=site, invoke=invoke, value=value, in_place=in_place, where=self.where), None)

    def op(self, name: str, *args: Operand, shape: tuple[int, ...] | None = None, dtype: str = "float32") -> Ref:
        """An operation; without `shape` it has that of its first operand."""
        if shape is None:
            first = args[0]
            assert isinstance(first, Ref)
            known = self.facts[first.node]
            assert known is not None
            shape = known.shape
        return self._add(Op(name=name, args=args, where=self.where), shape, dtype)

    def index(self, base: Ref, *index: Operand, shape: tuple[int, ...]) -> Ref:
        return self.op("getitem", base, index[0] if len(index) == 1 else index, shape=shape)

    def call(self, module: str, *args: Operand, shape: tuple[int, ...]) -> Ref:
        return self._add(Call(module=module, args=args, where=self.where), shape)

    def parameter(self, path: str) -> Ref:
        info = next(info for info in self.description.parameters if info.path == path)
        return self._add(Parameter(path=path, where=self.where), info.shape)

    def constant(self, shape: tuple[int, ...], value: float = 0.0) -> Ref:
        """One number everywhere."""
        return self._constant(array("f", [value] * prod(shape)), "float32", shape)

    def places(self, *numbers: int) -> Ref:
        """A list of integers, to index with."""
        return self._constant(array("q", numbers), "int64", (len(numbers),))

    def mask(self, invoke: int = 0) -> Ref:
        prompts = self.invokes[invoke]
        return self._add(Mask(invoke=invoke, where=self.where), (len(prompts.sequences), prompts.longest), "bool")

    def save(self, value: Ref, name: str | None = None) -> Ref:
        return self._add(Save(name=name or f"s{len(self.nodes)}", value=value, where=self.where), None)

    def backward(self, loss: Ref, gradient: Ref | None = None) -> Ref:
        return self._add(Backward(loss=loss, gradient=gradient, where=self.where), None)

    def grad(self, of: Ref, backward: Ref) -> Ref:
        known = self.facts[of.node]
        assert known is not None
        return self._add(Grad(of=of, backward=backward, where=self.where), known.shape)

    def set_grad(self, of: Ref, backward: Ref, value: Ref) -> Ref:
        return self._add(GradWrite(of=of, backward=backward, value=value, where=self.where), None)

    def view(self, site: Site, invoke: int) -> tuple[int, ...]:
        """The shape of a site's value; an unknown site has one too, so that it can be recorded."""
        prompts = self.invokes[invoke] if invoke < len(self.invokes) else self.invokes[0]
        found = self.sites.get(site)
        return (len(prompts.sequences), prompts.longest, *(found[1].tail if found else (HIDDEN,)))

    def _constant(self, numbers: array[Any], dtype: str, shape: tuple[int, ...]) -> Ref:
        name = f"c{len(self.constants)}"
        self.constants[name] = RawTensor(dtype=dtype, shape=shape, data=memoryview(numbers.tobytes()))
        return self._add(Constant(name=name, where=self.where), shape, dtype)

    def _add(self, node: Node, shape: tuple[int, ...] | None, dtype: str = "float32") -> Ref:
        self.nodes.append(node)
        known = None if shape is None else ValueFacts(shape=shape, dtype=dtype, num_bytes=num_bytes(dtype, shape))
        self.facts.append(known)
        return Ref(NodeId(len(self.nodes) - 1))
