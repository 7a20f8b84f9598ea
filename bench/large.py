"""What polytrace costs on a GPU, in one process, on a model shaped like Llama 3.1 8B with random weights.

    python -m bench.run large

Baseline in the same run: the Hugging Face model with the same weights, its own attention (`sdpa`) and no polytrace. A
read-only trace is held against a bare forward of its prompt, and the merged pass of many users, each with an edit of
their own, against one plain forward of all their prompts in a batch, without any edit. Numbers are held against the
same model in float32: in bfloat16 ours may be off by at most 1.1 times what Hugging Face's is (DESIGN, promise 1).

`--quick` shows that it works, with a model of 2 narrow layers, also without a GPU.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import polytrace
from bench.overhead import bare_forward, read_every_layer, read_one_layer
from bench.race import median_ms, race, ratio
from engine.shipped import known_source

_ERROR_FACTOR = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeConfig:
    """One run of the benchmark."""

    model: str = "meta-llama/Llama-3.1-8B"  # its configuration ships
    is_small: bool = False  # 2 narrow layers instead
    dtype: str = "bfloat16"
    tokens: tuple[int, ...] = (32, 128, 512, 2048)
    users: int = 32
    user_tokens: int = 64
    rounds: int = 20
    seed: int = 0


def run(config: LargeConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.disable_progress_bar()
    plain = _plain(config, device)
    with tempfile.TemporaryDirectory(prefix="polytrace-large-") as folder:
        plain.save_pretrained(folder)
        model = polytrace.load(folder, device=device)
    bare = SimpleNamespace(model=plain, device=device)
    figures = {
        "device": device,
        "notes": list(model.description.notes),
        "traces": [_trace(config, bare, model, tokens) for tokens in config.tokens],
        "merged": _merged(config, bare, model),
        "errors": _errors(config, bare, model),
    }
    model.close()
    return figures


def _plain(config: LargeConfig, device: str) -> PreTrainedModel:
    """Random weights, drawn where the model is to run."""
    shape = AutoConfig.from_pretrained(known_source(config.model))
    if config.is_small:
        shape.update({"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024})
        shape.update({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32})
    torch.manual_seed(config.seed)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.dtype)).eval()
    return model


def _trace(config: LargeConfig, plain: Any, model: Any, num_tokens: int) -> dict[str, Any]:
    """One user alone: a bare forward, a trace that reads one layer, one that reads all."""
    ids = _prompts(config, 1, num_tokens)[0]
    layer = len(model.model.layers) // 2
    bare = bare_forward(plain, ids)
    contenders: dict[str, Callable[[], object]] = {
        "bare": bare,
        "bare again": bare,
        "one": read_one_layer(model, ids, layer),
        "every": read_every_layer(model, ids),
    }
    seconds = race(contenders, rounds=config.rounds)
    return {
        "tokens": num_tokens,
        "trace / bare": asdict(ratio(seconds["one"], seconds["bare"])),
        "trace of every layer / bare": asdict(ratio(seconds["every"], seconds["bare"])),
        "bare again / bare": asdict(ratio(seconds["bare again"], seconds["bare"])),
        "median_ms": median_ms(seconds),
    }


def _merged(config: LargeConfig, plain: Any, model: Any) -> dict[str, Any]:
    """Many users at once, each damping another layer for the last token."""
    prompts = _prompts(config, config.users, config.user_tokens)
    stacked = torch.tensor(prompts, device=plain.device)
    num_layers = len(model.model.layers)

    def batched() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = plain.model(input_ids=stacked, use_cache=False, logits_to_keep=1).logits
            return logits[:, -1].cpu()

    def edit(user: int) -> Any:
        model.model.layers[user % num_layers].output[0][:, -1] *= 0.5
        return model.lm_head.output[:, -1].save()

    def merged() -> list[Any]:
        saved = []
        with model.trace(sharing="off") as tracer:
            for user, prompt in enumerate(prompts):
                with tracer.invoke([prompt]):
                    saved.append(edit(user))
        return saved

    def one_by_one() -> list[Any]:
        saved = []
        for user, prompt in enumerate(prompts):
            with model.trace([prompt], sharing="off"):
                saved.append(edit(user))
        return saved

    seconds = race({"batched": batched, "merged": merged, "one by one": one_by_one}, rounds=max(2, config.rounds // 4))
    together, alone = merged(), one_by_one()
    return {
        "users": config.users,
        "tokens": config.user_tokens,
        "merged / batched bare forward": asdict(ratio(seconds["merged"], seconds["batched"])),
        "one by one / merged": asdict(ratio(seconds["one by one"], seconds["merged"])),
        "median_ms": median_ms(seconds),
        "merged has the bits of alone": all(map(torch.equal, together, alone)),
    }


def _errors(config: LargeConfig, plain: Any, model: Any) -> dict[str, float]:
    """How far logits are from the float32 model's, ours and Hugging Face's. The plain model is float32 afterwards."""
    ids = _prompts(config, 1, 128)[0]
    hugging_face = bare_forward(plain, ids)()
    _, ours = read_one_layer(model, ids, 0)()
    plain.model.float()
    exact = bare_forward(plain, ids)()
    return {
        "ours": float((ours.cpu().float() - exact).abs().max()),
        "hugging face": float((hugging_face.float() - exact).abs().max()),
        "largest": float(exact.abs().max()),
    }


def _prompts(config: LargeConfig, count: int, tokens: int) -> list[list[int]]:
    rng = random.Random(config.seed)
    return [[rng.randrange(1000) for _ in range(tokens)] for _ in range(count)]


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether the numbers are as close to the float32 model's as they must be, and merged the same as alone."""
    errors = figures["errors"]
    is_close: bool = errors["ours"] <= _ERROR_FACTOR * errors["hugging face"]
    return is_close and bool(figures["merged"]["merged has the bits of alone"])


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = [f"on {figures['device']}; {'; '.join(figures['notes']) or 'rows keep their bits'}"]
    for row in figures["traces"]:
        ms = row["median_ms"]
        lines.append(
            f"  {row['tokens']} tokens: bare {ms['bare']:.2f} ms, trace {ms['one']:.2f} ms "
            f"({row['trace / bare']['median']:.2f}x), of every layer {ms['every']:.2f} ms; "
            f"noise {row['bare again / bare']['median']:.3f}x"
        )
    merged, ms = figures["merged"], figures["merged"]["median_ms"]
    errors = figures["errors"]
    lines += [
        f"  {merged['users']} users of {merged['tokens']} tokens: batched bare {ms['batched']:.1f} ms, merged "
        f"{ms['merged']:.1f} ms ({merged['merged / batched bare forward']['median']:.2f}x), one by one "
        f"{ms['one by one']:.0f} ms; the same bits as alone: {merged['merged has the bits of alone']}",
        f"  off the float32 model by {errors['ours']:.2e}, Hugging Face by {errors['hugging face']:.2e}, of "
        f"{errors['largest']:.2f}",
    ]
    return "\n".join(lines)


def config_for(folder: object, *, quick: bool) -> LargeConfig:
    """The configuration that is recorded, or a short one to see that it works."""
    config = LargeConfig()
    return replace(config, is_small=True, tokens=(32,), users=4, rounds=4) if quick else config
