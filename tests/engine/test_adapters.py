"""LoRA folders and rank-k deltas as edits of one request: plain Hugging Face with merged weights, at ranks 1 and 2."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from processes import ProcessBackend, ProcessShards
from safetensors.torch import save_file
from torch import Tensor
from width import wide

import polytrace
from engine.local import LocalBackend
from polytrace.errors import GraphError
from polytrace.model import Model
from scheduling.policy import PassPolicy

IDS = [3, 14, 15, 92, 65, 35]
OTHER = [35, 89, 79]
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
TARGETS = {  # column- and row-parallel ones, and the vocabulary
    "llama": ("model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_fc"),
}
Factors = dict[str, tuple[Tensor, Tensor]]  # path -> [rank, inputs], [outputs, rank]
ODD, RANK, ALPHA = 2, 4, 8.0  # the rank and alpha of most modules; another rank for one


class Deployed:
    """A tiny model beside the plain one."""

    def __init__(self, family: str, ranks: int, folder: Path) -> None:
        self.family = family
        self.plain = model_of(family)
        self.plain.save_pretrained(folder)
        self.shards = ProcessShards(str(folder), stages=1, ranks=ranks) if ranks > 1 else None
        self.backend: Any = (
            LocalBackend(str(folder), threads=1, policy=EVERYONE)
            if self.shards is None
            else ProcessBackend(str(folder), self.shards, folder, EVERYONE)
        )
        self.model: Any = Model(self.backend)

    def factors(self, seed: int) -> Factors:
        """Random ones for some modules of two layers; of the last one of another rank."""
        generator = torch.Generator().manual_seed(seed)
        paths = [target.format(layer) for target in TARGETS[self.family] for layer in (0, 2)]
        found = {}
        for path in paths:
            outputs, inputs = self.widths(path)
            rank = ODD if path == paths[-1] else RANK
            down = torch.randn(rank, inputs, generator=generator) * 0.2
            found[path] = (down, torch.randn(outputs, rank, generator=generator) * 0.2)
        return found

    def widths(self, path: str) -> tuple[int, int]:
        module = self.plain.get_submodule(path)
        shape = tuple(module.weight.shape)
        return (shape[1], shape[0]) if type(module).__name__ == "Conv1D" else (shape[0], shape[1])

    def merged(self, factors: Factors, scale: Any) -> Any:
        """The plain model with the updates in its weights, by hand."""
        model = copy.deepcopy(self.plain)
        for path, (down, into) in factors.items():
            module = model.get_submodule(path)
            change = scale(down.shape[0]) * into @ down
            module.weight.data += change.T if type(module).__name__ == "Conv1D" else change
        return model


@pytest.fixture(
    scope="module",
    params=[("llama", 1), wide(("gpt2", 1)), wide(("llama", 2)), ("gpt2", 2)],
    ids=lambda param: "-".join(map(str, param)),
)
def deployed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    made = Deployed(*request.param, tmp_path_factory.mktemp("model"))
    yield made
    if made.shards is not None:
        made.shards.close()


def save_lora(folder: Path, factors: Factors, **config: Any) -> Path:
    """A folder as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for path, (down, into) in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = into.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    odd = [path for path, (down, _) in factors.items() if down.shape[0] != RANK]
    own = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "rank_pattern": dict.fromkeys((path.split(".", 2)[2] for path in odd), ODD),
        "alpha_pattern": dict.fromkeys(odd, 3.0),
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": sorted({path.rpartition(".")[2] for path in factors}),
        "init_lora_weights": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(own | config))
    return folder


