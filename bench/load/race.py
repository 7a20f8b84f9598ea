"""polytrace's service and NDIF on the same model, machine and run: raw clients, 1, 8 and 32 users at once.

    python -m bench.run race

Each user sends small requests one after another: a residual, a logit lens, a steered run, an ablated head. Both
services get bytes that were made before, and answers are looked at when the clocks have stopped: every value of both
is held against hooks on plain Hugging Face. The services take turns, never running load at the same time. Each has one
copy of the model, in float32, with one thread. Between their turns with one user the same requests run in this
process, in the engine alone: what a request takes longer is the service's own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import torch

from bench import record
from bench.jobs import Recorder
from bench.load.ndif.asking import KINDS as NDIF_KINDS
from bench.load.ndif.sender import NdifUser
from bench.load.ndif.services import NAME, NDIF, running_ndif
from bench.load.pictures import draw_race
from bench.plain import TOLERANCE, Plain, difference
from bench.service import running_service
from bench.workloads import KINDS, Choice, choice, direction
from engine.local import LocalBackend
from polytrace.graph import Request
from polytrace.model import Model
from polytrace.wire import decode_result, encode_request

_SILENCE_S = 3.0
_AIMS = {1: 1.0, 8: 1.0, 32: 8.0}  # requests a second, against NDIF's
_OVERHEAD_AIM_MS = 10.0
Ask = Callable[[int], Awaitable[bytes]]  # number of the request -> its answer


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceConfig:
    """One run."""

    folder: str
    users: tuple[int, ...] = (1, 8, 32)
    seconds: float = 8.0  # of one turn
    turns: int = 3
    variants: int = 16
    has_peer: bool = True


def run(config: RaceConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        requests, right, choices = _questions(config)
        bodies = [b"".join(bytes(part) for part in encode_request(request)) for request in requests]
        log = record.ROOT / "out" / "race-service.log"
        with running_service(config.folder, name="tinyworld", stages=1, ranks=1, log=log) as ours:
            if not config.has_peer:
                return asyncio.run(_race(config, ours.url, requests, bodies, right, None, folder))
            python = NDIF.make()
            with running_ndif(python, Path(config.folder)) as (url, env):
                (folder / "choices.json").write_text(json.dumps(choices))
                asking = [str(python), str(Path(__file__).parent / "ndif" / "asking.py")]
                subprocess.run([*asking, "write", NAME, str(folder / "choices.json"), scratch], env=env, check=True)
                figures = asyncio.run(_race(config, ours.url, requests, bodies, right, url, folder))
                subprocess.run([*asking, "read", scratch], env=env, check=True)
        answers = json.loads((folder / "answers.json").read_text())
        theirs = [torch.tensor(one["values"]).view(one["shape"]) for one in answers]
        figures["correct"]["ndif"] = max(difference(a, b) for a, b in zip(theirs, right, strict=True))
        return figures


def _questions(config: RaceConfig) -> tuple[list[Request], list[torch.Tensor], list[dict[str, Any]]]:
    """Requests as polytrace's client makes them, their right answers by hand, and what they ask for."""
    plain, backend = Plain(config.folder), LocalBackend(config.folder, threads=1)
    recorder = Recorder(backend)
    model: Any = Model(recorder)
    requests, right, choices = [], [], []
    kinds = [kind for kind in KINDS if kind.name in NDIF_KINDS]
    for number in range(config.variants):
        kind, at = kinds[number % len(kinds)], choice(number, plain)
        kind.ask(model, at)
        requests.append(recorder.seen[-1][0])
        (value,) = kind.check(plain, at).values()
        right.append(value)
        choices.append(_plain(kind.name, at, plain))
    backend.close()
    return requests, right, choices


def _plain(kind: str, at: Choice, plain: Plain) -> dict[str, Any]:
    width = plain.model.config.hidden_size // plain.model.config.num_attention_heads
    return asdict(at) | {
        "kind": kind,
        "direction": direction(plain.model.config.hidden_size, at).tolist(),
        "start": at.head * width,
        "stop": (at.head + 1) * width,
    }


async def _race(
    config: RaceConfig,
    url: str,
    requests: Sequence[Request],
    bodies: Sequence[bytes],
    right: Sequence[torch.Tensor],
    peer: str | None,
    folder: Path,
) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=120.0)
    rates: dict[str, dict[int, list[float]]] = {}
    waits: dict[str, dict[int, list[float]]] = {}
    alone: list[float] = []  # median milliseconds of a request in the engine, by turn
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        contenders = {"polytrace": _ours(session, url, bodies)}
        if peer is not None:
            contenders["ndif"] = _theirs(session, peer, folder, len(bodies))
        for ask in contenders.values():
            await _load(ask, users=4, seconds=2.0)  # warm
        for users, turn in itertools.product(config.users, range(config.turns)):
            names = list(contenders) if turn % 2 == 0 else list(contenders)[::-1]
            for name in names:
                took = await _load(contenders[name], users=users, seconds=config.seconds)
                rates.setdefault(name, {}).setdefault(users, []).append(len(took) / config.seconds)
                waits.setdefault(name, {}).setdefault(users, []).append(1e3 * statistics.median(took))
            if users == 1:
                alone.append(await asyncio.to_thread(_alone, config, requests))
        ours = [decode_result(await contenders["polytrace"](number))[0] for number in range(len(bodies))]
        if peer is not None:
            for number in range(len(bodies)):
                (folder / f"{number}.answer").write_bytes(await contenders["ndif"](number))
    values = [_tensor(next(iter(raws.values()))) for raws in ours]
    return {
        "requests_per_s": _medians(rates),
        "median_ms": _medians(waits),
        "engine_ms": statistics.median(alone) if alone else None,
        "turns": {name: {str(users): found for users, found in by.items()} for name, by in rates.items()},
        "correct": {"polytrace": max(difference(a, b) for a, b in zip(values, right, strict=True))},
        "allowed": TOLERANCE,
        "aims": {str(users): aim for users, aim in _AIMS.items()},
    }


