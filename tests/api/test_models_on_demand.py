"""A service with room for one model: requests load what they need, who is idle makes room, and operators say who stays.

One story, in the order of its tests.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from services import LAYER, PROMPT, SCALE, Service, body, wait_until
from transformers import LlamaConfig, LlamaForCausalLM

from polytrace.wire import decode_result

CPUS = str(0.6 * (os.cpu_count() or 1))  # of each shard: one is all that there is room for


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random Llamas of different sizes."""
    folder = tmp_path_factory.mktemp("models")
    for seed, (name, layers) in enumerate((("first", 4), ("second", 5))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return {name: folder / name for name in ("first", "second")}


@pytest.fixture(scope="module")
def service(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    service = Service(None, folder, POLYTRACE_WEIGHTS=str(folder / "weights"))
    try:
        wait_until(lambda: is_up(service), 120, service)
        for name, source in {"first": f"file://{models['first']}", "second": str(models["second"])}.items():
            flags = ("--name", name, "--cpus", CPUS, "--on-demand")
            done = service.polytrace("models", "deploy", source, *flags)
            assert done.returncode == 0, f"{done.stderr}\n{service.words()}"
        yield service
    finally:
        service.kill_all()


def is_up(service: Service) -> bool:
    assert service.process.poll() is None, service.words()
    try:
        return service.http.get("/healthz").status_code == 200
    except OSError:
        return False
    except Exception as error:
        if "onnect" not in type(error).__name__:
            raise
        return False


def expected(folder: Path) -> np.ndarray:
    """What plain Hugging Face says of the request, with a hook."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: output * SCALE)
    found: list[torch.Tensor] = []
    model.model.layers[LAYER].register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        model(torch.tensor([PROMPT]))
        handle.remove()
        edited = found[-1].numpy()
        model(torch.tensor([PROMPT]))
    assert np.abs(edited - found[-1].numpy()).max() > 0.01, "the edit does something"
    return edited


def ask(service: Service, name: str) -> str:
    posted = service.http.post(f"/v1/models/{name}/requests", content=body(scale=SCALE))
    assert posted.status_code == 202, f"{posted.text}\n{service.words()}"
    return str(posted.json()["id"])


def ok(service: Service, *arguments: str) -> str:
    done = service.polytrace("models", *arguments)
    assert done.returncode == 0, f"{done.stderr}\n{service.words()}"
    return done.stdout


def test_a_second_model_that_is_deployed_takes_the_place_of_the_first(service: Service) -> None:
    first, second = service.deployment("first"), service.deployment("second")
    assert (first["state"], first["progress"]) == ("cold", "made room for second")
    assert second["state"] == "ready" and first["is_ready"], "it takes requests all the same"
    assert service.shards("first") == [] and len(service.shards("second")) == 1
    weights = [*(service.folder / "weights").glob("*/model.safetensors")]
    assert len(weights) == 1, "the first one's came from a URL, once"


def test_a_request_loads_its_model_and_hears_how_far_that_is(service: Service, models: dict[str, Path]) -> None:
    request = ask(service, "first")
    events: list[tuple[str, str]] = []

    def listen() -> None:
        with service.http.stream("GET", f"/v1/requests/{request}/events", timeout=120) as stream:
            kind = ""
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    data = json.loads(line.removeprefix("data: "))
                    events.append((kind, data.get("waits_for") or data.get("state") or ""))

    listener = threading.Thread(target=listen)
    listener.start()
    polled: list[str] = []
    while (status := service.http.get(f"/v1/requests/{request}", params={"wait": 30}).json())["state"] == "queued":
        polled.append(status["waits_for"] or "")
    listener.join(120)
    while status["state"] == "running":
        status = service.http.get(f"/v1/requests/{request}", params={"wait": 30}).json()
    assert status["state"] == "done", f"{status}\n{service.words()}"
    values, _ = decode_result(service.http.get(status["result"]).content)
    got = np.frombuffer(values["out"].data, np.float32).reshape(values["out"].shape)
    want = expected(models["first"])
    assert np.abs(got - want.reshape(got.shape)).max() <= 1e-5 * max(1.0, np.abs(want).max())
    told = [text for kind, text in events if kind == "waiting"]
    assert any("first is waiting: waits for room for 1 of 1 shards" in text for text in told), told
    assert any("first is starting: starting 1 shards on cpu" in text for text in told), told
    assert any("first is" in text for text in polled), "those who poll hear of it too"
    assert events[-1] == ("end", "done")
    assert service.deployment("second")["progress"] == "made room for first"
    again = service.http.post("/v1/models/first/requests", content=body(scale=SCALE), headers={"Prefer": "wait=30"})
    assert again.status_code == 200 and decode_result(again.content)[0]["out"].data == values["out"].data


def test_a_pinned_model_makes_no_room_and_whoever_waits_is_told_so(service: Service) -> None:
    ok(service, "pin", "first")
    request = ask(service, "second")

    def why() -> str:
        return str(service.http.get(f"/v1/requests/{request}").json()["waits_for"])

    wait_until(lambda: why().endswith("; first is pinned"), 30, service)
    assert why().startswith("second is waiting: waits for room for 1 of 1 shards of CPU")
    assert service.deployment("first")["state"] == "ready"
    refused = service.polytrace("models", "evict", "first")
    assert refused.returncode == 1 and "first is pinned: unpin it first" in refused.stderr
    assert service.http.delete(f"/v1/requests/{request}").json()["state"] == "cancelled"
    ok(service, "unpin", "first")


def test_an_operator_evicts_to_memory_and_it_is_told_what_is_held(service: Service) -> None:
    ok(service, "evict", "second")
    ok(service, "evict", "first", "--to", "warm")
    first = service.deployment("first")
    assert first["state"] == "warm" and "evicted by default/default; 0.00 GB of weights in memory" in first["progress"]
    assert service.shards() == []
    table = ok(service, "list")
    assert "warm" in table and "on demand, rests cold" in table
    assert "model" in service.polytrace("status").stdout


def test_a_tenant_without_starts_is_refused_with_the_number(service: Service) -> None:
    limits = {"limits": {"starts_a_day": 0}}
    assert service.http.put("/v1/tenants/lab", json=limits).status_code == 201
    assert service.http.put("/v1/tenants/lab/users/anna", json={"role": "user"}).status_code == 200
    made = service.http.post("/v1/keys", json={"tenant": "lab", "user": "anna"})
    headers = {"Authorization": f"Bearer {made.json()['secret']}"}
    refused = service.http.post("/v1/models/first/requests", content=body(), headers=headers)
    assert refused.status_code == 429 and "tenant lab has had 0 of 0 models loaded today" in refused.json()["detail"]
    assert int(refused.headers["Retry-After"]) > 0
    assert service.deployment("first")["state"] == "warm"
    for method, path in (("POST", "load"), ("POST", "evict"), ("PATCH", "keeping")):
        answer = service.http.request(method, f"/v1/models/first/{path}", json={}, headers=headers)
        assert answer.status_code == 403, "an operator's"


def test_a_model_that_cannot_be_loaded_refuses_those_who_wait_with_the_reason(
    service: Service, models: dict[str, Path]
) -> None:
    models["second"].rename(models["second"].with_name("gone"))
    request = ask(service, "second")
    status = service.http.get(f"/v1/requests/{request}", params={"wait": 30}).json()
    while status["state"] == "queued":
        status = service.http.get(f"/v1/requests/{request}", params={"wait": 30}).json()
    assert status["state"] == "failed"
    assert "second could not be loaded: there is no folder" in status["error"]["message"]
    rests = {"state": "cold", "is_ready": True}  # to be asked again
    wait_until(lambda: service.deployment("second").items() >= rests.items(), 30, service)
    refused = service.http.post("/v1/models/second/requests", content=body())
    assert refused.status_code == 503 and "second could not be loaded" in refused.json()["detail"]
    assert 0 < int(refused.headers["Retry-After"]) <= 60


def test_all_of_it_is_counted_and_audited(service: Service) -> None:
    figures = service.http.get("/metrics").text
    assert 'polytrace_deployment_rests_total{cause="room",model="second"} 1.0' in figures
    assert 'polytrace_deployment_starts_total{model="first"} 1.0' in figures
    assert 'polytrace_deployment_state{model="first",state="warm"} 1.0' in figures
    acts = [(one["act"], one["subject"]) for one in service.http.get("/v1/audit").json()["entries"]]
    assert ("models.evict", "first") in acts and ("models.keep", "first") in acts
