"""What ranks send each other for a read, against the least that could be sent.

    python -m bench.run moved

One stage of a Llama-shaped model with random weights, whose MLP is as wide as Llama 3.1 405B's (53,248 neurons), over
four ranks that are Ray actors, as `polytrace serve` has them. Each kind of read runs alone, and the receipt's
`gathered_bytes` is held against two baselines: the whole value of the site to every rank, which is what moves when the
slice is taken above the gather, and the least, which is what the ranks that need a result do not have of it. Every rank
runs the graph, so every rank needs it. A result is held against the same read of one process.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import polytrace
from bench.cluster import own_cluster
from bench.plain import TOLERANCE, difference
from cluster.deployment import Deployment, DeploymentConfig
from engine.direct import DirectBackend
from engine.loading import meta_model
from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedConfig:
    """One run of the benchmark."""

    hidden: int = 256
    neurons: int = 53_248
    vocabulary: int = 128_256
    heads: int = 16
    layers: int = 2
    ranks: int = 4
    tokens: int = 64
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    """One kind of read: what a user writes, its site's size a token, and the numbers that a rank lacks, at least."""

    name: str
    write: Callable[[Any], Any]
    site: Callable[[MovedConfig], int]
    least: Callable[[MovedConfig], float]  # float32 or int64 numbers, in units of 4 bytes, all ranks together


def _neurons(config: MovedConfig) -> int:
    return config.neurons


def _vocabulary(config: MovedConfig) -> int:
    return config.vocabulary


def _queries(config: MovedConfig) -> int:
    return config.hidden


def _others(numbers: float) -> Callable[[MovedConfig], float]:
    """So many a token, from the one rank that has them to all others."""
    return lambda config: numbers * config.tokens * (config.ranks - 1)


def _everyones(numbers: float) -> Callable[[MovedConfig], float]:
    """So many a token of each rank, to all others."""
    return lambda config: numbers * config.tokens * config.ranks * (config.ranks - 1)


def _gate(model: Any) -> Any:
    return model.model.layers[1].mlp.gate_proj.output


READS = (
    Read("one neuron", lambda m: _gate(m)[..., 40_000], _neurons, _others(1)),
    Read(
        "one neuron of the last token",
        lambda m: _gate(m)[:, -1, 40_000],
        _neurons,
        lambda config: float(config.ranks - 1),
    ),
    Read("32 neurons", lambda m: _gate(m)[..., 100:132], _neurons, _others(32)),
    Read("the 8 largest neurons", lambda m: _gate(m).topk(8, -1)[1], _neurons, _everyones(8 * 3)),
    Read("a direction in the neurons", lambda m: _gate(m) @ _direction(m), _neurons, _everyones(1)),
    Read("the neurons' mean", lambda m: _gate(m).mean(-1), _neurons, _everyones(1)),
    Read("one head's queries", lambda m: m.model.layers[1].self_attn.q_rot[:, :, 5], _queries, _others(16)),
    Read("one head's output", lambda m: m.model.layers[1].self_attn.z[:, :, 5], _queries, _others(16)),
    Read("the likeliest token", lambda m: m.lm_head.output.argmax(-1), _vocabulary, _everyones(3)),
    Read("the 10 likeliest tokens", lambda m: m.lm_head.output.topk(10, -1)[1], _vocabulary, _everyones(30)),
    Read(
        "one token's probability",
        lambda m: m.lm_head.output.softmax(-1)[..., 17],
        _vocabulary,
        lambda config: _everyones(2 + 1 / config.ranks)(config),
    ),
    Read(
        "a logit lens",
        lambda m: m.lm_head(m.model.norm(m.model.layers[0].output[0])).softmax(-1).max(-1)[0],
        _vocabulary,
        _everyones(5),
    ),
    Read("all neurons", _gate, _neurons, lambda config: config.neurons * config.tokens * (config.ranks - 1)),
)


def _direction(model: Any) -> torch.Tensor:
    return torch.randn(model.config["intermediate_size"], generator=torch.Generator().manual_seed(1))


def run(config: MovedConfig) -> dict[str, Any]:
    """The figures, as plain JSON: a row for each kind of read."""
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:  # Ray wants short paths
        source = _configuration(config, Path(folder))
        one = polytrace.load(source, random_weights=config.seed, threads=1, device="cpu")
        ids = [token % 1000 for token in range(config.tokens)]
        expected = [_read(one, ids, read)[0] for read in READS]
        one.close()
        with _deployed(config, source, folder) as model:
            found = [_read(model, ids, read) for read in READS]
    rows = [_row(config, read, *each, value) for read, each, value in zip(READS, found, expected, strict=True)]
    return {"rows": rows, "allowed_difference": TOLERANCE}


def _read(model: Any, ids: list[int], read: Read) -> tuple[torch.Tensor, int]:
    with model.trace([ids], sharing="off") as tracer:
        value = read.write(model).save()
    return value, tracer.receipt.gathered_bytes


def _row(config: MovedConfig, read: Read, value: torch.Tensor, moved: int, expected: torch.Tensor) -> dict[str, Any]:
    whole = 4 * read.site(config) * config.tokens * (config.ranks - 1)
    least = int(4 * read.least(config))
    return {
        "read": read.name,
        "bytes": moved,
        "least": least,
        "whole": whole,
        "moved / least": moved / least,
        "whole / moved": whole / moved,
        "difference": difference(value, expected),
    }


def _configuration(config: MovedConfig, folder: Path) -> str:
    path = folder / "model"
    path.mkdir()
    told = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": config.hidden,
        "intermediate_size": config.neurons,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads // 2,
        "vocab_size": config.vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(told))
    return str(path)


@contextmanager
def _deployed(config: MovedConfig, source: str, folder: str) -> Iterator[Any]:
    """The model over the ranks, on a Ray cluster of this machine."""
    deployment = Deployment(
        DeploymentConfig(
            name="moved",
            source=source,
            ranks=config.ranks,
            device="cpu",
            threads=1,
            random_weights_seed=config.seed,
        )
    )
    with own_cluster(config.ranks, folder):
        try:
            description = deployment.start()
            yield Model(DirectBackend(source, deployment.shards(lambda: None), description, meta_model(source)))
        finally:
            deployment.stop()


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every value was what one process reads."""
    return all(row["difference"] <= TOLERANCE for row in figures["rows"])


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = ["bytes that ranks received for a read; the least; times less than the whole site"]
    for row in figures["rows"]:
        lines.append(
            f"  {row['read']:30} {row['bytes']:>12,} B  {row['moved / least']:6.2f}x the least  "
            f"{row['whole / moved']:>10,.0f}x less than the whole; off {row['difference']:.0e}"
        )
    return "\n".join(lines)


def config_for(folder: Path, *, quick: bool) -> MovedConfig:
    """The configuration that `make bench` runs, or a small one to see that it works."""
    return replace(MovedConfig(), ranks=2, tokens=8) if quick else MovedConfig()
