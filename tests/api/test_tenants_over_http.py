"""Two tenants on a whole service, from the key that it prints at its first start: a laptop's, on 2 stages x 2 ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from laptops import Laptop
from model_kinds import KINDS
from services import PROMPT, fresh_environment, wait_until
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import polytrace
from polytrace.errors import ForbiddenError, KeyRefusedError, NotFoundError
from polytrace.http_calls import check

SCALE = 3.0


@pytest.fixture(scope="module")
def model(laptop: Laptop) -> Path:
    return laptop.folder / "model"


def test_two_tenants_use_one_service_and_see_nothing_of_each_other(laptop: Laptop, model: Path) -> None:
    # 1) the operator, with the printed key, lets two tenants in
    for arguments in (
        ("tenants", "add", "vision", "--weight", "2"),
        ("tenants", "add", "audio", "--model", "tiny"),
    ):
        answer = laptop.polytrace(*arguments)
        assert answer.returncode == 0, answer.stderr
    ada = laptop.made("--tenant", "vision", "--user", "ada", "--expires", "1d")
    carl = laptop.made("--tenant", "audio", "--user", "carl")

    # 2) both trace, each with an edit, and what they keep has one name
    with (
        polytrace.connect(laptop.url, "tiny", key=ada) as adas,
        polytrace.connect(laptop.url, "tiny", key=carl) as carls,
    ):
        ids, outs = [], []
        for one, scale in ((adas, SCALE), (carls, 1.0)):
            with one.trace(list(PROMPT)) as tracer:
                hidden = one.model.layers[0].output[0]
                one.model.layers[0].output[0][:] = hidden * scale
                out = one.model.layers[2].output[0].save()
                (hidden[:, 0] * scale).keep("mine")
            ids.append(tracer.receipt.request)
            outs.append(out)
        expected = [by_hand(model, scale) for scale in (SCALE, 1.0)]
        for out, (plain, _) in zip(outs, expected, strict=True):
            assert (out - plain).abs().max() <= 1e-5 * max(1.0, float(plain.abs().max()))
        assert (outs[0] - outs[1]).abs().max() > 0.1, "the edit did something"
        kept: list[Any] = [one.kept("mine").fetch() for one in (adas, carls)]
        for value, (_, plain) in zip(kept, expected, strict=True):
            assert (value - plain).abs().max() <= 1e-5 * max(1.0, float(plain.abs().max()))

    # 3) what is the other one's is not there; an operator sees all
    http = laptop.service.http
    for key, own, other in ((ada, 0, 1), (carl, 1, 0)):
        bearer = {"Authorization": f"Bearer {key}"}
        assert http.get(f"/v1/requests/{ids[own]}/result", headers=bearer).status_code == 200
        for path in ("", "/result", "/events"):
            assert http.get(f"/v1/requests/{ids[other]}{path}", headers=bearer).status_code == 404
        assert http.get(f"/v1/requests/{ids[other]}/result").status_code == 200
    assert http.get("/v1/kept/mine").status_code == 404
    assert http.get("/v1/kept/mine", params={"owner": "vision/ada"}).status_code == 200

    # 4) users operate nothing, and a tenant uses what it may
    refused = laptop.polytrace("drain", "tiny", key=ada)
    assert refused.returncode == 1 and "for operators; vision/ada is a user" in refused.stderr
    with pytest.raises(ForbiddenError, match="for operators"):
        check(http.get("/v1/tenants", headers={"Authorization": f"Bearer {ada}"}))
    assert laptop.polytrace("tenants", "set", "audio", "--model", "another").returncode == 0
    with pytest.raises(NotFoundError, match="no model 'tiny' here, and no other that you could use"):
        polytrace.connect(laptop.url, "tiny", key=carl)

    watching = laptop.made("--user", "prometheus", "--monitor")
    for command in (("status",), ("usage",), ("top", "--once", "--every", "0.2")):
        seen = laptop.polytrace(*command, key=watching)
        assert seen.returncode == 0 and ("tiny" in seen.stdout or "audio" in seen.stdout), seen
    for command in (("jobs", "list"), ("drain",), ("keys", "list"), ("tenants", "list"), ("audit",)):
        refused = laptop.polytrace(*command, key=watching)
        assert refused.returncode == 1 and "default/prometheus is a monitor" in refused.stderr, refused
    with pytest.raises(ForbiddenError, match="monitor"):
        polytrace.connect(laptop.url, "tiny", key=watching)

    # 5) a user turns a key over; another process revokes one in the store; wrong keys say so
    turned = laptop.polytrace("keys", "rotate", ada[:15], key=ada)
    assert turned.returncode == 0, turned.stderr
    with pytest.raises(KeyRefusedError, match="was revoked"):
        polytrace.connect(laptop.url, "tiny", key=ada)
    assert polytrace.models(laptop.url, key=turned.stdout.strip())[0]["name"] == "tiny"
    store = str(laptop.service.store)
    command = [sys.executable, "-m", "api.commands", "keys", "revoke", turned.stdout[:15], "--store", store]
    subprocess.run(command, check=True, env=os.environ | fresh_environment(laptop.folder), timeout=60)
    wait_until(lambda: is_refused(laptop, turned.stdout.strip()), 60, laptop.service)
    with pytest.raises(KeyRefusedError, match="needs a key"):
        polytrace.models(laptop.url)

    # 6) all of that was written down
    shown = laptop.polytrace("audit", "--json").stdout
    for act in ("keys.make", "tenants.add", "tenants.change", "keys.rotate", "keys.revoke", "refused"):
        assert f'"{act}"' in shown
    assert "(store)/" in shown and '"POST /v1/models/tiny/drain"' in shown
    assert "models.drain" not in shown, "it was refused"


def test_tenants_with_one_text_and_images_of_their_own_get_what_is_their_own(laptop: Laptop, tmp_path: Path) -> None:
    config = KINDS["llava"]()[0].config
    config.vision_config.image_size, config.vision_config.patch_size = 80, 40  # large enough to be a content
    torch.manual_seed(0)
    plain = LlavaForConditionalGeneration(config).eval()
    plain.save_pretrained(tmp_path / "seeing")
    asked = ("deploy", str(tmp_path / "seeing"), "--stages", "2", "--ranks", "2", "--cpus", "0.1")
    refused = laptop.polytrace(*asked)
    assert refused.returncode == 1 and "whole=false" in refused.stderr
    answer = laptop.polytrace(*asked, "--packed", timeout_s=240)
    assert answer.returncode == 0, answer.stderr + laptop.service.words()
    keys = []
    for tenant in ("left", "right"):
        assert laptop.polytrace("tenants", "add", tenant).returncode == 0
        keys.append(laptop.made("--tenant", tenant, "--user", "one"))
    prompt = [1, 2, *[config.image_token_id] * 4, 3, 4, 5]
    photos = torch.randn(2, 1, 3, 80, 80)

    def ask(key: str, photo: torch.Tensor) -> tuple[torch.Tensor, list[int], Any]:
        with polytrace.connect(laptop.url, "seeing", key=key) as model:
            with model.trace(prompt, pixel_values=photo, run=False) as tracer:
                model.model.language_model.layers[0].output[:, 3:5] *= SCALE
                model.lm_head.output.save()
            with model.trace(prompt, pixel_values=photo):
                model.model.language_model.layers[0].output[:, 3:5] *= SCALE
                logits = model.lm_head.output.save()
            with model.generate(prompt, pixel_values=photo, max_new_tokens=4) as going:
                pass
            return logits, list(going.result.ids), model.validate(tracer)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, [*keys, *keys], [photos[0], photos[1], photos[1], photos[0]]))
    expected = [seen_by_hand(plain, prompt, photo) for photo in photos]
    assert (expected[0][0] - expected[1][0]).abs().max() > 1e-2
    for (logits, ids, certificate), place in zip(answers, (0, 1, 1, 0), strict=True):
        wanted, going = expected[place]
        assert (logits - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))
        assert ids == going
        assert certificate.op_flops > 4 * 2 * 3 * 40 * 40 * 16  # what makes patches of the pixels alone


def seen_by_hand(plain: Any, prompt: list[int], photo: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Logits with an edit at rows of an image, and what comes next without one."""
    given = {"input_ids": torch.tensor([prompt]), "pixel_values": photo}
    going = plain.generate(**given, attention_mask=torch.ones(1, len(prompt)), max_new_tokens=4, do_sample=False)

    def scaled(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 3:5] *= SCALE
        return output

    handle = plain.model.language_model.layers[0].register_forward_hook(scaled)
    with torch.no_grad():
        logits = plain(**given).logits
    handle.remove()
    return logits, going[0, len(prompt) :].tolist()


def by_hand(model: Path, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What layer 2 hands on, and what layer 0 does at the first token, when layer 0's output is scaled."""
    plain = LlamaForCausalLM.from_pretrained(model).eval()
    seen: dict[int, torch.Tensor] = {}

    def scaled(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        seen[0] = output * scale
        return seen[0]

    plain.model.layers[0].register_forward_hook(scaled)
    plain.model.layers[2].register_forward_hook(lambda _module, _args, output: seen.update({2: output}))
    with torch.no_grad():
        plain(torch.tensor([PROMPT]), use_cache=False)
    return seen[2], seen[0][:, 0]


def is_refused(laptop: Laptop, key: str) -> bool:
    return laptop.service.http.get("/v1/whoami", headers={"Authorization": f"Bearer {key}"}).status_code == 401