def logits_of(plain: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = plain(torch.tensor([ids]), use_cache=False).logits
        return logits


def traced(model: Any, prompt: Any, *edits: Any, run: bool = True) -> Any:
    """The logits, or the tracer when it does not run."""
    with model.trace(prompt, edits=edits, run=run) as tracer:
        saved = [model.lm_head.output.save()]
    return saved[0] if run else tracer


def close(ours: Tensor, theirs: Tensor) -> None:
    """Promise 1's tolerance in float32."""
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_lora_folder_is_the_model_with_merged_weights(deployed: Deployed, tmp_path: Path, use_rslora: bool) -> None:
    factors = deployed.factors(1)
    adapter = polytrace.lora(save_lora(tmp_path / "mine", factors, use_rslora=use_rslora))

    def scale(rank: int) -> float:
        return (3.0 if rank == ODD else ALPHA) / (math.sqrt(rank) if use_rslora else rank)

    merged = deployed.merged(factors, scale)
    ours = traced(deployed.model, [IDS, OTHER], adapter)
    for row, ids in enumerate((IDS, OTHER)):
        theirs = logits_of(merged, ids)[0]
        close(ours[row, -len(ids) :], theirs)
        assert (theirs - logits_of(deployed.plain, ids)[0]).abs().max() > 0.1
        close(traced(deployed.model, ids), logits_of(deployed.plain, ids))


def test_a_delta_is_left_at_right_added_to_the_stored_weight(deployed: Deployed) -> None:
    generator = torch.Generator().manual_seed(3)
    changed = copy.deepcopy(deployed.plain)
    factors = {}
    paths = (*(target.format(1) for target in TARGETS[deployed.family]), "lm_head")
    for rank, path in enumerate(paths, 1):
        weight = changed.get_submodule(path).weight
        left = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
        right = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
        factors[path] = (left[:, 0], right[0].numpy()) if rank == 1 else (left, right)
        if path == "lm_head":  # GPT-2's is its embedding too, which an edit leaves alone
            changed.lm_head.weight = torch.nn.Parameter(weight.data.clone())
        changed.get_submodule(path).weight.data += left @ right
    adapter = polytrace.delta(factors)
    close(traced(deployed.model, IDS, adapter), logits_of(changed, IDS))
    for path, pair in factors.items():
        without = polytrace.delta({other: both for other, both in factors.items() if other != path})
        assert (traced(deployed.model, IDS, without) - logits_of(changed, IDS)).abs().max() > 1e-3, (path, len(pair))


def test_users_of_different_adapters_share_a_pass_and_have_the_bits_that_they_have_alone(
    deployed: Deployed, tmp_path: Path
) -> None:
    own = [deployed.factors(seed) for seed in (1, 2)]
    adapters = [polytrace.lora(save_lora(tmp_path / f"a{number}", each)) for number, each in enumerate(own)]
    with deployed.model.edit() as edited:
        deployed.model.get_submodule(TARGETS[deployed.family][0].format(1)).output[:, -1] *= 3.0
    programs = [(adapters[0],), (adapters[1],), (), (adapters[0], edited), (adapters[0],)]
    requests = [traced(deployed.model, IDS, *edits, run=False).request for edits in programs]
    together = deployed.backend.run_together([deployed.backend.work_out(request) for request in requests])
    assert together[0].receipt.passes[0].requests == len(programs)
    values = [outcome.values["0"] for outcome in together]
    for request, merged in zip(requests, values, strict=True):
        (alone,) = deployed.backend.run_together([deployed.backend.work_out(request)])
        assert torch.equal(merged, alone.values["0"])
    assert torch.equal(values[0], values[4])
    for value, factors in zip(values, own, strict=False):
        close(value, logits_of(deployed.merged(factors, lambda rank: (3.0 if rank == ODD else ALPHA) / rank), IDS))
    close(values[2], logits_of(deployed.plain, IDS))
    assert all((values[0] - other).abs().max() > 1e-3 for other in values[1:4])
    assert together[3].receipt.edits[0] == "lora a0"


def test_an_adapter_in_float32_on_weights_in_bfloat16_works_as_peft_does(tmp_path: Path) -> None:
    plain = model_of("llama", torch.bfloat16)
    plain.save_pretrained(tmp_path / "model")
    path = "model.layers.1.mlp.down_proj"
    module = plain.get_submodule(path)
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(RANK, module.in_features, generator=generator)
    into = torch.randn(module.out_features, RANK, generator=generator)
    adapter = polytrace.lora(save_lora(tmp_path / "mine", {path: (down, into)}))
    seen: list[Tensor] = []

    def hook(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        seen.append((output + (args[0].float() @ down.T @ into.T) * (ALPHA / RANK)).bfloat16())
        return seen[-1]

    handle = module.register_forward_hook(hook)
    logits_of(plain, IDS)
    handle.remove()
    with polytrace.load(str(tmp_path / "model"), threads=1) as model:
        with model.trace(IDS, edits=[adapter]):
            ours = model.model.layers[1].mlp.down_proj.output.save()
        with model.trace(IDS):
            without = model.model.layers[1].mlp.down_proj.output.save()
    assert ours.dtype is torch.bfloat16
    error = (ours.float() - seen[0].float()).abs().max()
    assert error <= 0.02 * seen[0].abs().max() < (without.float() - seen[0].float()).abs().max()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return Deployed("llama", 1, tmp_path_factory.mktemp("model"))


def test_what_is_no_low_rank_update_of_a_linear_module_is_refused_by_name(llama: Deployed, tmp_path: Path) -> None:
    factors = llama.factors(1)

    def refused(match: str, **config: Any) -> None:
        with pytest.raises(GraphError, match=match) as caught:
            polytrace.lora(save_lora(tmp_path / "mine", factors, **config))
        assert str(caught.value.where).startswith("test_adapters.py:")

    refused("use_dora=True: DoRA", use_dora=True)
    refused(r"modules_to_save=\['lm_head'\]: it replaces whole modules", modules_to_save=["lm_head"])
    refused("bias='all'", bias="all")
    refused("pissa changes the base weights too", init_lora_weights="pissa")
    refused("of kind 'IA3'; LORA", peft_type="IA3")
    refused("its configuration says rank 5", r=5)
    with pytest.raises(GraphError, match="cannot be read"):
        polytrace.lora(tmp_path)
    folder = save_lora(tmp_path / "mine", factors)
    path = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file({path: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(GraphError, match=r"embed_tokens\.lora_embedding_A, which is no low-rank update"):
        polytrace.lora(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(GraphError, match="not a file of tensors"):
        polytrace.lora(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(GraphError, match="safe_serialization=True"):
        polytrace.lora(folder)


def test_an_update_that_does_not_fit_the_model_is_refused_with_its_path(llama: Deployed) -> None:
    def refused(match: str, path: str, left: Any, right: Any) -> None:
        with pytest.raises(GraphError, match=match) as caught:
            llama.model.edited(polytrace.delta({path: (left, right)}))
        assert str(caught.value.where).startswith("test_adapters.py:")

    ones = torch.ones(32, 1)
    refused("which this model does not have; did you mean model.layers.0", "model.layers.0.mlp.up_prj", ones, ones.T)
    refused(
        r"update of \[32, 32\] for .*up_proj, whose weight is \[64, 32\]", "model.layers.0.mlp.up_proj", ones, ones.T
    )
    refused("embed_tokens .Embedding., which is no linear module", "model.embed_tokens", torch.ones(96, 1), ones.T)
    refused("norm .LlamaRMSNorm., which is no linear module", "model.norm", ones, ones.T)
    refused("left @ right is no matrix", "model.layers.0.mlp.up_proj", ones, ones)


@pytest.mark.filterwarnings("ignore")  # what it calls of transformers goes soon
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_what_peft_saves_is_what_peft_runs(family: str, use_rslora: bool, tmp_path: Path) -> None:
    import peft

    plain = model_of(family)
    plain.save_pretrained(tmp_path / "model")
    names = sorted({target.rpartition(".")[2] for target in TARGETS[family]})
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=5,
        target_modules=names,
        rank_pattern={names[0]: 3, r"1\.(self_)?attn\.[co]_proj": 2},
        alpha_pattern={names[1]: 9},
        use_rslora=use_rslora,
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(plain, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    with polytrace.load(str(tmp_path / "model"), threads=1) as model:
        ours = traced(model, IDS, polytrace.lora(tmp_path / "adapter"))
        without = traced(model, IDS)
    close(ours, logits_of(wrapped, IDS))
    assert (ours - without).abs().max() > 1e-3
