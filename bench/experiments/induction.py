"""Induction heads: attention patterns made and reduced to one number a head at the service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.experiments.experiment import Answer, Values, heads
from bench.plain import Plain


def ask(model: Any, turn: int) -> Answer:
    """How much each head looks at what came after the last time; patterns are made and reduced at the service."""
    config = model.config
    ids, rows, columns = _repeated(config["vocab_size"], turn)
    num_heads, width = heads(config)
    num_kv_heads = config["num_key_value_heads"]
    cos, sin = _angles(config, len(ids), width)
    future = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    scores = []
    with model.trace([ids]) as tracer:
        for layer in model.model.layers:
            query = layer.self_attn.q_proj.output.view(1, len(ids), num_heads, width).transpose(1, 2)
            key = layer.self_attn.k_proj.output.view(1, len(ids), num_kv_heads, width).transpose(1, 2)
            key = key.repeat_interleave(num_heads // num_kv_heads, dim=1)
            likeness = _rotate(query, cos, sin) @ _rotate(key, cos, sin).transpose(-1, -2)
            pattern = (likeness * width**-0.5 + future).softmax(-1)
            scores.append(pattern[:, :, rows, columns].mean(-1).save())
    return Answer(values={"scores": torch.cat(scores)}, receipts=(tracer.receipt,))


def check(plain: Plain, turn: int) -> Values:
    """The patterns that eager attention reports."""
    ids, rows, columns = _repeated(plain.model.config.vocab_size, turn)
    before = plain.model.config._attn_implementation
    plain.model.set_attn_implementation("eager")
    with torch.inference_mode():
        batch = torch.tensor([ids], device=plain.device)
        patterns = plain.model(input_ids=batch, use_cache=False, output_attentions=True).attentions
    plain.model.set_attn_implementation(before)
    return {"scores": torch.cat([pattern[:, :, rows, columns].mean(-1) for pattern in patterns])}


def tell(values: Values, model: Any, turn: int) -> str:
    """The strongest head."""
    layer, head = divmod(int(values["scores"].argmax()), values["scores"].shape[1])
    return f"head {head} of layer {layer} is an induction head: score {float(values['scores'].max()):.2f} of 1"


def _repeated(vocab_size: int, turn: int) -> tuple[list[int], Tensor, Tensor]:
    """Random tokens said twice, the second occurrences, and where each should look: one after its first."""
    length = 20
    generator = torch.Generator().manual_seed(turn)
    half = (3 + torch.randperm(vocab_size - 3, generator=generator)[:length]).tolist()
    rows = torch.arange(1 + length, 1 + 2 * length)
    return [0, *half, *half], rows, rows - length + 1


def _rotate(value_HTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """The rotary embedding applied; on a recorded value as on a tensor."""
    half = value_HTC.shape[-1] // 2
    turned = torch.cat((-value_HTC[..., half:], value_HTC[..., :half]), -1)
    return value_HTC * cos_TC + turned * sin_TC


def _angles(config: Mapping[str, Any], num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, C]` of the rotary position embedding, as Llama lays them out."""
    theta = config["rope_parameters"]["rope_theta"]
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(num_tokens, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()
