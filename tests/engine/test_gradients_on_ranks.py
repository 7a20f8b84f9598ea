"""Gradients through layers that ranks share, over real processes: those of plain autograd, with the same bits twice."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import in_processes
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.differentiable import met, met_by_many, ordered_sum
from engine.grad_slices import gather_gradient, take_gradient
from engine.links import Distributed, LinkBytes, Solo, join_store, open_store
from engine.loading import ShardConfig, load_model
from engine.manners import use_attention
from engine.slices import gather_whole, take_part

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # of which four ranks have copies
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
OSS = SIZES | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}
ONE_RANKS_EXPERTS = "GPT-OSS whose tokens all choose two experts"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", SIZES | {"tie_word_embeddings": True}),
    "GPT-2": ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}),  # q, k, v in one matrix
    "Gemma 2": ("Gemma2Config", SIZES | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "Mixtral": ("MixtralConfig", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),  # cut
    "Qwen3": ("Qwen3Config", SIZES | {"head_dim": 8}),  # norms on heads
    "Phi-3": ("Phi3Config", SIZES | {"num_key_value_heads": 4}),
    "OLMo 2": ("Olmo2Config", SIZES | {"num_key_value_heads": 4}),  # norms across heads, which are gathered
    "GPT-OSS": ("GptOssConfig", OSS),  # sinks; experts with biases, dealt
    ONE_RANKS_EXPERTS: ("GptOssConfig", OSS),
    "DeepSeek V2": ("DeepseekV2Config", SIZES | LATENT | {"num_key_value_heads": 4}),  # one rotary key for all heads
    "OPT": ("OPTConfig", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}),  # a plan of ours, biases
}
WORLDS: dict[int, tuple[str, ...]] = {
    4: tuple(FAMILIES),
    2: ("Llama", "GPT-2", "Mixtral", "OLMo 2", "GPT-OSS", ONE_RANKS_EXPERTS),  # `test_twins` has the others
}
CASES = [(number, name) for number, names in WORLDS.items() for name in names]
TOKENS = torch.randint(3, 96, (1, 24), generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-5  # of the largest, in float32


class Recorded(Distributed):
    """Links that remember what was added up and joined."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def ordered_sum(self, tensor: Tensor) -> Tensor:
        self.made.append(("sum", tuple(tensor.shape)))
        return super().ordered_sum(tensor)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        self.made.append(("gather", tuple(tensor.shape)))
        return super().gather(tensor, dim)


