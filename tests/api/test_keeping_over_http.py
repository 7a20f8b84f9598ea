"""A whole service of two stages: constants uploaded once, kept values, states, and what a breakdown leaves of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from services import PROMPT, Service, make_model, wait_until
from transformers import LlamaForCausalLM

import polytrace
from api.identity import LOCAL
from polytrace.contents import digest_of
from polytrace.errors import NotFoundError, RunError, TooLargeError
from polytrace.wire import content_header

HIDDEN, FEATURES = 32, 4096  # of the model, and of a dictionary: 512 KiB a matrix
QUOTA = 4 << 20
TOLERANCE = 1e-5  # float32, of max(1, max|plain|)
IDS = [list(PROMPT)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("keeping") / "model")


@pytest.fixture(scope="module")
def service(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    scratch = tmp_path_factory.mktemp("service")
    service = Service(folder, scratch, "--stages", "2", POLYTRACE_QUOTA_BYTES=str(QUOTA))
    try:
        wait_until(service.is_ready, 240, service)
        yield service
    finally:
        service.kill_all()


def connect(service: Service) -> Any:
    return polytrace.connect(str(service.http.base_url), "tiny", key="sesame")


@pytest.fixture
def model(service: Service) -> Iterator[Any]:
    with connect(service) as model:
        yield model


def uploads(model: Any) -> list[str]:
    """Fills with what is uploaded from now on."""
    seen: list[str] = []

    def note(request: httpx.Request) -> None:
        if request.method == "PUT":
            seen.append(request.url.path)

    model.backend._client.event_hooks["request"].append(note)
    return seen


def hidden_of(folder: Path, layer: int) -> torch.Tensor:
    plain = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        states = plain(torch.tensor(IDS), output_hidden_states=True).hidden_states
    found: torch.Tensor = states[layer + 1]
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))


def encode(model: Any, sae: torch.Tensor, layer: int = 2) -> tuple[torch.Tensor, Any]:
    with model.trace(IDS) as tracer:
        features = torch.relu(model.model.layers[layer].output[0] @ sae).save()
    return features, tracer.receipt


def test_a_dictionary_is_uploaded_once_and_stays_on_the_shard_that_uses_it(model: Any, folder: Path) -> None:
    sae = torch.randn(HIDDEN, FEATURES, generator=torch.Generator().manual_seed(1))
    seen = uploads(model)
    first, receipt = encode(model, sae)
    assert len(seen) == 1 and receipt.loaded_bytes == sae.nbytes  # by one stage of the two
    again, receipt = encode(model, sae.clone())
    assert len(seen) == 1 and receipt.loaded_bytes == 0
    assert torch.equal(first, again) and close(first, torch.relu(hidden_of(folder, 2) @ sae))
    with polytrace.load(str(folder), threads=1) as local:
        assert torch.equal(encode(local, sae)[0], first)
    elsewhere, receipt = encode(model, sae, layer=0)  # on the other stage
    assert len(seen) == 1 and receipt.loaded_bytes == sae.nbytes
    sae.data[0, 0] += 100.0  # not counted by torch
    changed, _ = encode(model, sae)
    assert len(seen) == 2 and close(changed, torch.relu(hidden_of(folder, 2) @ sae))
    assert not close(changed, first) and not close(elsewhere, first)


def test_nobody_notices_that_a_dictionary_was_purged(model: Any, service: Service) -> None:
    sae = torch.randn(HIDDEN, FEATURES)
    seen = uploads(model)
    first, _ = encode(model, sae)
    for number in range(QUOTA // (512 << 10)):
        assert put(service, bytes([number]) * (512 << 10)).status_code == 201
    again, _ = encode(model, sae)
    assert len(seen) == 2 and seen[0] == seen[1] and torch.equal(first, again)


def put(service: Service, data: bytes, **more: Any) -> httpx.Response:
    file = content_header("uint8", (len(data),)) + data
    digest = digest_of("uint8", [len(data)], data)
    return service.http.put(f"/v1/constants/{more.get('digest', digest)}", content=more.get("content", file))


def test_uploads_are_checked_before_and_after(service: Service) -> None:
    other = "ab" * 32
    answers = {
        "another hash": put(service, b"data", digest=other),
        "no hash": put(service, b"data", digest="readme"),
        "no content": put(service, b"data", content=b"nonsense"),
        "no length": put(service, b"data", content=iter([b"x"])),
        "too large": put(service, bytes(QUOTA)),
    }
    statuses = {name: answer.status_code for name, answer in answers.items()}
    assert statuses == {name: 413 if name == "too large" else 400 for name in answers}
    asked = service.http.post("/v1/constants/missing", json={"hashes": [other]})
    assert asked.json() == {"missing": [other]}
    assert not list(service.store.glob("contents/*/*.part"))
    bare = httpx.Client(base_url=service.http.base_url)
    assert bare.get("/v1/kept").status_code == bare.put(f"/v1/constants/{other}").status_code == 401
    bare.close()


def test_a_kept_value_serves_every_client_and_comes_to_none(model: Any, service: Service, folder: Path) -> None:
    with model.trace(IDS) as tracer:
        wide = torch.cat([model.model.layers[2].output[0]] * 100, -1).keep("wide", ttl=600)
        last = model.model.layers[2].output[0][:, -1].keep("last")
        small = model.model.layers[2].output[0][:, -1, 0].save()
    assert tracer.receipt.result_bytes == small.nbytes
    assert tracer.receipt.kept_bytes == wide.bytes + last.bytes == (len(PROMPT) * 100 + 1) * HIDDEN * 4
    expected = hidden_of(folder, 2)
    assert close(wide.fetch(), torch.cat([expected] * 100, -1)) and wide.expires > time.time() + 500
    with connect(service) as other:
        seen = uploads(other)
        kept = {each.name: each for each in other.kept()}
        assert {"wide", "last"} <= kept.keys() and kept["last"].expires is None
        with other.trace(IDS) as tracer:  # at an earlier layer than it was made at, on the other stage
            early = other.model.layers[0].output[0]
            sums = (kept["wide"][:, :, :HIDDEN] + early).save()
            other.model.layers[1].output[0][:, -1] = kept["last"]
            out = other.model.layers[1].output[0][:, -1].save()
        assert not seen and tracer.receipt.loaded_bytes == wide.bytes + last.bytes
    assert close(sums, expected + hidden_of(folder, 0)) and torch.equal(out, last.fetch())
    wide.delete()
    with pytest.raises(NotFoundError, match="kept value"), model.trace(IDS):
        (model.model.layers[0].output[0] + kept["wide"][:, :, :HIDDEN]).save()
    with pytest.raises(NotFoundError, match="wide"):
        model.kept("wide")


def test_what_is_beyond_the_quota_is_refused_before_it_runs(model: Any, service: Service) -> None:
    with pytest.raises(TooLargeError, match=str(QUOTA)), model.trace(IDS):
        torch.cat([model.model.layers[3].output[0]] * 5000, -1).keep("huge")
    assert not list(service.store.glob("contents/*/*.part"))


def test_a_failed_request_leaves_nothing(model: Any) -> None:
    state = model.state("untouched", torch.zeros(2))
    with pytest.raises(RunError), model.trace(IDS):
        hidden = model.model.layers[1].output[0][:, -1]
        hidden.keep("never")
        state.update(state.value + 1)
        hidden[:, hidden.argmax() + 1000].save()
    assert (state.version, state.fetch().tolist()) == (1, [0.0, 0.0])
    assert "never" not in [kept.name for kept in model.kept()]


def add(service: Service, times: int) -> None:
    with connect(service) as own:
        state = own.state("sum")
        for _ in range(times):
            with own.trace(IDS):
                state.update(state.value + 1)


def test_no_update_of_a_state_is_lost_between_clients_and_others_go_on_meanwhile(model: Any, service: Service) -> None:
    first = torch.tensor([0.25, -3.0])
    state = model.state("sum", first)
    threads = [threading.Thread(target=add, args=(service, 10)) for _ in range(8)]
    for thread in threads:
        thread.start()
    encode(model, torch.ones(HIDDEN, 2))
    for thread in threads:
        thread.join()
    assert torch.equal(state.fetch(), first + 80) and state.version == 81


def test_a_client_without_torch_keeps_and_updates_too(service: Service) -> None:
    program = f"""
