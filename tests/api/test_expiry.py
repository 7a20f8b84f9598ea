"""What requests left goes some time after their end, and nothing before that, and nothing that somebody still reads."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateways import GENERATED, TOKENS, Agreeable, GatewayService, description_of_nothing, submit, wait_until

import api.events
from api.expiry import Expiry
from api.identity import LOCAL
from api.settings import DEFAULT_RESULT_TTL_S, gateway_settings
from api.store import Store
from api.streams import Streams
from api.waiting import Waiting
from polytrace.errors import RunError, UserError
from scheduling.plan import RequestId

TTL_S = 0.6


@pytest.fixture(params=[TTL_S])
def service(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[GatewayService]:
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), result_ttl_s=request.param)
    yield service
    service.close()


def files(store: Store, request: RequestId) -> list[bool]:
    return [store.result_path(request).exists(), store.events.path(request).exists()]


def test_results_and_events_go_while_the_service_runs_and_what_runs_stays(service: GatewayService) -> None:
    done, failed, running = (submit(service) for _ in range(3))
    for request in (done, failed, running):
        service.tell(request, TOKENS[0])
    service.store.place_result(running, 8192, 0)
    service.finish(done, GENERATED)
    service.finish(failed, error=RunError("no"))
    assert service.http.get(f"/v1/requests/{done}/result").status_code == 200, "it is there for its time"
    wait_until(lambda: not any(files(service.store, done) + files(service.store, failed)))
    for request in (done, failed):
        for path in ("", "/result", "/events"):
            answer = service.http.get(f"/v1/requests/{request}{path}")
            assert answer.status_code == 404 and "kept for some time" in answer.json()["detail"]
    time.sleep(2 * TTL_S)
    assert files(service.store, running) == [True, True], "however old"
    assert service.store.request_path(running).exists()
    service.finish(running, GENERATED)
    assert service.http.get(f"/v1/requests/{running}/result").status_code == 200, "its time begins with its end"


@pytest.mark.parametrize("service", [DEFAULT_RESULT_TTL_S], indirect=True)  # no round of its own takes it
def test_who_follows_a_request_hears_all_of_it_however_slowly_he_reads(
    service: GatewayService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.events, "READ_BYTES", 200)  # an event or two at a time
    store, request = service.store, submit(service)
    service.tell(request, *TOKENS)
    service.finish(request, GENERATED)

    async def read_slowly() -> list[int]:
        waiting = Waiting(store)
        streams = Streams(store, waiting)
        expiry = Expiry(store, streams, ttl_s=0.0)
        heard: list[int] = []
        async for told in streams.follow(request, LOCAL):
            await expiry.round()
            await expiry.round()
            assert files(store, request) == [True, True]
            heard += [json.loads(event.data)["id"] for event in told] if isinstance(told, list) else []
        await expiry.round()  # nobody finds it now
        assert store.status(request) is None and files(store, request) == [True, True]
        await expiry.round()
        assert files(store, request) == [False, False] and not streams.followed
        return heard

    assert asyncio.run(read_slowly()) == [token.id for token in TOKENS]


def test_how_long_is_said_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gateway_settings("s").result_ttl_s == DEFAULT_RESULT_TTL_S
    monkeypatch.setenv("POLYTRACE_RESULT_TTL_S", "3600")
    assert gateway_settings("s").result_ttl_s == 3600
    monkeypatch.setenv("POLYTRACE_RESULT_TTL_S", "1")
    with pytest.raises(UserError, match="at least 60"):
        gateway_settings("s")
