"""Direct attribution beside the same sums written out by hand over plain Hugging Face with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hooked import NAMES, PROMPTS, Both, both, close
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import polytrace
from polytrace.errors import GraphError
from polytrace.methods import decompose_residual, logit_attribution

LAYERS, HEADS, SIZE = 4, 4, 8
TOKENS = (5, [7, 8])  # a token for all prompts less one for each
Map = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module", params=NAMES)
def served(request: pytest.FixtureRequest, beside: Callable[[str], Both]) -> Both:
    return beside(request.param)


def frozen(norm: Any, given: Tensor) -> tuple[Map, Tensor]:
    """A norm as a linear map with the scale that it has for `given`, and its bias."""
    if isinstance(norm, torch.nn.LayerNorm):
        scale = (given.var(unbiased=False) + norm.eps).rsqrt()
        return lambda part: (part - part.mean(-1, keepdim=True)) * scale * norm.weight, norm.bias
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    weight = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    scale = (given.square().mean() + epsilon).rsqrt()
    return lambda part: part * scale * weight, torch.zeros_like(weight)


def parts_by_hand(served: Both, ids: list[int]) -> dict[str, Tensor]:
    """Each component of the final residual at the last token, with its neurons as `<layer>.neurons`."""
    names = served.names
    sides = [(names.layer(0), "input"), (names.layer(LAYERS - 1), "output")]
    for layer in range(LAYERS):
        sides += [(names.layer(layer, path), "output") for path in (names.attention, names.mlp)]
        sides += [(names.layer(layer, path), "input") for path in (names.out, names.down)]
    _, seen = served.run(ids, sides)
    last = {place: value[0, -1] for place, value in seen.items()}
    found = {"embedding": last[names.layer(0), "input"], "residual": last[names.layer(LAYERS - 1), "output"]}
    for layer in range(LAYERS):
        for part, path, down in (("attention", names.attention, names.out), ("mlp", names.mlp, names.down)):
            found[f"{layer}.{part}"] = names.factor * last[names.layer(layer, path), "output"]
            taken, weight = last[names.layer(layer, down), "input"], served.out_weight(names.layer(layer, down))
            bias = served.plain.get_submodule(names.layer(layer, down)).bias
            bias = torch.zeros(weight.shape[1]) if bias is None else bias
            through: Map = lambda part: names.factor * part  # noqa: E731
            if names.is_sandwich:
                through, _ = frozen(served.plain.get_submodule(names.layer(layer, path)), taken @ weight + bias)
            if part == "attention":
                for head in range(HEADS):
                    own = slice(head * SIZE, (head + 1) * SIZE)
                    found[f"{layer}.head.{head}"] = through(taken[own] @ weight[own])
                found[f"{layer}.attention.bias"] = through(bias)
            else:
                found[f"{layer}.neurons"] = through(taken[:, None] * weight)
    return found


@torch.no_grad()
@pytest.mark.parametrize("by", ["layer", "head"])
def test_the_final_residual_is_the_sum_of_its_parts(served: Both, by: str) -> None:
    found = decompose_residual(served.model, PROMPTS, by=by)
    close(found.parts.sum("component"), torch.tensor(found.residual.values))
    for number, ids in enumerate(PROMPTS):
        hand = parts_by_hand(served, ids)
        close(found.residual.sel(prompt=number), hand["residual"])
        for name in found.parts.coords["component"].values:
            close(found.parts.sel(prompt=number, component=name), hand[name])
    assert float(abs(found.parts).max("feature").median()) > 0.01


def test_directions_alone_come_back_where_they_are_asked_for(served: Both) -> None:
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    whole, some = decompose_residual(served.model, PROMPTS), decompose_residual(served.model, PROMPTS, onto=directions)
    close(some.parts, torch.tensor(whole.parts.values) @ directions.T)
    assert some.parts.dims == ("prompt", "component", "direction")
    assert some.receipt.result_bytes < whole.receipt.result_bytes / 4


@torch.no_grad()
@pytest.mark.parametrize("by", ["layer", "head", "neuron"])
def test_a_logit_is_the_sum_of_what_parts_add_to_it(served: Both, by: str) -> None:
    found = logit_attribution(served.model, PROMPTS, TOKENS, by=by)
    assert found.receipt.result_bytes < 20_000  # numbers, not vectors
    for number, ids in enumerate(PROMPTS):
        hand = parts_by_hand(served, ids)
        through, bias = frozen(served.plain.get_submodule(served.names.final_norm), hand["residual"])
        unembedding = served.plain.lm_head.weight[TOKENS[0]] - served.plain.lm_head.weight[TOKENS[1][number]]
        dots = {name: through(part) @ unembedding for name, part in hand.items()}
        logits, _ = served.run(ids)
        own = found.parts.sel(prompt=number)
        rest = {str(name): float(found.rest.sel(prompt=number, term=name)) for name in found.rest.coords["term"].values}
        close(found.logit.sel(prompt=number), logits[-1, TOKENS[0]] - logits[-1, TOKENS[1][number]])
        close(own.sum() + sum(rest.values()), logits[-1, TOKENS[0]] - logits[-1, TOKENS[1][number]])
        close(rest["embedding"], dots["embedding"])
        close(rest["bias"], bias @ unembedding)
        if by == "layer":
            close(own, torch.stack([torch.stack([dots[f"{n}.attention"], dots[f"{n}.mlp"]]) for n in range(LAYERS)]))
        elif by == "head":
            close(own, torch.stack([torch.stack([dots[f"{n}.head.{h}"] for h in range(HEADS)]) for n in range(LAYERS)]))
            close(rest["mlp"], torch.stack([dots[f"{n}.mlp"] for n in range(LAYERS)]).sum())
        else:
            close(own, torch.stack([dots[f"{n}.neurons"] for n in range(LAYERS)]))
        assert float(abs(own).max()) > 0.01


def test_the_strongest_neurons_alone_come_back(served: Both) -> None:
    whole = logit_attribution(served.model, PROMPTS, 5, by="neuron")
    some = logit_attribution(served.model, PROMPTS, 5, by="neuron", top_k=3)
    for number in range(len(PROMPTS)):
        for layer in range(LAYERS):
            all_of_them, kept = whole.parts.sel(prompt=number, layer=layer), some.parts.sel(prompt=number, layer=layer)
            assert (all_of_them.values[kept.coords["neuron"].values] == kept.values).all()
            assert float(abs(kept).min()) == sorted(abs(all_of_them.values))[-3]
    close(some.parts.sum(["layer", "rank"]) + some.rest.sum("term"), torch.tensor(some.logit.values))


def test_halves_add_up_within_their_precision(tmp_path: Path) -> None:
    with both("gemma2", tmp_path) as served, polytrace.load(str(tmp_path), dtype="bfloat16", threads=1) as halves:
        for by in ("layer", "head", "neuron"):
            whole, found = (logit_attribution(model, PROMPTS, TOKENS, by=by) for model in (served.model, halves))
            total = found.parts.sum(found.parts.dims[1:]) + found.rest.sum("term")
            assert float(abs(total - found.logit).max()) < 0.05
            assert float(abs(found.parts - whole.parts).max()) < 0.05 * float(abs(whole.parts).max())


@pytest.fixture(scope="module")
def behind_norms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A model that norms the residual itself behind each sum, as the smallest OPT does."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("behind")
    OPTForCausalLM(config).save_pretrained(folder)
    with polytrace.load(str(folder), threads=1) as model:
        yield model


def test_a_residual_that_is_no_sum_is_refused(behind_norms: Any) -> None:
    with pytest.raises(GraphError, match=r"no tensor of this forward is what is added.*test_attribution.py"):
        decompose_residual(behind_norms, [3, 4, 5])
    with pytest.raises(GraphError, match="no final norm"):
        logit_attribution(behind_norms, [3, 4, 5], 5)


@pytest.fixture(scope="module")
def llama(beside: Callable[[str], Both]) -> Any:
    return beside("llama").model


@pytest.mark.parametrize(
    ("tokens", "options", "told"),
    [
        (96, {}, "there is no token 96; ids are 0-95"),
        ([5, 6, 7], {}, "3 tokens for 2 prompts"),
        ((5, 6, 7), {}, "a tuple is a pair"),
        (" Paris", {}, "came without a tokenizer"),
        (5, {"by": "feature"}, "by is 'layer' or 'head' or 'neuron'"),
        (5, {"top_k": 3}, "with by='neuron'"),
        (5, {"position": 9}, "no position 9 in prompt 0"),
    ],
)
def test_wrong_arguments_are_told_with_their_line(llama: Any, tokens: Any, options: Any, told: str) -> None:
    with pytest.raises(GraphError, match=f"{told}.*test_attribution.py"):
        logit_attribution(llama, PROMPTS, tokens, **options)


def test_parts_that_do_not_add_up_are_refused_with_what_is_off(llama: Any) -> None:
    with llama.edit() as edited:
        edited.layers[1].attention_added[:] += 1.0  # which no head says
    decompose_residual(edited, PROMPTS)
    told = r"is not the sum .* the heads of .*layers.1 is off by .* of the largest value.*test_attribution.py"
    with pytest.raises(GraphError, match=told):
        decompose_residual(edited, PROMPTS, by="head")
