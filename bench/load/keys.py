"""Tenants of a scenario as tenants of a service: each with its weight and a key of its own, made by an operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import httpx

from bench.load.tenants import Tenant


def with_keys(tenants: Sequence[Tenant], url: str, operator_key: str) -> tuple[Tenant, ...]:
    """The tenants, known to the service, with keys. Raises httpx.HTTPStatusError where the service refuses."""
    headers = {"Authorization": f"Bearer {operator_key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=30.0, trust_env=False) as client:
        return tuple([replace(tenant, key=_key(client, tenant)) for tenant in tenants])


def _key(client: httpx.Client, tenant: Tenant) -> str:
    client.put(f"/v1/tenants/{tenant.name}", json={"weight": tenant.weight}).raise_for_status()
    made = client.post("/v1/keys", json={"tenant": tenant.name, "user": "load"}).raise_for_status()
    return str(made.json()["secret"])
