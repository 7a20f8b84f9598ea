"""Events of generations: in a file while they run, and over HTTP as they come, without a gap and none twice."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateways import GENERATED, TOKENS, Agreeable, GatewayService, description_of_nothing, events_of, submit, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import api.event_routes
import api.events
from api.events import EventLog
from api.status import RequestState
from polytrace.certificate import Token
from polytrace.codec import from_json
from polytrace.errors import RunError, UserError
from scheduling.plan import RequestId

MINE = RequestId("ab" * 16)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayService]:
    service = GatewayService(tmp_path_factory.mktemp("events") / "store", Agreeable(), description_of_nothing())
    yield service
    service.close()


def told(log: EventLog, after: int = 0) -> list[Token]:
    events = []
    while some := log.read(MINE, after):
        events += some
        after = some[-1].id
    return [from_json(Token, json.loads(event.data)) for event in events]


@given(
    st.lists(st.integers(0, len(TOKENS)), min_size=1, max_size=6),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.integers(0, 60),
)
@settings(max_examples=40, deadline=None)
def test_tokens_stand_once_and_in_order_however_often_it_begins_again(
    tmp_path_factory: pytest.TempPathFactory, stops: list[int], is_new: list[bool], torn: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = EventLog(folder)
    for stop, has_new_writer in zip(stops, is_new, strict=False):
        for token in TOKENS[:stop]:
            log.append(MINE, [token])
        if has_new_writer:
            log = EventLog(folder)
            if log.path(MINE).exists():
                with log.path(MINE).open("ab") as file:
                    file.write(b'token {"invoke":0,"sequence":0,"step":99,"id":1,"likeliest":[[1,-1.0]]}'[:torn])
    log.complete(MINE, GENERATED)
    assert told(log) == TOKENS
    for event in log.read(MINE):
        assert told(log, event.id) == TOKENS[len(TOKENS) - len(told(log, event.id)) :]


def test_a_place_inside_of_an_event_is_no_id(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(MINE, TOKENS)
    first = log.read(MINE)[0].id
    for wrong in (1, first - 1, first + 1):
        with pytest.raises(UserError, match=f"has the id {wrong}"):
            log.read(MINE, wrong)


def test_what_a_full_disk_did_not_take_comes_at_the_end(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.append(MINE, TOKENS[:2])
    log.path(MINE).chmod(0o400)
    kept, hidden = log.path(MINE), tmp_path / "hidden"
    kept.rename(hidden)
    kept.mkdir()  # a folder cannot be appended to, whoever one is
    log.append(MINE, TOKENS[2:3])
    kept.rmdir()
    hidden.chmod(0o600)
    hidden.rename(kept)
    log.append(MINE, TOKENS[3:])  # there is a gap before these of one sequence
    log.complete(MINE, GENERATED)
    assert sorted(map(repr, told(log))) == sorted(map(repr, TOKENS))
    for sequence in (0, 1):
        steps = [token.step for token in told(log) if token.sequence == sequence]
        assert steps == sorted(set(steps))


def test_a_value_stands_once(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    value = {"name": "h@3", "dtype": "float32", "shape": [1], "data": "AACAPw==", "range": [0, 4]}
    log.append(MINE, [], [value])
    log.append(MINE, [], [value])
    EventLog(tmp_path).append(MINE, [], [value])
    assert [event.kind for event in log.read(MINE)] == ["value"]


def test_values_beyond_what_a_file_takes_are_told_by_their_place_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.events, "MAX_DATA_BYTES", 20)
    values = [
        {"name": f"h@{step}", "dtype": "float32", "shape": [1], "data": "AACAPw==", "range": [4 * step, 4 * step + 4]}
        for step in range(3)
    ]
    log = EventLog(tmp_path)
    log.append(MINE, [], values[:1])
    log = EventLog(tmp_path)  # it counts what stands there
    log.append(MINE, [], values)
    told = [json.loads(event.data) for event in log.read(MINE)]
    assert [(value["name"], value.get("data"), value.get("range")) for value in told] == [
        ("h@0", "AACAPw==", None),
        ("h@1", "AACAPw==", None),
        ("h@2", None, [8, 12]),
    ]


def test_tokens_come_over_http_as_they_are_told_and_the_end_says_how_it_ended(service: GatewayService) -> None:
    request = submit(service)
    with service.http.stream("GET", f"/v1/requests/{request}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.iter_lines()
        service.tell(request, *TOKENS[:2])
        assert [data["id"] for _, _, data in events_of(list(itertools.islice(lines, 8)))] == [5, 8]  # before it ends
        service.finish(request, GENERATED)
        rest = events_of(list(lines))
    assert [kind for _, kind, _ in rest] == ["token"] * 3 + ["end"]
    assert rest[-1][2]["state"] == "done" and rest[-1][2]["id"] == request


def test_a_stream_goes_on_behind_any_event_and_nothing_comes_twice(service: GatewayService) -> None:
    request = submit(service)
    service.tell(request, *TOKENS[:3])
    service.finish(request, GENERATED)
    everything = events(service, request)
    assert len(everything) == len(TOKENS) + 1
    for place, (number, _, _) in enumerate(everything[:-1]):
        assert events(service, request, number) == everything[place + 1 :]
    over = service.http.get(f"/v1/requests/{request}/events", headers={"Last-Event-ID": everything[-1][0]})
    assert over.status_code == 204
    for wrong in ("3", "x", "-1", "9" * 30):
        answer = service.http.get(f"/v1/requests/{request}/events", headers={"Last-Event-ID": wrong})
        assert answer.status_code == 400, wrong
    assert "it lies inside of one" in refusal_of(service, request, 3)
    assert service.http.get("/v1/requests/00/events").status_code == 404


def test_an_id_beyond_the_last_event_is_refused_and_never_waited_for(service: GatewayService) -> None:
    request = submit(service)
    assert "it has none yet" in refusal_of(service, request, 1)
    service.tell(request, *TOKENS[:2])
    end = service.store.events.path(request).stat().st_size
    assert f"the last one so far ends at {end}" in refusal_of(service, request, end + 1)
    service.finish(request, GENERATED)
    last = service.store.events.path(request).stat().st_size
    assert f"the last one so far ends at {last}" in refusal_of(service, request, last + 100)
    assert [kind for _, kind, _ in events(service, request, str(last))] == ["end"], (
        "behind the last one there is the end"
    )


def refusal_of(service: GatewayService, request: RequestId, event: int) -> str:
    answer = service.http.get(f"/v1/requests/{request}/events", headers={"Last-Event-ID": str(event)})
    assert answer.status_code == 400
    return str(answer.json()["detail"])


def test_a_request_that_fails_or_is_cancelled_ends_its_stream_with_the_reason(service: GatewayService) -> None:
    failing, unwanted = submit(service), submit(service)
    service.tell(failing, TOKENS[0])
    service.finish(failing, error=RunError("index 9 is out of range", where="mine.py:3"))
    *_, (_, kind, status) = events(service, failing)
    assert kind == "end" and status["state"] == "failed" and status["error"]["where"] == "mine.py:3"
    service.http.delete(f"/v1/requests/{unwanted}")
    assert service.store.cancellations("m") == [unwanted]


def test_who_leaves_and_asked_for_it_has_time_to_come_back_before_it_is_cancelled(
    service: GatewayService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.event_routes, "GRACE_S", 0.3)
    stays, left = submit(service), submit(service)
    for request, wish in ((stays, False), (left, True)):
        url = f"/v1/requests/{request}/events"
        service.tell(request, TOKENS[0])
        with service.http.stream("GET", url, params={"cancel_on_disconnect": wish}) as stream:
            next(stream.iter_lines())
    with service.http.stream("GET", f"/v1/requests/{left}/events", params={"cancel_on_disconnect": True}) as stream:
        lines = stream.iter_lines()
        next(lines)  # it is back
        time.sleep(0.5)
        assert left not in service.store.cancellations("m")
    wait_until(lambda: service.store.cancellations("m")[-1:] == [left])
    assert stays not in service.store.cancellations("m")


def test_events_of_a_request_that_is_open_or_done_outlive_the_service(tmp_path: Path) -> None:
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing())
    done, running, failed = (submit(service) for _ in range(3))
    for request in (done, running, failed):
        service.tell(request, TOKENS[0])
    service.finish(done, GENERATED)
    service.finish(failed, error=RunError("no"))
    service.close()
    again = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing())
    again.store.requeue("m", is_clean=True)
    again.store.sweep()
    assert [again.store.events.path(one).exists() for one in (done, running, failed)] == [True, True, False]
    number, _, _ = events(again, done)[0]
    assert again.claim() == running
    again.tell(running, *TOKENS[:2])  # from its beginning
    again.finish(running, GENERATED)
    assert [data["id"] for _, kind, data in events(again, running, number) if kind == "token"] == [8, 6, 2, 7]
    again.close()


def test_the_state_in_the_database_does_not_change_with_every_token(service: GatewayService) -> None:
    request = submit(service)
    for passes_done, token in enumerate(TOKENS, 1):  # within NOTE_S
        service.tell(request, token, passes_done=passes_done)
    status = service.store.status(request)
    assert status is not None and status.state is RequestState.RUNNING
    assert status.passes_done == 1
    service.finish(request, GENERATED)


def events(service: GatewayService, request: RequestId, after: str | None = None) -> list[tuple[str, str, Any]]:
    headers = {} if after is None else {"Last-Event-ID": after}
    answer = service.http.get(f"/v1/requests/{request}/events", headers=headers)
    assert answer.status_code == 200, answer.text
    return events_of(answer.text.splitlines())
