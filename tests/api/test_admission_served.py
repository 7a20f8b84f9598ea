"""Limits, prices and usage on a whole service, as a user and an operator meet them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from services import Service, make_model, wait_until
from typer.testing import CliRunner, Result

import polytrace
from api import commands
from polytrace.errors import QuotaError, TooLargeError
from polytrace.model import Model

LIMITS = {"token_layers": 160, "tokens_a_day": 200, "requests_in_flight": 50}
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("admission-served")
    service = Service(make_model(folder / "model"), folder, "--stages", "2", POLYTRACE_LIMITS=json.dumps(LIMITS))
    try:
        wait_until(service.is_ready, 180, service)
        yield service
    finally:
        service.kill_all()


@pytest.fixture(scope="module")
def model(service: Service) -> Iterator[Model]:
    model = polytrace.connect(f"http://127.0.0.1:{service.port}", "tiny", key="sesame")
    yield model
    model.close()


def command(service: Service, *arguments: str) -> Result:
    """A command of the command line, in this process."""
    flags = ["--url", str(service.http.base_url), "--key", "sesame"]
    return CliRunner().invoke(commands.app, [*arguments, *flags])


def different(count: int) -> list[list[int]]:
    return [[number + 1, *PROMPT[1:]] for number in range(count)]


def test_a_user_is_told_what_would_fit_sends_it_and_is_charged_what_was_certified(
    service: Service, model: Model, tmp_path: Path
) -> None:
    # 1) twelve prompts are too many: 5 tokens x 4 layers each
    with model.trace(different(12), run=False) as tracer:
        model.model.layers[3].output[0].save()
    certificate = model.validate(tracer)
    assert certificate.token_layers == 240 and not certificate.is_admitted
    assert certificate.refusal is not None and certificate.refusal.endswith("8 of these 12 prompts would fit")
    with pytest.raises(TooLargeError, match="8 of these 12 prompts would fit"), model.trace(different(12)):
        model.model.layers[3].output[0].save()

    # 2) the command says the same of the request as a file
    tracer.save_request(tmp_path / "large.safetensors")
    told = command(service, "validate", str(tmp_path / "large.safetensors"))
    assert told.exit_code == 1 and "8 of these 12 prompts would fit" in told.stdout, told.output
    assert "240 of 160 (tenant default)  <- too much" in told.stdout

    # 3) eight run, and cost what was said
    with model.trace(different(8)) as tracer:
        hidden = model.model.layers[3].output[0].save()
    priced = model.validate(tracer)
    assert isinstance(hidden, torch.Tensor) and hidden.shape == (8, 5, 32)
    assert priced.token_layers == tracer.receipt.token_layers == 160
    (used,) = service.http.get("/v1/usage").json()["usage"]
    assert (used["requests"], used["tokens"], used["token_layers"]) == (1, 40, 160)
    assert used["moved_bytes"] == tracer.receipt.moved_bytes == priced.moved_bytes
    assert used["result_bytes"] > 8 * 5 * 32 * 4 and used["run_seconds"] > 0
    listed = command(service, "usage", "--csv")
    (row,) = csv.DictReader(io.StringIO(listed.stdout))
    assert row["token_layers"] == "160" and row["tenant"] == "default"
    assert command(service, "usage").stdout.split("\n")[2].split()[:7] == [
        "default",
        "default",
        "tiny",
        "1",
        "0",
        "40",
        "160",
    ]


def test_a_day_has_so_many_tokens(service: Service, model: Model) -> None:
    used = sum(one["tokens"] for one in service.http.get("/v1/usage").json()["usage"])
    while used + 40 <= LIMITS["tokens_a_day"]:
        with model.trace(different(8)):
            model.model.layers[0].output[0][:, -1].save()
        used += 40
    with pytest.raises(QuotaError, match="of 200 left today") as caught, model.trace(different(8)):
        model.model.layers[0].output[0][:, -1].save()
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
    left = LIMITS["tokens_a_day"] - used
    assert (f"{left // 5} of these 8 prompts would fit" in str(caught.value)) == (left >= 5)


def test_an_operator_gives_a_deployment_limits(service: Service) -> None:
    given = command(service, "limits", "tiny", "token_layers=100", "requests_in_flight=7")
    assert given.exit_code == 0, given.output
    assert "deployment tiny: requests_in_flight 7, token_layers 100" in given.stdout
    assert "tenant default: requests_in_flight 50, tokens_a_day 200, token_layers 160" in given.stdout
    assert "no limits" in command(service, "limits", "tiny", "none").stdout
    assert command(service, "limits", "tiny", "tokens_a_day=3").exit_code == 1