import sys
sys.modules["torch"] = None
import numpy as np
import polytrace
with polytrace.connect({str(service.http.base_url)!r}, "tiny", key="sesame") as model:
    state = model.state("arrays", np.zeros(32, np.float32))
    with model.trace({IDS}):
        hidden = model.model.layers[1].output[0][:, -1]
        kept = hidden.keep()
        own = hidden.save()
        state.update(state.value + hidden[0])
    with model.trace({IDS}):
        zero = (model.model.layers[1].output[0][:, -1] - kept).save()
        left = (kept * 2).save()
    assert kept.dtype == np.float32 and kept.shape == (1, 32)
    assert not np.any(zero) and np.array_equal(left, 2 * np.asarray(own))
    assert np.array_equal(state.fetch(), own[0]) and np.array_equal(kept.fetch(), own)
    kept.delete()
    state.delete()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_killed_gateway_and_controller_lose_nothing_that_was_kept(model: Any, service: Service) -> None:
    with model.trace(IDS):
        kept = model.model.layers[3].output[0][:, -1].keep("through")
        model.model.layers[3].output[0][:, 0].keep("short", ttl=5)
    short = service.store / "contents" / LOCAL.owner / str(model.kept("short").kept_tensor.digest)
    assert short.exists()
    before, state = kept.fetch(), model.state("sum", torch.zeros(2))
    content, version = state.fetch(), state.version
    gone = {role: service.child(role) for role in ("gateway", "controller")}
    for pid in gone.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(service.child(role) not in (None, pid) for role, pid in gone.items()), 60, service)
    wait_until(service.is_ready, 240, service)
    assert torch.equal(model.kept("through").fetch(), before)
    wait_until(lambda: not short.exists(), 30, service)
    with pytest.raises(NotFoundError):
        model.kept("short")
    with model.trace(IDS) as tracer:
        zero = (model.model.layers[3].output[0][:, -1] - kept).save()
        state.update(state.value + 1)
    assert not zero.any() and tracer.receipt.loaded_bytes == kept.bytes + content.nbytes  # shards are new
    assert torch.equal(state.fetch(), content + 1) and state.version == version + 1
