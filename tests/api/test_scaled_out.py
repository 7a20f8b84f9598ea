"""A whole service on PostgreSQL and S3, of two stages: its folder, its processes and its database may be lost."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from databases import Postgres
from object_stores import S3
from services import LAYER, PROMPT, SCALE, Service, answer, body, make_model, wait_until
from transformers import LlamaForCausalLM

import polytrace
from polytrace.wire import decode_result

TOLERANCE = 1e-5  # float32, of max(1, max|plain|)


def plain(model: Path, layer: int) -> torch.Tensor:
    """The saved value as Hugging Face alone gives it."""
    own = LlamaForCausalLM.from_pretrained(model).eval()
    found: list[torch.Tensor] = []
    own.model.layers[0].register_forward_hook(lambda _, __, out: out * SCALE)
    own.model.layers[layer].register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        own(torch.tensor([PROMPT]))
    return found[0]


def generated(url: str, folder: Path) -> None:
    """Every step's value of a generation is among the objects, and what is kept is there to be used."""
    found: list[list[torch.Tensor]] = []
    with polytrace.connect(url, "tiny", key="sesame") as far, polytrace.load(str(folder)) as near:
        for model in (far, near):
            states: list[Any] = []
            with model.generate([list(PROMPT)], max_new_tokens=5) as tracer:
                for _ in tracer.iter[:]:
                    states.append(model.model.layers[LAYER].output[0][:, -1].save())
            assert len(tracer.result[0].ids) == 5
            found.append(list(states))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * max(1.0, float(other.abs().max()))


def test_nothing_is_lost_but_what_is_at_hand(tmp_path: Path, mortal_postgres: Postgres, s3: S3) -> None:
    model = make_model(tmp_path / "model")
    environment = s3.environment | {"POLYTRACE_DATABASE": mortal_postgres.empty_database()}
    environment |= {"POLYTRACE_OBJECTS": s3.place()}
    split = ("--stages", "2")
    expected = plain(model, LAYER)
    service = Service(model, tmp_path, *split, **environment)
    try:
        wait_until(service.is_ready, 240, service)
        key = {"Idempotency-Key": "first"}
        posted = service.http.post("/v1/models/tiny/requests", content=body(LAYER, PROMPT, SCALE), headers=key).json()
        first = posted["id"]
        wait_until(lambda: service.http.get(f"/v1/requests/{first}").json()["state"] == "done", 60, service)
        result = service.http.get(f"/v1/requests/{first}/result").content
        values, _ = decode_result(result)
        found = torch.frombuffer(bytearray(values["out"].data), dtype=torch.float32).view(expected.shape)
        assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))
        assert not list((service.store / "results").iterdir()), "it went from the shards to their places"
        generated(str(service.http.base_url), model)
        # 1) the database goes, and comes back
        mortal_postgres.stop()
        refused = service.http.post("/v1/models/tiny/requests", content=body(LAYER, PROMPT, SCALE))
        assert refused.status_code == 503 and refused.headers["retry-after"]
        mortal_postgres.start()
        wait_until(lambda: service.http.get("/v1/models").status_code == 200, 60, service)
        assert answer(service, LAYER, PROMPT) == bytes(values["out"].data)
        assert service.process.poll() is None and service.child("controller") is not None
        # 2) the whole machine goes, with requests that were accepted
        controller = service.child("controller")
        assert controller is not None
        os.kill(controller, signal.SIGSTOP)
        waiting = service.http.post("/v1/models/tiny/requests", content=body(LAYER, PROMPT, SCALE)).json()["id"]
    finally:
        service.kill_all()
    shutil.rmtree(service.store)
    again = Service(None, tmp_path, **environment)
    try:
        wait_until(again.is_ready, 240, again)
        wait_until(lambda: again.http.get(f"/v1/requests/{waiting}").json()["state"] == "done", 60, again)
        values, _ = decode_result(again.http.get(f"/v1/requests/{waiting}/result").content)
        assert bytes(values["out"].data) == found.numpy().tobytes()
        assert again.http.get(f"/v1/requests/{first}/result").content == result
        same = again.http.post("/v1/models/tiny/requests", content=body(LAYER, PROMPT, SCALE), headers=key)
        assert same.status_code == 200 and same.content == result, "a submit of before is still the same request"
    finally:
        again.kill_all()
