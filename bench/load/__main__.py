"""One scenario against a service: `python -m bench.load notebooks --seconds 30`.

Without --url it starts a service of its own, with a tenant and a key for each of the scenario's. Prints the figures,
draws `out/load-SCENARIO.png`, and with --record appends a line to `bench/results/load.jsonl`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import aiohttp

from bench import record, tinyworld
from bench.load.clients import PolytraceSender, Sent, load
from bench.load.figures import figures, largest_gap, served
from bench.load.keys import with_keys
from bench.load.mixes import Ask, asks
from bench.load.pictures import draw
from bench.load.tenants import SCENARIOS, Tenant
from bench.service import running_service


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="load on a service")
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target-ms", type=float, default=500.0, help="answers within this count as goodput")
    parser.add_argument("--url", help="a service that serves tinyworld; none: an own one")
    parser.add_argument("--key", action="append", default=[], metavar="TENANT=KEY", help="a tenant's key; any number")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--budget-tokens", type=int, help="rows of a pass, of an own service; none: its default")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    keys = dict(entry.split("=", 1) for entry in arguments.key)
    tenants = tuple([replace(tenant, key=keys.get(tenant.name)) for tenant in SCENARIOS[arguments.scenario]])
    known = asks(str(tinyworld.FOLDER), sorted({name for tenant in tenants for name in tenant.mix}))
    budget = {} if arguments.budget_tokens is None else {"POLYTRACE_BUDGET_TOKENS": str(arguments.budget_tokens)}
    with _service(arguments.url, tenants, budget, stages=arguments.stages, ranks=arguments.ranks) as (url, tenants):
        sent, seconds = asyncio.run(run(url, tenants, known, seconds=arguments.seconds, seed=arguments.seed))
    found = figures(sent, tenants, seconds, target_s=arguments.target_ms / 1e3)
    lines = served(sent, tenants)
    found["largest_gap"] = largest_gap(lines, until=arguments.seconds)
    print(tell(found))
    picture = record.ROOT / "out" / f"load-{arguments.scenario}.png"
    draw(picture, title=f"{arguments.scenario}: {len(sent)} requests in {seconds:.0f} s", sent=sent, served=lines)
    print(picture)
    if found["wrong"] or found["unanswered"]:
        sys.exit("answers are wrong or missing, so the times mean nothing")
    if arguments.record:
        config = {"scenario": arguments.scenario, "tenants": [asdict(replace(one, key=None)) for one in tenants]}
        config |= {name: getattr(arguments, name) for name in ("seconds", "seed", "stages", "ranks", "budget_tokens")}
        record.append("load", config=config, figures=found)


async def run(
    url: str,
    tenants: Sequence[Tenant],
    known: dict[str, list[Ask]],
    *,
    seconds: float,
    seed: int,
    model: str = "tinyworld",
) -> tuple[list[Sent], float]:
    """The load of all tenants on a polytrace service."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=60.0)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        sender = PolytraceSender(session=session, url=url, model=model)
        return await load(tenants, known, sender, seconds=seconds, seed=seed)


def tell(found: dict[str, Any]) -> str:
    """The figures for a person."""

    def shown(name: str) -> str:
        numbers = found[name]
        return ", ".join(f"{key} {value:.1f}" for key, value in numbers.items()) if numbers else "none"

    lines = [
        f"{found['done']} of {found['requests']} requests done in {found['seconds']:.1f} s: "
        f"{found['requests_per_s']:.1f}/s, {found['goodput_per_s']:.1f}/s within {found['target_s'] * 1e3:.0f} ms; "
        f"{found['wrong']} wrong, "
        f"{found['failed']} failed, {found['unanswered']} unanswered, {found['refusals']} told to come again",
        f"  {found['passes']} passes, {found['requests_per_pass']:.2f} requests a pass, the largest with "
        f"{found['largest_pass']} token-layers; tenants were at most {found['largest_gap']:.0f} apart",
        f"  latency ms: {shown('latency_ms')}",
        f"  queue ms:   {shown('queue_ms')}",
        f"  run ms:     {shown('run_ms')}",
    ]
    for name, tenant in found["tenants"].items():
        wait = tenant["latency_ms"] or {}
        lines.append(
            f"  {name:12} {tenant['done']:6} done, {tenant['requests_per_s']:.1f}/s, p50 {wait.get('p50', 0):.0f} ms, "
            f"p99 {wait.get('p99', 0):.0f} ms, {tenant['token_layers']} token-layers"
        )
    return "\n".join(lines)


@contextlib.contextmanager
def _service(
    url: str | None, tenants: tuple[Tenant, ...], settings: dict[str, str], *, stages: int, ranks: int
) -> Iterator[tuple[str, tuple[Tenant, ...]]]:
    if url is not None:
        yield url.rstrip("/"), tenants
        return
    log, key = record.ROOT / "out" / "load-service.log", secrets.token_urlsafe(32)
    size: dict[str, Any] = {"stages": stages, "ranks": ranks, "settings": settings, "key": key}
    with running_service(tinyworld.FOLDER, name="tinyworld", log=log, **size) as service:
        yield service.url, with_keys(tenants, service.url, key)


if __name__ == "__main__":
    main()
