"""What the gateway makes of deployments that it finds in the store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gateways import Agreeable, description_of_nothing

from api.identity import LOCAL
from api.served import Deployments
from api.store import Store
from cluster.config import DeploymentSpec, Heat
from cluster.requests import DeploymentState, Published
from polytrace.codec import to_json
from polytrace.errors import CapacityError


def published(description: bytes) -> Published:
    return Published(source="none", dtype="auto", description=description, tokenizer=None)


async def comes_true(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it has not come true")


def test_a_model_on_demand_that_another_version_described_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    good = to_json(description_of_nothing())
    old = dict(good, limits={"kept_bytes": 1} | {"max_sequence_tokens": 8})
    store = Store(tmp_path / "store")
    store.want(DeploymentSpec(name="m", source="none"))
    store.keep("m", {"on_demand": True})
    store.publish("m", published(json.dumps(old).encode()))
    store.cool("m", Heat.COLD, "made room for another", "room")
    store.set_state("m", DeploymentState.COLD, "made room for another")

    def heat() -> Heat:
        known = store.deployment("m")
        assert known is not None
        return known.heat

    async def story() -> None:
        deployments = Deployments(store, Agreeable())
        deployments.ring()
        await comes_true(lambda: deployments._refresh is None)
        assert heat() is Heat.COLD, "nobody has asked for it"
        with pytest.raises(CapacityError, match=r"described by another version of polytrace.* loaded anew") as refused:
            deployments.get("m", LOCAL)
        assert refused.value.retry_after_s
        await comes_true(lambda: heat() is Heat.HOT)
        store.publish("m", published(json.dumps(good).encode()))
        store.set_state("m", DeploymentState.READY, "ready")
        deployments.ring()
        await comes_true(lambda: deployments._refresh is None)
        assert deployments.get("m", LOCAL).description == description_of_nothing()

    asyncio.run(story())
    store.close()
