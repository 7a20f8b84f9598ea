"""Several deployments with replicas on one service: operated by command while requests run, through breakdowns."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from services import PROMPT, Service, answer, body, make_model, wait_until

import polytrace
from polytrace.certificate import Token

WORK = [(layer, tuple(range(1 + layer, 9 + layer + length))) for layer in range(4) for length in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("operations") / "model")


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(model, tmp_path_factory.mktemp("service"), "--cpus", "0.1")
    try:
        wait_until(service.is_ready, 240, service)
        yield service
    finally:
        service.kill_all()


@pytest.fixture(scope="module")
def calm(service: Service) -> list[bytes]:
    """What the one deployment with its one replica answers while nothing happens."""
    return [answer(service, *one) for one in WORK]


class Client(threading.Thread):
    """A researcher who goes on asking one deployment, and looks at every answer."""

    def __init__(self, service: Service, calm: list[bytes]) -> None:
        super().__init__(daemon=True)
        self.service, self.calm = service, calm
        self.is_over = False
        self.num_answered = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.is_over:
                place = self.num_answered % len(WORK)
                assert answer(self.service, *WORK[place]) == self.calm[place]
                self.num_answered += 1
        except BaseException as error:  # noqa: BLE001  told by `end`
            self.failure = error

    def end(self) -> None:
        self.is_over = True
        self.join(timeout=120)
        assert self.failure is None and self.num_answered > 0, self.failure


def all_answers(service: Service, name: str = "tiny") -> list[bytes]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda one: answer(service, *one, name), WORK))


def ok(service: Service, *arguments: str) -> str:
    done = service.polytrace(*arguments)
    assert done.returncode == 0, f"{done.stderr}\n{service.words()}"
    return done.stdout + done.stderr


def test_another_deployment_loads_while_the_first_one_answers_and_both_give_the_same_bits(
    service: Service, model: Path, calm: list[bytes]
) -> None:
    client = Client(service, calm)
    client.start()
    ok(service, "deploy", str(model), "--name", "other", "--stages", "2", "--cpus", "0.1")
    client.end()
    assert len(service.shards("tiny")) == 1 and len(service.shards("other")) == 2
    assert all_answers(service, "other") == calm
    refused = service.polytrace("deploy", str(model), "--name", "other", "--stages", "4")
    assert refused.returncode == 1 and "on 2 x 1 shards" in refused.stderr
    assert "`polytrace deploy other` has it serve as it is" in refused.stderr


def test_a_deployment_that_does_not_fit_says_what_it_waits_for_and_holds_nobody_up(
    service: Service, model: Path, calm: list[bytes]
) -> None:
    ok(service, "deploy", str(model), "--name", "huge", "--stages", "2", "--cpus", "64", "--no-wait")
    wait_until(lambda: service.deployment("huge")["state"] == "waiting", 60, service)
    assert "waits for room for 2 of 2 shards of CPU 64 each; free are CPU" in service.deployment("huge")["progress"]

    def told() -> str:
        return str(service.http.post("/v1/models/huge/requests", content=body()).json()["detail"])

    wait_until(lambda: "waits for room" in told(), 60, service)  # the gateway hears of it a moment later
    assert all_answers(service) == calm
    ok(service, "remove", "huge")
    assert service.deployment("huge") == {}


def test_a_model_that_is_none_fails_alone_and_says_why(service: Service, calm: list[bytes], tmp_path: Path) -> None:
    failed = service.polytrace("deploy", str(tmp_path), "--name", "none")
    assert failed.returncode == 1 and "none is failed" in failed.stderr and str(tmp_path) in failed.stderr
    assert all_answers(service) == calm
    ok(service, "remove", "none")


def test_a_second_replica_loads_while_the_first_one_answers_and_takes_over_when_that_is_lost(
    service: Service, calm: list[bytes]
) -> None:
    client = Client(service, calm)
    client.start()
    before = set(service.shards("tiny"))
    ok(service, "resize", "tiny", "--replicas", "2")
    (second,) = set(service.shards("tiny")) - before
    assert service.replicas() == {0: "ready", 1: "ready"}
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: service.replicas()[1] == "recovering", 60, service)
    assert service.deployment()["state"] == "ready"
    assert all_answers(service) == calm
    assert service.replicas()[1] == "recovering", "the other one answered meanwhile"
    wait_until(lambda: service.replicas() == {0: "ready", 1: "ready"}, 120, service)
    client.end()


def test_requests_are_spread_over_replicas_and_survive_the_death_of_both(service: Service, calm: list[bytes]) -> None:
    others = service.shards("other")
    clients = [Client(service, calm) for _ in range(6)]
    for client in clients:
        client.start()
    wait_until(lambda: all(one["requests"] > 0 for one in service.deployment()["replicas"]), 60, service)
    first, second = service.shards("tiny")
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: "recovering" in service.replicas().values(), 60, service)
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: service.deployment()["state"] == "recovering", 60, service)
    wait_until(lambda: set(service.replicas().values()) == {"ready"}, 180, service)
    for client in clients:
        client.end()
    assert service.shards("other") == others, "the other deployment has lost nothing"


def test_a_replica_that_is_one_too_many_ends_while_the_other_answers(service: Service, calm: list[bytes]) -> None:
    client = Client(service, calm)
    client.start()
    ok(service, "resize", "tiny", "--replicas", "1")
    client.end()
    assert service.replicas() == {0: "ready"}
    wait_until(lambda: len(service.shards("tiny")) == 1, 30, service)


def test_a_stream_of_tokens_loses_and_repeats_nothing_when_the_gateway_and_the_shard_die(service: Service) -> None:
    deaths: list[int] = []

    def kill(process: int | None) -> None:
        assert process is not None
        os.kill(process, signal.SIGKILL)
        deaths.append(process)

    def generated(*, is_calm: bool) -> tuple[list[int], list[Token]]:
        heard: list[Token] = []

        def hear(token: Token) -> None:
            heard.append(token)
            if not is_calm and token.step == 5:
                kill(service.child("gateway"))
            if not is_calm and token.step == 20:
                kill(service.shards("tiny")[0])

        with (
            polytrace.connect(str(service.http.base_url), "tiny", key="sesame") as model,
            model.generate([list(PROMPT)], max_new_tokens=100, eos=None, stream=hear) as tracer,
        ):
            model.model.layers[2].output[0][:] *= 2
        return list(tracer.result[0].ids), heard

    expected, _ = generated(is_calm=True)
    ids, heard = generated(is_calm=False)
    assert len(deaths) == 2
    assert ids == expected == [token.id for token in heard]
    assert [token.step for token in heard] == [*range(100)]
    wait_until(service.is_ready, 60, service)


def test_a_drained_deployment_takes_nothing_new_and_serves_again_with_the_shards_that_it_has(
    service: Service, model: Path, calm: list[bytes]
) -> None:
    others = service.shards("other")

    def serves_again() -> None:
        wait_until(lambda: service.is_ready("other"), 30, service)
        assert all_answers(service, "other") == calm
        assert service.shards("other") == others and service.deployment("other")["state"] == "ready"

    assert "drained: it takes no requests until `polytrace resume other`" in ok(service, "drain", "other")
    assert service.deployment("other")["state"] == "drained"
    refused = service.http.post("/v1/models/other/requests", content=body())
    assert refused.status_code == 503 and "`polytrace resume other`" in refused.json()["detail"]
    assert all_answers(service) == calm
    told = ok(service, "resume")
    assert "the service takes requests" in told and "`polytrace resume other`" in told, told
    assert service.deployment("other")["state"] == "drained"
    refused = service.polytrace("deploy", str(model), "--name", "other", "--stages", "1")
    assert refused.returncode == 1 and "`polytrace resume other` has it serve as it is" in refused.stderr
    assert "ready" in ok(service, "resume", "other")
    serves_again()
    assert "drained" not in ok(service, "resume")
    for again in (("other",), (str(model), "--name", "other")):  # what is not said stays as it was
        ok(service, "drain", "other")
        assert ") on 1 x 2 x 1 shards; it keeps stages 2" in ok(service, "deploy", *again)
        serves_again()
    assert service.deployment("other")["spec"]["cpus"] == 0.1


def test_a_new_controller_brings_everything_back_finishes_what_was_accepted_and_leaves_no_old_shard(
    service: Service, calm: list[bytes]
) -> None:
    ok(service, "resize", "tiny", "--replicas", "2")
    before, controller = set(service.shards()), service.child("controller")
    assert controller is not None and len(before) == 4
    os.kill(controller, signal.SIGSTOP)  # it can claim nothing any more
    accepted = service.http.post("/v1/models/other/requests", content=body()).json()
    os.kill(controller, signal.SIGKILL)
    wait_until(lambda: service.child("controller") not in (controller, None), 60, service)
    wait_until(lambda: not before & set(service.shards()), 30, service)
    wait_until(
        lambda: len(service.shards()) == 4, 240, service
    )  # until there are new ones the last controller's word stands
    wait_until(lambda: set(service.replicas().values()) == {"ready"} and len(service.replicas()) == 2, 240, service)
    wait_until(lambda: service.is_ready("tiny") and service.is_ready("other"), 240, service)
    status = service.http.get(f"/v1/requests/{accepted['id']}", params={"wait": 30}).json()
    assert status["state"] == "done", status
    assert all_answers(service) == calm and all_answers(service, "other") == calm


def test_a_deployment_that_is_removed_now_refuses_what_it_has_and_its_shards_end(
    service: Service, calm: list[bytes]
) -> None:
    ok(service, "deploy", str(service.deployment()["spec"]["source"]), "--name", "third", "--cpus", "0.1")
    (shard,) = service.shards("third")
    os.kill(shard, signal.SIGSTOP)  # nothing of this will ever end
    accepted = [service.http.post("/v1/models/third/requests", content=body()).json()["id"] for _ in range(5)]
    ok(service, "remove", "third", "--now")
    for request in accepted:
        refused = service.http.get(f"/v1/requests/{request}/result")
        assert refused.status_code == 503 and "third was removed" in refused.json()["detail"]
    wait_until(lambda: service.shards("third") == [], 30, service)
    assert all_answers(service) == calm


def test_a_killed_supervisor_leaves_no_process_and_its_store_has_all_that_the_next_service_needs(
    service: Service, calm: list[bytes]
) -> None:
    ok(service, "remove", "other")
    service.process.kill()
    service.process.wait()
    wait_until(lambda: not service.processes(), 60, service)
    again = Service(None, service.folder)
    try:
        wait_until(again.is_ready, 240, again)
        wait_until(lambda: again.replicas() == {0: "ready", 1: "ready"}, 240, again)
        assert all_answers(again) == calm
        accepted = [again.http.post("/v1/models/tiny/requests", content=body()).json()["id"] for _ in range(20)]
        ok(again, "remove", "tiny")
        assert {again.http.get(f"/v1/requests/{one}").json()["state"] for one in accepted} == {"done"}
        assert again.deployment() == {} and again.http.get("/readyz").status_code == 503
        wait_until(lambda: again.shards() == [], 30, again)
    finally:
        again.kill_all()
