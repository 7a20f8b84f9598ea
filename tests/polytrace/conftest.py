"""A Llama-like model described by hand, and a backend that keeps what it is sent."""

from __future__ import annotations

from typing import Any

import pytest

from polytrace.backend import Result
from polytrace.certificate import Certificate, Receipt, ValueShape
from polytrace.description import Leaf, Limits, ModelDescription, ModuleInfo, ParameterInfo, Rows, SiteInfo
from polytrace.graph import Port, Request, Save, Write
from polytrace.model import Model
from polytrace.progress import Hear, Tell, hear_nothing, tell_nobody

LAYERS, HIDDEN, VOCAB = 4, 8, 32


def describe_llama() -> ModelDescription:
    """Four layers of width 8; every module has sites, attention returns a tuple, the root a ModelOutput."""
    modules: list[ModuleInfo] = []
    sites: list[SiteInfo] = []
    parameters: list[ParameterInfo] = []

    def module(path: str, class_name: str, **more: Any) -> None:
        fields = {"is_list": False, "is_decoder_layer": False, "first_stage": 0} | more
        modules.append(ModuleInfo(path=path, class_name=class_name, **fields))

    def site(path: str, port: Port, tail: tuple[int, ...], structure: str = "tensor", **more: Any) -> None:
        selector = {"tensor": (), "tuple": (0,), "dict": ("logits",)}[structure]
        leaf = Leaf(selector=selector, tail=tail, dtype=more.pop("dtype", "float32"), **more)
        rows = Rows.KEPT if path in ("", "lm_head") else Rows.ALL
        fields = {"module": path, "port": port, "visit": 0, "stage": 0, "structure": structure, "rows": rows}
        sites.append(SiteInfo(order=len(sites), leaves=(leaf,), **fields))

    module("", "LlamaForCausalLM", call_refusal="it is the whole model: trace it instead")
    module("model", "LlamaModel", call_refusal="it holds the layers")
    module("model.embed_tokens", "Embedding")
    site("model.embed_tokens", Port.INPUT, (), dtype="int64", write_refusal="token ids are the prompt")
    site("model.embed_tokens", Port.OUTPUT, (HIDDEN,))
    module("model.layers", "ModuleList", is_list=True)
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        module(layer, "LlamaDecoderLayer", is_decoder_layer=True)
        site(layer, Port.INPUT, (HIDDEN,))
        module(f"{layer}.self_attn", "LlamaAttention", call_refusal="it needs positions")
        site(f"{layer}.self_attn", Port.OUTPUT, (HIDDEN,), "tuple")
        module(f"{layer}.mlp", "LlamaMLP")
        site(f"{layer}.mlp", Port.INPUT, (HIDDEN,))
        site(f"{layer}.mlp", Port.OUTPUT, (HIDDEN,))
        site(layer, Port.OUTPUT, (HIDDEN,))
        parameters.append(
            ParameterInfo(path=f"{layer}.mlp.weight", shape=(8, 8), dtype="float32", stage=0, sharded_dim=None)
        )
    module("model.norm", "LlamaRMSNorm")
    site("model.norm", Port.OUTPUT, (HIDDEN,))
    module("model.rotary_emb", "LlamaRotaryEmbedding")
    module("lm_head", "Linear")
    site("lm_head", Port.OUTPUT, (VOCAB,))
    site("", Port.OUTPUT, (VOCAB,), "dict")
    parameters.append(
        ParameterInfo(path="lm_head.weight", shape=(VOCAB, HIDDEN), dtype="float32", stage=0, sharded_dim=None)
    )
    return ModelDescription(
        name="tiny",
        class_name="LlamaForCausalLM",
        dtype="float32",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        layers="model.layers",
        stages=1,
        ranks=1,
        fingerprint="f",
        config={"num_hidden_layers": LAYERS, "rope_parameters": {"rope_theta": 10.0}},
        modules=tuple(modules),
        sites=tuple(sites),
        parameters=tuple(parameters),
        limits=Limits(max_sequence_tokens=16),
        key_value_bytes=1,
        hidden_bytes=1,
        row_multiple=1,
        has_kept_rows=True,
    )


class FakeBackend:
    """Keeps requests; answers every save with a tensor of the shape that was asked for, and calls as lm_head would."""

    def __init__(self, results: Any = None) -> None:
        self.description = describe_llama()
        self.requests: list[Request] = []
        self.validated: list[Request] = []
        self.results = results  # save name -> value, or a function that gives these for a request
        self.shape = ValueShape(shape=(1, 3, VOCAB), dtype="float32")  # of what it is asked about
        self.closed = False

    def describe(self) -> ModelDescription:
        return self.description

    def tokenizer_json(self) -> bytes | None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from tokenizers.processors import TemplateProcessing

        words = ["<s>", "?", *("the", "Eiffel", "Tower", "is", "in", "Paris", "a", "b", "c")]
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.enable_truncation(4)
        return tokenizer.to_str().encode()

    def validate(self, request: Request) -> Certificate:
        self.validated.append(request)
        nodes = tuple(None if isinstance(node, (Write, Save)) else self.shape for node in request.graph.nodes)
        return Certificate(
            nodes=nodes, saves={}, passes=1, tokens=3, token_layers=12,
            token_layers_alone=12, result_bytes=0, read_bytes=0, carried_bytes=0,
            live_bytes=0, notes=(),
        )  # fmt: skip

    def run(self, request: Request, tell: Tell = tell_nobody, hear: Hear = hear_nothing) -> Result:
        self.requests.append(request)
        saves = [node for node in request.graph.nodes if isinstance(node, Save)]
        if isinstance(self.results, Exception):
            raise self.results
        values = self.results if self.results is not None else {save.name: _zeros() for save in saves}
        if callable(values):
            values = values(request)
        return Result(values=values, receipt=receipt())

    def close(self) -> None:
        self.closed = True


def _zeros() -> Any:
    try:
        import torch
    except ImportError:
        import numpy as np

        return np.zeros((1, 2), np.float32)
    return torch.zeros(1, 2)


def receipt() -> Receipt:
    return Receipt(
        request="r", model="tiny", passes=(), tokens=3, token_layers=12,
            token_layers_alone=12, fired=(), pad_rows_written=0, read_bytes=0,
        result_bytes=8, carried_bytes=0, gathered_bytes=0, queue_seconds=0.0, run_seconds=0.0, notes=(),
    )  # fmt: skip


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def model(backend: FakeBackend) -> Model:
    return Model(backend)


@pytest.fixture
def other_model() -> Model:
    return Model(FakeBackend())


@pytest.fixture
def receipt_of_a_run() -> Receipt:
    return receipt()
