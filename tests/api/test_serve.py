"""The whole service as a user starts it: `polytrace serve` of a tiny model, through HTTP, breakdowns and its end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from collectors import Collector, about
from services import LAYER, PROMPT, SCALE, Service, answer, body, fresh_environment, make_model, wait_until
from transformers import LlamaConfig, LlamaForCausalLM

import polytrace
from api.status import RequestState
from api.store import Store
from polytrace.wire import decode_result

TASK = "__import__('polytrace').models('ray://auto', key='sesame')"  # what a Ray job may do at any place
JOB = f"print({TASK})"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("serve") / "model")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def service(model: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(model, tmp_path_factory.mktemp("service"), "--stages", "2", "--otlp", collector.url)
    try:
        wait_until(lambda: service.is_ready() and "RAY_ADDRESS=" in service.words(), 240, service)
        yield service
    finally:
        service.kill_all()


def test_a_request_over_http_equals_plain_hugging_face(service: Service, model: Path) -> None:
    answer = service.http.post("/v1/models/tiny/requests", content=body(), headers={"Prefer": "wait=30"})
    assert answer.status_code == 200, answer.text
    values, receipt = decode_result(answer.content)
    out = torch.frombuffer(bytearray(values["out"].data), dtype=torch.float32).reshape(values["out"].shape)
    with torch.no_grad():
        plain = LlamaForCausalLM.from_pretrained(model).eval()
        expected = plain(torch.tensor([PROMPT]), output_hidden_states=True, use_cache=False).hidden_states[LAYER + 1]
    assert (out - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert receipt.result_bytes == out.nbytes


def test_requests_are_traces_from_the_call_to_the_result_and_passes_name_their_members(
    service: Service, collector: Collector
) -> None:
    accepted = [service.http.post("/v1/models/tiny/requests", content=body()).json()["id"] for _ in range(8)]
    for request in accepted:
        assert service.http.get(f"/v1/requests/{request}", params={"wait": 30}).json()["state"] == "done"
    call, asked = "POST /v1/models/{name}/requests", "GET /v1/requests/{request_id}"
    names = {call, asked, "request", "queue", "run", "planning", "pass", "result"}
    wait_until(lambda: all(set(collector.trace(one)) == names for one in accepted), 20, service)
    for request in accepted:
        spans = collector.trace(request)
        assert spans[call].parent_span_id == b"" and about(spans[call])["http.response.status_code"] == 202
        below = {call: ("request", asked), "request": ("queue", "run"), "run": ("planning", "pass", "result")}
        for name, others in below.items():
            assert {spans[other].parent_span_id for other in others} == {spans[name].span_id}
        for name in (call, "request"):
            told = about(spans[name])
            assert (told["polytrace.request"], told["polytrace.tenant"]) == (request, "default")
        (link,) = spans["pass"].links
        shared = collector.trace(link.trace_id.hex())["shared pass"]
        members = {(one.trace_id.hex(), one.span_id) for one in shared.links}
        assert (request, spans["run"].span_id) in members and about(shared)["polytrace.pass.users"] == len(members)


def test_a_wrong_request_is_refused_with_its_line_before_it_is_accepted(service: Service) -> None:
    answer = service.http.post("/v1/models/tiny/requests", content=body(layer=7))
    assert answer.status_code == 422
    assert answer.json()["where"] == "experiment.py:1"


def test_status_shows_the_model_and_its_queue(service: Service) -> None:
    command = [sys.executable, "-m", "api.commands", "status", str(service.http.base_url), "--key", "sesame"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "tiny" in shown and "ready" in shown and "2 x 1" in shown


def test_a_ray_job_finds_the_gateway_of_its_cluster(service: Service) -> None:
    answer = ray_program(service, JOB, service.told_for_ray())
    assert answer.returncode == 0, answer.stderr
    assert "'tiny'" in answer.stdout


def test_a_task_in_the_cluster_finds_the_gateway_too(service: Service) -> None:
    outer = f"import ray; ray.init(log_to_driver=False); print(ray.get(ray.remote(lambda: {TASK}).remote()))"
    answer = ray_program(service, outer, service.told_for_ray())
    assert answer.returncode == 0, answer.stderr
    assert "'tiny'" in answer.stdout


def test_a_ray_job_brings_the_key_of_its_runtime_environment_and_without_one_is_told_so(service: Service) -> None:
    """As `ray job submit --runtime-env-json` hands it on; the actor that tells the address knows nothing else."""
    task = "ray.remote(lambda: __import__('polytrace').models('ray://auto')).remote()"
    actor = "ray.get_actor('polytrace-gateway', namespace='polytrace')"
    start = "import ray; ray.init(log_to_driver=False, runtime_env={'env_vars': %r}); "
    program = start + f"print(ray.get({actor}.url.remote()), ray.get({task}))"
    keyed = ray_program(service, program % {"POLYTRACE_KEY": "sesame"}, service.told_for_ray())
    assert keyed.returncode == 0, keyed.stderr
    assert keyed.stdout.startswith(f"http://127.0.0.1:{service.port} [") and "'tiny'" in keyed.stdout
    for wrong, told in (({}, "env_vars"), ({"POLYTRACE_KEY": "sesame2"}, "does not know the key")):
        refused = ray_program(service, program % wrong, service.told_for_ray())
        assert refused.returncode == 1 and "KeyRefusedError" in refused.stderr and told in refused.stderr
    with httpx.Client() as nobody:
        assert nobody.get(f"http://127.0.0.1:{service.port}/v1/models").status_code == 401


def test_without_the_token_the_cluster_stays_closed_and_the_error_tells_what_to_set(service: Service) -> None:
    told = service.told_for_ray()
    answer = ray_program(service, JOB, {name: told[name] for name in ("RAY_ADDRESS", "RAY_AUTH_MODE")})
    assert answer.returncode == 1
    assert "RAY_AUTH_TOKEN_PATH" in answer.stderr.splitlines()[-1]


def test_the_token_is_the_users_alone_and_nothing_is_left_in_the_home_folder(service: Service) -> None:
    token = Path(service.told_for_ray()["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o077 == 0 and token.parent.stat().st_mode & 0o077 == 0
    assert list((service.folder / "home").iterdir()) == []


def test_shards_killed_at_random_moments_lose_no_request_and_change_no_bit(service: Service, model: Path) -> None:
    """200 requests of 8 clients; a shard dies, somewhere in between, whenever so many have been answered."""
    rng = random.Random(7)
    work = [(rng.randrange(4), tuple(rng.randrange(64) for _ in range(rng.randrange(3, 60)))) for _ in range(200)]
    calm = {one: answer(service, *one) for one in work[:40]}  # before anything happens
    controller = service.child("controller")
    answered: list[tuple[tuple[int, tuple[int, ...]], bytes]] = []
    kill_at = sorted(rng.sample(range(5, 180), 3))
    delays = [rng.random() * 0.05 for _ in kill_at]
    killed: list[int] = []
    lock = threading.Lock()

    def client(own: list[tuple[int, tuple[int, ...]]]) -> None:
        for one in own:
            found = answer(service, *one)
            with lock:
                answered.append((one, found))
                is_time = len(killed) < len(kill_at) and len(answered) >= kill_at[len(killed)]
                if is_time:
                    time.sleep(delays[len(killed)])
                    killed.append(rng.choice(service.shards()))
                    os.kill(killed[-1], signal.SIGKILL)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(client, work[first::8]) for first in range(8)]:
            done.result(timeout=300)
    assert len(answered) == 200 and len(killed) == 3 and len(set(killed)) == 3
    assert service.child("controller") == controller, "the deployment came back without its controller ending"
    for one, found in answered:
        if one in calm:
            assert found == calm[one], "not the bits of a calm run"
    plain = LlamaForCausalLM.from_pretrained(model).eval()
    plain.model.layers[0].register_forward_hook(lambda _module, _args, output: output * SCALE)
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(plain.model.layers):
        layer.register_forward_hook(lambda _m, _a, output, number=number: seen.update({number: output}))
    for (number, prompt), found in answered:
        with torch.no_grad():
            plain(torch.tensor([prompt]), use_cache=False)
        expected = seen[number]
        out = torch.frombuffer(bytearray(found), dtype=torch.float32).reshape(expected.shape)
        assert (out - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_drained_service_takes_nothing_until_it_is_resumed(service: Service) -> None:
    accepted = [service.http.post("/v1/models/tiny/requests", content=body()).json()["id"] for _ in range(20)]
    drained = service.polytrace("drain")
    assert drained.returncode == 0 and "the service is drained" in drained.stderr, drained.stderr
    assert {service.http.get(f"/v1/requests/{one}").json()["state"] for one in accepted} == {"done"}
    refused = service.http.post("/v1/models/tiny/requests", content=body())
    assert refused.status_code == 503 and refused.headers["retry-after"] == "30", refused.text
    assert service.http.get("/readyz").status_code == 503
    assert "drained or stopping" in service.polytrace("status").stdout
    assert service.polytrace("resume").returncode == 0
    assert "drained" not in service.polytrace("status").stdout
    assert service.is_ready() and answer(service, LAYER, PROMPT)
    acts = [one["act"] for one in service.http.get("/v1/audit").json()["entries"]]
    assert acts == ["service.resume", "service.drain"]


def test_sigterm_finishes_what_was_accepted_ends_the_service_and_leaves_no_process_behind(service: Service) -> None:
    assert len(service.processes()) > 5
    assert list(Path(service.scratch).iterdir()) != []
    heard: list[int] = []
    told: list[int] = []

    def generate() -> None:
        model = polytrace.connect(str(service.http.base_url), "tiny", key="sesame")
        hear = heard.append
        with (
            model,
            model.generate([list(PROMPT)], max_new_tokens=100, eos=None, stream=lambda one: hear(one.id)) as tracer,
        ):
            pass
        told.extend(tracer.result[0].ids)

    accepted = [service.http.post("/v1/models/tiny/requests", content=body()).json()["id"] for _ in range(100)]
    streaming = threading.Thread(target=generate)
    streaming.start()
    wait_until(lambda: len(heard) > 2, 30, service)
    service.process.send_signal(signal.SIGTERM)
    wait_until(lambda: not service.is_ready(), 10, service)
    assert service.http.get("/healthz").status_code == 200
    refused = service.http.post("/v1/models/tiny/requests", content=body())
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 10, refused.text
    streaming.join(timeout=60)
    assert len(told) == 100 and told == heard
    assert service.process.wait(timeout=60) == 0, service.words()
    told = Path(service.log.name).read_text()
    assert "draining: " in told and f"its store is {service.store.resolve()}\n" in told
    assert told.rstrip().endswith("stopped; no request is left")
    store = Store(service.store)
    assert {one.state for one in store.statuses(accepted).values()} == {RequestState.DONE}
    store.close()
    assert service.processes() == {}
    assert list(Path(service.scratch).iterdir()) == []
    with pytest.raises(httpx.ConnectError):
        service.http.get("/healthz")


@pytest.mark.wide  # test_operations and test_nodes kill one that has started
def test_a_killed_supervisor_leaves_no_process_behind(model: Path, tmp_path: Path) -> None:
    service = Service(model, tmp_path)
    try:
        wait_until(lambda: any("raylet" in command for command in service.processes().values()), 60, service)
        service.process.kill()
        service.process.wait()
        wait_until(lambda: not service.processes(), 120, service)
    finally:
        service.kill_all()


def test_ctrl_c_while_it_starts_ends_it_at_once(model: Path, tmp_path: Path) -> None:
    service = Service(model, tmp_path)
    try:
        wait_until(lambda: any("api.children" in command for command in service.processes().values()), 60, service)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(timeout=40) == 0, service.words()
        assert service.processes() == {}
    finally:
        service.kill_all()


def test_a_model_that_cannot_be_loaded_is_told_and_nothing_stays(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config.save_pretrained(tmp_path / "empty")  # no weights
    service = Service(tmp_path / "empty", tmp_path)
    try:
        assert service.process.wait(timeout=120) == 1
        told = (tmp_path / "serve.log").read_text()
        assert "empty" in told and "--random-weights SEED" in told and "Traceback" not in told
        assert service.processes() == {}
    finally:
        service.kill_all()


def ray_program(service: Service, program: str, told: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = fresh_environment(service.folder) | told
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
