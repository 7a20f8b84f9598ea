"""A body over a dataset: how fast, and whether memory stays flat, in one process and over HTTP.

    python -m bench.run maps

The body keeps the last token's residual of each prompt (rows, into a folder), the mean of its norm, the covariance of
a part of it and the ten largest logits of the dataset. The dataset is a generator. What is measured: prompts a second
against a plain Hugging Face loop with a hook (one prompt after another, on the first of the prompts, in the same run);
and resident memory at every tenth of the dataset, of the client and, over HTTP, of the service's own processes: it
levels off, whatever the number of prompts.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

import polytrace
from bench.plain import TOLERANCE, Plain
from bench.service import running_service
from polytrace.model import Model

_MARK = "POLYTRACE_BENCH_MAPS"  # every process of the service inherits it
_ROLES = ("api.children", "ray::ShardActor")  # the service's own processes; Ray's are beside them
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MapsConfig:
    """One run of the benchmark."""

    folder: str
    num_prompts: int = 20_000
    num_plain: int = 400
    shortest: int = 4
    longest: int = 24
    layer: int = 5
    is_over_http: bool = True


def run(config: MapsConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    plain = Plain(config.folder)
    torch.set_num_threads(1)
    start = time.perf_counter()
    expected = [_by_hand(plain, config, prompt) for prompt in _prompts(config, config.num_plain)]
    figures: dict[str, Any] = {
        "plain": {"prompts_per_s": round(config.num_plain / (time.perf_counter() - start), 1)},
        "result_mib": round(config.num_prompts * expected[0].numel() * 4 / _MIB, 1),
    }
    with polytrace.load(config.folder, threads=1) as model:
        figures["in process"] = _mapped(model, config, expected, lambda: 0.0)
    if config.is_over_http:
        os.environ[_MARK] = mark = secrets.token_hex(8)
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "serve.log"
            with running_service(config.folder, name="bench", stages=1, ranks=1, log=log) as service:
                figures["over HTTP"] = _mapped(
                    polytrace.connect(service.url, "bench"), config, expected, lambda: _service_mib(mark)
                )
    return figures


def _mapped(
    model: Model, config: MapsConfig, expected: list[torch.Tensor], service_mib: Callable[[], float]
) -> dict[str, Any]:
    def body() -> dict[str, Any]:
        last = model.model.layers[config.layer].output[0][:, -1]
        return {
            "last": last,
            "norm": polytrace.mean(last.norm(dim=-1)),
            "covariance": polytrace.covariance(last[:, :64]),
            "top": polytrace.top_k(model.lm_head.output[:, -1], 10),
        }

    client: list[float] = []
    service: list[float] = []
    worst, total, parts = 0.0, 0.0, 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        mapping = model.map(_prompts(config, config.num_prompts), body, to=folder)
        for part in mapping:
            parts += 1
            for number, row in zip(part.numbers, part["last"], strict=True):
                total += float(row.double().norm())
                if number < len(expected):
                    allowed = max(1.0, float(expected[number].abs().max()))
                    worst = max(worst, float((row - expected[number]).abs().max()) / allowed)
            while len(client) < 10 and part.prompts.stop * 10 >= (len(client) + 1) * config.num_prompts:
                client.append(round(_resident_mib(os.getpid()), 1))
                service.append(round(service_mib(), 1))
        seconds = time.perf_counter() - start
    off = abs(float(mapping.results["norm"]) - total / config.num_prompts)
    return {
        "prompts_per_s": round(config.num_prompts / seconds, 1),
        "seconds": round(seconds, 1),
        "parts": parts,
        "client_mib": client,
        "service_mib": service,
        "largest_difference_to_plain": worst,
        "mean_off": off,
    }


def _prompts(config: MapsConfig, count: int) -> Iterator[list[int]]:
    """The first prompts of the dataset, made when they are asked for."""
    for number in range(count):
        draw = Random(number)
        yield [draw.randrange(3, 500) for _ in range(draw.randint(config.shortest, config.longest))]


def _by_hand(plain: Plain, config: MapsConfig, prompt: list[int]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    layer = plain.model.get_submodule(f"model.layers.{config.layer}")
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output[0, -1].clone()))
    try:
        with torch.inference_mode():
            plain.model(input_ids=torch.tensor([prompt]), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _service_mib(mark: str) -> float:
    """Resident memory of the processes that inherited the mark and work for the service."""
    found = 0.0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if is_ours and any(role in command for role in _ROLES):
            found += _resident_mib(int(entry.name))
    return found


def _resident_mib(process: int) -> float:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:  # it has ended
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether every row and the mean were what they should be."""
    runs = [figures[name] for name in ("in process", "over HTTP") if name in figures]
    return all(run["largest_difference_to_plain"] <= TOLERANCE and run["mean_off"] <= TOLERANCE for run in runs)


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person."""
    lines = [f"a plain loop: {figures['plain']['prompts_per_s']} prompts a second"]
    for name in ("in process", "over HTTP"):
        if name not in figures:
            continue
        run = figures[name]
        lines.append(f"{name}: {run['prompts_per_s']} prompts a second, {run['parts']} parts, {run['seconds']} s")
        lines.append(f"  client MiB at each tenth: {run['client_mib']}")
        if any(run["service_mib"]):
            lines.append(f"  service MiB at each tenth: {run['service_mib']}")
        lines.append(
            f"  off from plain by {run['largest_difference_to_plain']:.1e}; rows have {figures['result_mib']} MiB"
        )
    return "\n".join(lines)


def config_for(folder: Path, *, quick: bool) -> MapsConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    if quick:
        return MapsConfig(folder=str(folder), num_prompts=300, num_plain=20, is_over_http=False)
    return MapsConfig(folder=str(folder))