def differentiated(model: Any, weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The logits that a model has here, and the gradients of their weighted sum: of what every layer gives."""
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    outputs: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])
        outputs[-1].retain_grad()

    def begin(_module: Any, _args: Any, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    with ExitStack() as hooks:
        hooks.callback(model.get_input_embeddings().register_forward_hook(begin).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(keep).remove)
        logits: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    torch.autograd.backward(logits, weights)
    return logits.detach(), [output.grad for output in outputs if output.grad is not None]


def weights_of_logits() -> Tensor:
    return torch.randn(1, TOKENS.shape[1], 96, generator=torch.Generator().manual_seed(1))


def shard(index: int, ports: list[int], sources: dict[str, str], out: str) -> None:
    torch.set_num_threads(1)
    for (ranks, names), port in zip(WORLDS.items(), ports, strict=True):
        if index >= ranks:
            continue
        links = Recorded(join_store("127.0.0.1", port), stage=0, stages=1, rank=index, ranks=ranks, timeout_s=60)
        found = {}
        for name in names:
            loaded = load_model(ShardConfig(source=sources[name], dtype="float32", rank=index, ranks=ranks), links)
            use_attention(loaded.model, "eager")
            with torch.no_grad():
                without = loaded.model(input_ids=TOKENS, use_cache=False).logits
            weights = weights_of_logits()
            if without.shape != weights.shape:
                weights = take_part(links, weights, 2)
            links.made.clear()
            runs = [differentiated(loaded.model, weights) for _ in range(2)]
            found[name] = {"without": without, "runs": runs, "made": list(links.made)}
        found["slices"] = slices(links)
        torch.save(found, Path(out) / f"{ranks} {index}.pt")
        links.barrier()
        links.close()


def slices(links: Distributed) -> list[tuple[Tensor, Tensor]]:
    """What must be equal: gradients put in and taken out again, and copies' gradients added up by hand."""
    generator = torch.Generator().manual_seed(2)
    pairs = []
    for blocks, copies in ((1, 1), (3, 1), (1, 2), (3, 2)):
        whole = torch.randn(2, 12 * links.ranks, 3, generator=generator)
        put = take_gradient(links, whole, 1, blocks, copies)
        pairs.append((gather_gradient(links, put, 1, blocks, copies), whole))
        given = [torch.randn(put.shape, generator=generator) for _ in range(links.ranks)]  # alike on every rank
        found = gather_gradient(links, given[links.rank], 1, blocks, copies)
        first = links.rank // copies * copies
        total = sum(given[first + 1 : first + copies], given[first])
        pairs.append((found, gather_whole(links, total, 1, blocks, copies)))
    return pairs


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, (kind, sizes) in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                if name == ONE_RANKS_EXPERTS and path.endswith("router.bias"):
                    parameter[:2] += 20
        found[name] = str(tmp_path_factory.mktemp("model"))
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def ranks(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    folder = tmp_path_factory.mktemp("out")
    stores = [open_store("127.0.0.1") for _ in WORLDS]
    given = [store.port for store in stores], sources, str(folder)
    in_processes(shard, given, max(WORLDS))
    return {ranks: [torch.load(folder / f"{ranks} {index}.pt") for index in range(ranks)] for ranks in WORLDS}


@pytest.fixture(scope="module")
def plain(sources: dict[str, str]) -> dict[str, tuple[Tensor, list[Tensor]]]:
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return {
        name: differentiated(AutoModelForCausalLM.from_pretrained(source, **options), weights_of_logits())
        for name, source in sources.items()
    }


@pytest.mark.parametrize(("number", "name"), CASES)
def test_gradients_of_every_layer_are_those_of_the_plain_model_on_every_rank(
    number: int, name: str, ranks: dict[int, list[Any]], plain: dict[str, tuple[Tensor, list[Tensor]]]
) -> None:
    expected = plain[name][1]
    assert len(expected) == 1 + 2
    for rank in ranks[number]:
        (_, first), (_, again) = rank[name]["runs"]
        for ours, theirs in zip(first, expected, strict=True):
            assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()
        for ours, twice, elsewhere in zip(first, again, ranks[number][0][name]["runs"][0][1], strict=True):
            assert torch.equal(ours, twice) and torch.equal(ours, elsewhere)


@pytest.mark.parametrize("number", WORLDS)
def test_a_forward_has_the_same_bits_with_gradients_as_without(number: int, ranks: dict[int, list[Any]]) -> None:
    for rank in ranks[number]:
        for name in WORLDS[number]:
            assert all(torch.equal(logits, rank[name]["without"]) for logits, _ in rank[name]["runs"])


@pytest.mark.parametrize("number", WORLDS)
def test_ranks_add_up_and_join_in_the_same_order(number: int, ranks: dict[int, list[Any]]) -> None:
    first = ranks[number][0]
    for name in WORLDS[number]:
        assert all(rank[name]["made"] == first[name]["made"] for rank in ranks[number])
    # Of one run: embeddings, and two sums a layer; back again, the head and two a layer: q, k and v share one.
    assert len(first["Llama"]["made"]) == 2 * ((1 + 2 * 2) + (1 + 2 * 2))
    choices = ("sum", (TOKENS.shape[1], 2))  # of routing weights
    assert first["Mixtral"]["made"].count(choices) == first["GPT-OSS"]["made"].count(choices) == 2 * 2


@pytest.mark.parametrize("number", WORLDS)
def test_what_is_put_in_for_all_ranks_comes_out_again_and_copies_add_up(
    number: int, ranks: dict[int, list[Any]]
) -> None:
    for rank in ranks[number]:
        for found, expected in rank["slices"]:
            assert torch.equal(found, expected)


class Two(Solo):
    """The links of the first of two ranks that do the same; it remembers the gradients that were added up."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = 2
        self.bytes = LinkBytes()
        self.added: list[Tensor] = []

    def ordered_sum(self, tensor: Tensor) -> Tensor:
        self.added.append(tensor)
        return tensor + tensor


def test_a_backward_goes_through_a_forwards_collectives_in_the_opposite_order() -> None:
    links, x = Two(), torch.ones(3, requires_grad=True)
    total = torch.zeros(3)
    for number in range(1, 6):  # a residual stream: all of them get ready at different times
        (own,) = met(links, x + total)
        total = total + ordered_sum(links, own * number)
    links.added.clear()
    total.sum().backward()
    assert [float(each[0]) for each in links.added] == expected_order()


def expected_order() -> list[float]:
    """What each `met` was given back, from the last to the first: its factor times what follows."""
    found, gradient = [], 1.0
    for number in range(5, 0, -1):
        found.append(number * gradient)
        gradient += 2 * number * gradient
    return found


def test_modules_share_a_sum_of_what_they_take_until_it_is_another() -> None:
    links, leaf = Two(), torch.ones(3, requires_grad=True)
    x = leaf * 1
    first = met_by_many(links, x)
    assert met_by_many(links, x) is first
    cut = x.detach_().requires_grad_()
    assert met_by_many(links, cut) is not first
    y = leaf * 1
    before = met_by_many(links, y)
    y.mul_(2)
    after = met_by_many(links, y)
    assert after is not before
    (before + 10 * after).sum().backward()
    assert [float(each[0]) for each in links.added] == [10, 1]
    assert float(leaf.grad[0]) == 2 * (1 + 2 * 10)  # type: ignore[index]


def test_nothing_is_done_where_no_gradient_is_asked_for() -> None:
    links, x = Two(), torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert met(links, x)[0] is x and met_by_many(links, x) is x
    assert met(links, x.detach())[0].grad_fn is None
    assert met(Solo(), x)[0] is x
