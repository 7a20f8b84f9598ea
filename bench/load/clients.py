"""Raw clients: HTTP calls with bytes that were made before, and what became of each, written down as it happens.

One process, one event loop, a connection a request under way: the clients must not be what is measured. Answers are
kept and looked at when the load is over.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import aiohttp

from bench.load.arrivals import AtOnce, Bursty, Closed, Poisson
from bench.load.mixes import Ask, drawn
from bench.load.tenants import Tenant

_WAIT_S = 20.0  # of one call for a result


@dataclass(slots=True, kw_only=True)
class Sent:
    """One request and what became of it; times are seconds since the load began."""

    tenant: str
    ask: Ask
    due: float  # when it was to be sent
    sent: float = 0.0
    accepted: float | None = None  # when the service told its id, or its result
    ended: float | None = None
    id: str | None = None
    key: str = field(default_factory=lambda: secrets.token_hex(16))  # of idempotency
    status: int = 0  # of the last answer; 200: it is done
    answer: bytes | None = None
    problem: str | None = None
    refusals: int = 0  # answers that told to come again later
    losses: int = 0  # calls that nobody answered

    @property
    def is_done(self) -> bool:
        return self.status == 200 and self.answer is not None

    @property
    def latency_s(self) -> float:
        """From when it was due: a client that is late itself must not flatter the service."""
        assert self.ended is not None
        return self.ended - self.due


class Sender(Protocol):
    """How a request reaches a service and its answer comes back."""

    async def send(self, tenant: Tenant, one: Sent, clock: Clock) -> None:
        """Until it has ended, one way or another; writes into `one`."""


class Clock:
    """Seconds since the load began."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start


@dataclass(slots=True, kw_only=True)
class PolytraceSender:
    """polytrace's own HTTP, as its client speaks it: sent once with an idempotency key, then waited for."""

    session: aiohttp.ClientSession
    url: str
    model: str
    patience_s: float = 120.0  # a service that is away this long is gone

    async def send(self, tenant: Tenant, one: Sent, clock: Clock) -> None:
        headers = {"Content-Type": "application/vnd.safetensors", "Prefer": f"wait={_WAIT_S:.0f}"}
        headers["Idempotency-Key"] = one.key
        headers["X-Polytrace-Class"] = "interactive" if tenant.is_interactive else "batch"
        if tenant.key is not None:
            headers["Authorization"] = f"Bearer {tenant.key}"
        heard = clock.now()
        while clock.now() - heard < self.patience_s:
            try:
                if one.id is None:
                    call = self.session.post(
                        f"{self.url}/v1/models/{self.model}/requests", data=one.ask.body, headers=headers
                    )
                else:
                    path = f"{self.url}/v1/requests/{one.id}"
                    if one.status == 202:
                        async with self.session.get(f"{path}?wait={_WAIT_S:.0f}", headers=headers) as waited:
                            await waited.read()
                    call = self.session.get(f"{path}/result", headers=headers)
                async with call as answer:
                    body = await answer.read()
            except (aiohttp.ClientError, TimeoutError, ConnectionError):
                one.losses += 1
                await asyncio.sleep(0.1)
                continue
            heard = clock.now()
            one.status = answer.status
            one.id = answer.headers.get("X-Request-Id", one.id)
            if answer.status in (429, 503):
                one.refusals += 1
                await asyncio.sleep(float(answer.headers.get("Retry-After", "1")))
                continue
            if one.accepted is None:
                one.accepted = clock.now()
            if answer.status == 202:
                continue
            if answer.status == 200:
                one.answer = body
            else:
                one.problem = body.decode(errors="replace")[:500]
            break
        one.ended = clock.now()


async def load(
    tenants: Sequence[Tenant], asks: Mapping[str, Sequence[Ask]], sender: Sender, *, seconds: float, seed: int = 0
) -> tuple[list[Sent], float]:
    """All requests of a scenario, each ended, and the seconds that took. Nobody sends anything new after `seconds`."""
    run = _Load(asks, sender, seconds)
    async with asyncio.TaskGroup() as group:
        for number, tenant in enumerate(tenants):
            name = f"{seed} {number} {tenant.name}"
            if isinstance(tenant.arrivals, Closed):
                for client in range(tenant.arrivals.clients):
                    group.create_task(run.closed(tenant, tenant.arrivals, Random(f"{name} {client}")))
            else:
                group.create_task(run.open(tenant, tenant.arrivals, Random(name)))
    return run.sent, run.clock.now()


class _Load:
    """One load, and what was sent so far."""

    def __init__(self, asks: Mapping[str, Sequence[Ask]], sender: Sender, seconds: float) -> None:
        self._asks = asks
        self._sender = sender
        self._seconds = seconds
        self.clock = Clock()
        self.sent: list[Sent] = []

    async def open(self, tenant: Tenant, arrivals: Poisson | Bursty | AtOnce, rng: Random) -> None:
        """Requests at their times, whether earlier ones are answered or not."""
        async with asyncio.TaskGroup() as group:
            for at in arrivals.times(self._seconds - tenant.begins_s, rng):
                ask, due = drawn(tenant.mix, self._asks, rng), at + tenant.begins_s
                await asyncio.sleep(max(0.0, due - self.clock.now()))
                group.create_task(self._sender.send(tenant, self._begun(tenant, ask, due), self.clock))

    async def closed(self, tenant: Tenant, arrivals: Closed, rng: Random) -> None:
        """One client."""
        await asyncio.sleep(tenant.begins_s)
        while (due := self.clock.now()) < self._seconds:
            one = self._begun(tenant, drawn(tenant.mix, self._asks, rng), due)
            await self._sender.send(tenant, one, self.clock)
            if arrivals.think_s:
                await asyncio.sleep(rng.expovariate(1 / arrivals.think_s))

    def _begun(self, tenant: Tenant, ask: Ask, due: float) -> Sent:
        one = Sent(tenant=tenant.name, ask=ask, due=due, sent=self.clock.now())
        self.sent.append(one)
        return one