def _alone(config: RaceConfig, requests: Sequence[Request]) -> float:
    """The median of what a request takes in the engine, with no service around it; milliseconds."""
    backend, took = LocalBackend(config.folder, threads=1), list[float]()
    try:
        end = time.perf_counter() + config.seconds
        for request in itertools.cycle(requests):
            if (start := time.perf_counter()) > end:
                break
            backend.run(request)
            took.append(time.perf_counter() - start)
    finally:
        backend.close()
    return 1e3 * statistics.median(took[len(took) // 10 :])  # without what is compiled at first


def _ours(session: aiohttp.ClientSession, url: str, bodies: Sequence[bytes]) -> Ask:
    headers = {"Content-Type": "application/vnd.safetensors", "Prefer": "wait=60"}

    async def ask(number: int) -> bytes:
        path = f"{url}/v1/models/tinyworld/requests"
        async with session.post(path, data=bodies[number % len(bodies)], headers=headers) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise RuntimeError(f"polytrace answered {answer.status}: {body[:300]!r}")
            return body

    return ask


def _theirs(session: aiohttp.ClientSession, url: str, folder: Path, count: int) -> Ask:
    payloads = [(folder / f"{number}.bin").read_bytes() for number in range(count)]
    model_key = (folder / "model_key").read_text()
    free: list[NdifUser] = []
    last_s = 0.0  # when somebody asked: the server closes sockets of users who are silent for some seconds

    async def ask(number: int) -> bytes:
        nonlocal last_s
        if time.perf_counter() - last_s > _SILENCE_S:
            free.clear()
        last_s = time.perf_counter()
        user = free.pop() if free else await NdifUser.open(session, url, model_key)
        try:
            return await user.ask(payloads[number % count])
        finally:
            free.append(user)

    return ask


async def _load(ask: Ask, *, users: int, seconds: float) -> list[float]:
    """Seconds that each answer took which came in time, of users who each ask one thing after another."""
    end, took = time.perf_counter() + seconds, list[float]()

    async def user(number: int) -> None:
        while (start := time.perf_counter()) < end:
            await ask(number)
            number += users + 1
            if time.perf_counter() <= end:
                took.append(time.perf_counter() - start)

    async with asyncio.TaskGroup() as group:
        for number in range(users):
            group.create_task(user(number))
    return took


def _tensor(raw: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw.data), dtype=getattr(torch, raw.dtype)).view(raw.shape)


def _medians(found: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[str, dict[str, float]]:
    return {name: {str(users): statistics.median(all_) for users, all_ in by.items()} for name, by in found.items()}


def is_right(figures: Mapping[str, Any]) -> bool:
    """Whether both services' values are those of plain Hugging Face."""
    return all(off <= figures["allowed"] for off in figures["correct"].values())


def tell(figures: Mapping[str, Any]) -> str:
    """The figures for a person, and a picture in `out/`."""
    rates, waits = figures["requests_per_s"], figures["median_ms"]
    lines = []
    for users in rates["polytrace"]:
        said = ", ".join(f"{name} {by[users]:.1f}/s ({waits[name][users]:.1f} ms)" for name, by in rates.items())
        if "ndif" in rates:
            said += f": {rates['polytrace'][users] / rates['ndif'][users]:.1f}x; aim {figures['aims'].get(users, 1)}x"
        lines.append(f"  {users:>3} users: {said}")
    if figures["engine_ms"] is not None:
        over = waits["polytrace"]["1"] - figures["engine_ms"]
        lines.append(
            f"  one request in the engine alone: {figures['engine_ms']:.1f} ms; the service adds {over:.1f} ms; "
            f"aim {_OVERHEAD_AIM_MS:.0f} ms"
        )
    lines.append("  off from plain Hugging Face: " + ", ".join(f"{k} {v:.1e}" for k, v in figures["correct"].items()))
    users = [int(count) for count in rates["polytrace"]]
    picture = record.ROOT / "out" / "race.png"
    draw_race(
        picture, title="Small requests on tinyworld", users=users, rates={k: list(v.values()) for k, v in rates.items()}
    )
    return "\n".join(["small requests, raw clients:", *lines, f"  {picture.relative_to(record.ROOT)}"])


def config_for(folder: Path, *, quick: bool) -> RaceConfig:
    """The configuration that `make bench` runs, or a short one to see that it works."""
    return RaceConfig(folder=str(folder), seconds=2.0 if quick else 8.0, turns=1 if quick else 3)
