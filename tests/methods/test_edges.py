"""Edges beside plain autograd: each reader takes the residual plus a vector of its own, and that is what is derived."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from patched_by_hand import PlainModel
from torch import Tensor

import polytrace
from polytrace.errors import GraphError
from polytrace.methods import attribution_patching, edge_attribution_patching, logit_difference

CLEAN, CORRUPT = [3, 17, 42, 5, 9, 30, 11], [3, 25, 42, 8, 9, 30, 11]
SHORT, SHORT_CORRUPT = [8, 25, 1, 60], [8, 17, 1, 60]
RIGHT, WRONG = 7, 21
METRIC = logit_difference(RIGHT, WRONG)
WIDTH, SIZE, LAYERS = 32, 8, 4
TOLERANCE = 1e-5  # float32, of max(1, max|plain|)
# before attention, before the MLP, what makes queries, keys and values with their first columns, back, MLP, at the end
PLACES: dict[str, tuple[str, str, dict[str, tuple[str, int]], str, str, str]] = {
    "llama": (
        "input_layernorm",
        "post_attention_layernorm",
        {name: (f"self_attn.{name}_proj", 0) for name in "qkv"},
        "self_attn.o_proj",
        "mlp",
        "model.norm",
    ),
    "gpt2": (
        "ln_1",
        "ln_2",
        {name: ("attn.c_attn", WIDTH * place) for place, name in enumerate("qkv")},
        "attn.c_proj",
        "mlp",
        "transformer.ln_f",
    ),
    "qwen3": (
        "input_layernorm",
        "post_attention_layernorm",
        {name: (f"self_attn.{name}_proj", 0) for name in "qkv"},
        "self_attn.o_proj",
        "mlp",
        "model.norm",
    ),
    "gemma2": (
        "input_layernorm",
        "pre_feedforward_layernorm",
        {name: (f"self_attn.{name}_proj", 0) for name in "qkv"},
        "self_attn.o_proj",
        "mlp",
        "model.norm",
    ),
    "phi": (
        "input_layernorm",
        "input_layernorm",
        {name: (f"self_attn.{name}_proj", 0) for name in "qkv"},
        "self_attn.dense",
        "mlp",
        "model.final_layernorm",
    ),
}

# the norms behind attention and the MLP
POSTS = {"gemma2": ("post_attention_layernorm", "post_feedforward_layernorm")}


class _ByHand:
    """One run of the plain model."""

    def __init__(self, plain: PlainModel, ids: list[int]) -> None:
        self.written: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}  # what each reader takes besides, 0
        self.residual: dict[str, Tensor] = {}
        self.length = len(ids)
        before, between, makers, back, mlp, end = PLACES[plain.kind]
        with ExitStack() as stack, torch.enable_grad():

            def hook(module: Any, run: Callable[..., Any], *, is_before: bool = False) -> None:
                add = module.register_forward_pre_hook if is_before else module.register_forward_hook
                stack.callback(add(run).remove)

            for number in range(LAYERS):
                layer = plain.model.get_submodule(f"{plain.family.layers}.{number}")
                first, second = layer.get_submodule(before), layer.get_submodule(between)
                hook(layer.get_submodule(before), self.keep(f"{number}.before"), is_before=True)
                hook(layer.get_submodule(between), self.keep(f"{number}.between"), is_before=True)
                for name, (path, column) in makers.items():
                    hook(layer.get_submodule(path), self.head_readers(number, name, column, first))
                hook(layer.get_submodule(mlp), self.mlp_reader(number, second), is_before=True)
                posts = POSTS.get(plain.kind)
                norm = layer.get_submodule(posts[0]) if posts else None
                hook(layer.get_submodule(back), self.head_writers(number, norm), is_before=True)
                hook(layer.get_submodule(posts[1] if posts else mlp), self.write(f"{number}.mlp"))
            hook(plain.model.get_submodule(end), self.last_reader, is_before=True)
            logits = plain.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            self.metric = logits[RIGHT] - logits[WRONG]
        self.written = {"embedding": self.residual["0.before"].detach()} | self.written

    def vector(self, name: str) -> Tensor:
        return self.vectors.setdefault(name, torch.zeros(self.length, WIDTH, requires_grad=True))

    def keep(self, name: str) -> Any:
        def run(_module: Any, args: Any) -> None:
            self.residual[name] = args[0][0]

        return run

    def write(self, name: str) -> Any:
        def run(_module: Any, _args: Any, output: Tensor) -> None:
            self.written[name] = output[0].detach()

        return run

    def head_writers(self, number: int, norm: Any) -> Any:
        def run(module: Any, args: Any) -> None:
            weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
            gain: Any = 1.0
            if norm is not None:  # with its scale of this run
                given = args[0][0] @ weight
                gain = (given.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt() * (1 + norm.weight)
            for head in range(WIDTH // SIZE):
                own = slice(head * SIZE, (head + 1) * SIZE)
                self.written[f"{number}.{head}"] = (args[0][0][:, own] @ weight[own] * gain).detach()

        return run

    def head_readers(self, number: int, name: str, column: int, norm: Any) -> Any:
        def run(module: Any, _args: Any, output: Tensor) -> Tensor:
            residual, parts = self.residual[f"{number}.before"], list(output[0].split(SIZE, -1))
            width = WIDTH if module.weight.shape[-1] == 3 * WIDTH else output.shape[-1]
            for head in range(width // SIZE):
                taken = norm.forward(residual + self.vector(f"{number}.{head}.{name}"))
                parts[column // SIZE + head] = module.forward(taken).split(SIZE, -1)[column // SIZE + head]
            return torch.cat(parts, -1)[None]

        return run

    def mlp_reader(self, number: int, norm: Any) -> Any:
        def run(_module: Any, _args: Any) -> tuple[Tensor]:
            return (norm.forward(self.residual[f"{number}.between"] + self.vector(f"{number}.mlp"))[None],)

        return run

    def last_reader(self, _module: Any, args: Any) -> tuple[Tensor]:
        return (args[0] + self.vector("logits"),)


def is_behind(writer: str, reader: str, *, is_parallel: bool) -> bool:
    if writer == "embedding" or reader == "logits":
        return True
    ours, theirs = int(writer.split(".")[0]), int(reader.split(".")[0])
    return ours < theirs or (ours == theirs and reader.endswith("mlp") and "mlp" not in writer and not is_parallel)


def edges_by_hand(plain: PlainModel, clean: list[int], corrupt: list[int], writers: Any, readers: Any) -> Any:
    """`[tokens, writers, readers]`, and the clean metric."""
    here, there = _ByHand(plain, clean), _ByHand(plain, corrupt)
    assert set(here.written) == set(writers) and set(here.vectors) == set(readers)
    gradients = torch.autograd.grad(here.metric, list(here.vectors.values()))
    found = np.full((len(clean), len(writers), len(readers)), np.nan)
    for row, writer in enumerate(writers):
        delta = there.written[writer] - here.written[writer]
        for reader, gradient in zip(here.vectors, gradients, strict=True):
            if is_behind(writer, reader, is_parallel=plain.kind == "phi"):
                found[:, row, list(readers).index(reader)] = (delta * gradient).sum(1).tolist()
    return found


def agree(ours: Any, wanted: Any) -> None:
    assert ours.shape == wanted.shape and (np.isnan(ours) == np.isnan(wanted)).all()
    assert np.nanmax(abs(ours - wanted)) <= TOLERANCE * max(1.0, float(np.nanmax(abs(wanted))))
    assert np.nanmax(abs(wanted)) > 0.02, "edges matter"


@pytest.mark.parametrize("kind", PLACES)
def test_an_edge_is_what_its_reader_alone_would_take(
    patched: Callable[[str], tuple[Any, PlainModel]], kind: str
) -> None:
    model, plain = patched(kind)
    pairs: Any = ([CLEAN, SHORT], [CORRUPT, SHORT_CORRUPT])
    whole = edge_attribution_patching(model, *pairs, METRIC).effect
    last = edge_attribution_patching(model, *pairs, METRIC, positions=[-1, 1]).effect
    assert whole.dims == ("prompt", "writer", "reader")
    writers, readers = whole.writer.values.tolist(), whole.reader.values.tolist()
    for prompt, (clean, corrupt) in enumerate(zip(*pairs, strict=True)):
        wanted = edges_by_hand(plain, clean, corrupt, writers, readers)
        agree(whole.values[prompt], wanted.sum(0))
        agree(last.values[prompt], wanted[[-1, 1]].sum(0))


def test_the_edges_of_a_head_add_up_to_its_attribution(patched: Callable[[str], tuple[Any, PlainModel]]) -> None:
    model, _ = patched("llama")
    agrees_with_heads(model, edge_attribution_patching(model, CLEAN, CORRUPT, METRIC).effect)


def agrees_with_heads(model: Any, edges: Any) -> None:
    heads = attribution_patching(model, CLEAN, CORRUPT, METRIC, of="z", direction="noise", normalise=False)
    assert float(abs(heads.effect - heads.clean).max()) > 0.02
    for layer in range(model.description.num_layers):
        for head in range(WIDTH // SIZE):
            whole = float(heads.effect[layer, head] - heads.clean)
            assert abs(float(edges.sel(writer=f"{layer}.{head}").sum()) - whole) < 1e-4 * max(1.0, abs(whole))


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OTHERS = {
    "norms behind attention and MLP alone": transformers.Olmo2Config(**TINY, pad_token_id=0),
    "a factor on what is added": transformers.GraniteConfig(**TINY, residual_multiplier=0.22, logits_scaling=0.5),
    "scaled residuals": transformers.DogeConfig(**TINY),
    "an expert beside others": transformers.Llama4TextConfig(
        **TINY, head_dim=8, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=64
    ),
}


WITHOUT = {
    "scaled residuals": r"did not hold that resid_mid = resid_pre \+ self_attn.output",
    "an expert beside others": r"has no mlp_input: .* did not hold that mlp_output is what is added to the residual",
}


@pytest.fixture(params=OTHERS)
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    torch.manual_seed(0)
    plain = transformers.AutoModelForCausalLM.from_config(OTHERS[request.param])
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if weight.ndim > 1 or "residual" in name:
                weight.normal_(0.0, 0.3)
    plain.save_pretrained(tmp_path)
    with polytrace.load(str(tmp_path), threads=1) as model:
        yield request.param, model


def test_edges_of_the_embedding_add_up_to_the_gradient_at_it_or_the_family_is_refused(other: tuple[str, Any]) -> None:
    kind, model = other
    if kind in WITHOUT:
        with pytest.raises(GraphError, match=WITHOUT[kind]):
            edge_attribution_patching(model, CLEAN, CORRUPT, METRIC)
        return
    edges = edge_attribution_patching(model, CLEAN, CORRUPT, METRIC).effect
    at = attribution_patching(model, CLEAN, CORRUPT, METRIC, of="resid_pre", direction="noise", normalise=False)
    wanted = float((at.effect[0] - at.clean).sum())
    assert abs(wanted) > 0.02
    assert abs(float(edges.sel(writer="embedding").sum()) - wanted) <= 1e-4 * max(1.0, abs(wanted))
    if kind == "a factor on what is added":
        agrees_with_heads(model, edges)


def test_prompts_of_other_lengths_are_refused(patched: Callable[[str], tuple[Any, PlainModel]]) -> None:
    llama, _ = patched("llama")
    with pytest.raises(GraphError, match="7 tokens in the clean prompt and 4 in the corrupt one"):
        edge_attribution_patching(llama, CLEAN, SHORT, METRIC)
