"""A service under load whose processes are killed: no request is lost, none is answered twice differently.

    python -m bench.load.soak --clients 64 --minutes 10

Clients send one request after another under idempotency keys and wait for whatever becomes of each; meanwhile gateway,
controller and shards get SIGKILL at random moments. Afterwards every answer is held against the right one, every result
is fetched again, and every request is sent again under its key: the bytes must be the same ones.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp
import psutil

from bench import record, tinyworld
from bench.load.arrivals import Closed
from bench.load.clients import Clock, PolytraceSender, Sent, load
from bench.load.figures import figures
from bench.load.mixes import asks
from bench.load.tenants import Tenant
from bench.service import running_service

# what the command line of each begins with; the supervisor gives up after 4 breakdowns of its children in 10 minutes
VICTIMS = {"gateway": "api.children gateway", "controller": "api.children controller", "shard": "ray::ShardActor"}
PLAN = ("gateway", "shard", "controller", "shard", "gateway", "shard")
_SAME_AGAIN = 200  # of the results are fetched, and of the requests sent, once more


@dataclass(frozen=True, slots=True)
class Kill:
    """What was ended, and when."""

    at: float
    role: str
    pid: int


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="a load on a service whose processes are killed")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    tenants = (
        Tenant(name="people", arrivals=Closed(clients=arguments.clients - arguments.clients // 8)),
        Tenant(
            name="sweeps", arrivals=Closed(clients=arguments.clients // 8), mix={"sweep": 1.0}, is_interactive=False
        ),
    )
    known = asks(str(tinyworld.FOLDER), sorted({name for tenant in tenants for name in tenant.mix}))
    log = record.ROOT / "out" / "soak-service.log"
    size = {"stages": arguments.stages, "ranks": arguments.ranks}
    with running_service(tinyworld.FOLDER, name="tinyworld", log=log, **size) as service:
        found = asyncio.run(_soak(service.url, tenants, known, arguments.minutes * 60, Random(arguments.seed)))
    print(tell(found))
    if arguments.record:
        record.append("soak", config=vars(arguments), figures=found)
    if not is_right(found):
        sys.exit("requests were lost, or answered twice differently")


async def _soak(url: str, tenants: Sequence[Tenant], known: Any, seconds: float, rng: Random) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=60.0)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        sender = PolytraceSender(session=session, url=url, model="tinyworld", patience_s=240.0)
        kills: list[Kill] = []
        killing = asyncio.create_task(_kill(kills, seconds, rng))
        sent, took = await load(tenants, known, sender, seconds=seconds)
        killing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await killing
        chosen = rng.sample(sent, min(_SAME_AGAIN, len(sent)))
        again = [await _again(session, url, one) for one in chosen]
        resent = [await _resent(sender, {tenant.name: tenant for tenant in tenants}, one) for one in chosen]
    return figures(sent, tenants, took, target_s=2.0) | {
        "kills": [{"at": round(kill.at, 1), "role": kill.role} for kill in kills],
        "fetched_again": Counter(again),
        "sent_again": Counter(resent),
        "twice": len({one.id for one in sent}) != len(sent),
        "problems": sorted({one.problem[:200] for one in sent if one.problem is not None})[:5],
    }


async def _kill(kills: list[Kill], seconds: float, rng: Random) -> None:
    """One of the plan after the other, at random moments of equal parts of the time."""
    clock, part = Clock(), 0.9 * seconds / len(PLAN)
    for number, role in enumerate(PLAN):
        await asyncio.sleep(max(0.0, (number + 0.2 + 0.7 * rng.random()) * part - clock.now()))
        pids = [process.pid for process in psutil.Process().children(recursive=True) if _is(process, role)]
        if pids:
            victim = rng.choice(sorted(pids))
            os.kill(victim, signal.SIGKILL)
            kills.append(Kill(clock.now(), role, victim))


def _is(process: psutil.Process, role: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return VICTIMS[role] in " ".join(process.cmdline())
    return False


async def _again(session: aiohttp.ClientSession, url: str, one: Sent) -> str:
    """Whether a result is what it was."""
    async with session.get(f"{url}/v1/requests/{one.id}/result") as answer:
        body = await answer.read()
    return "the same" if body == one.answer else f"another ({answer.status})"


async def _resent(sender: PolytraceSender, tenants: dict[str, Tenant], one: Sent) -> str:
    """Whether the request, sent again under its key, is the one that it was."""
    twin = Sent(tenant=one.tenant, ask=one.ask, due=one.due, key=one.key)
    await sender.send(tenants[one.tenant], twin, Clock())
    return "the same" if (twin.id, twin.answer) == (one.id, one.answer) else f"another ({twin.status})"


def is_right(found: dict[str, Any]) -> bool:
    """Whether every request was answered, rightly and once."""
    whole = found["done"] == found["requests"] and not found["wrong"] and not found["twice"]
    return whole and found["fetched_again"].keys() == found["sent_again"].keys() == {"the same"}


def tell(found: dict[str, Any]) -> str:
    """The figures for a person."""
    kills = ", ".join(f"{kill['role']} at {kill['at']:.0f} s" for kill in found["kills"])
    wait = found["latency_ms"] or {}
    lines = [
        f"{found['done']} of {found['requests']} requests done in {found['seconds']:.0f} s, {found['wrong']} wrong, "
        f"{found['failed']} failed, {found['unanswered']} unanswered",
        f"  killed: {kills}",
        f"  calls that nobody answered: {found['lost_calls']}, told to come again: {found['refusals']}",
        f"  latency ms: p50 {wait.get('p50', 0):.0f}, p99 {wait.get('p99', 0):.0f}, max {wait.get('max', 0):.0f}",
        f"  fetched again: {dict(found['fetched_again'])}; sent again: {dict(found['sent_again'])}",
        *(f"  {problem}" for problem in found["problems"]),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
