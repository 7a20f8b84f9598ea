"""Limits, prices and usage on a whole service, as a user and an operator meet them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from laptops import Laptop
from typer.testing import CliRunner, Result

import polytrace
from api import commands
from polytrace.errors import QuotaError, TooLargeError
from polytrace.model import Model

LIMITS = {"token_layers": 160, "tokens_a_day": 200, "requests_in_flight": 50}
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def service(laptop: Laptop) -> Iterator[Laptop]:
    """The tenant of its operator, in whose name nobody else sends anything, has limits."""

    def limit(limits: Mapping[str, int | None]) -> None:
        laptop.service.http.patch("/v1/tenants/default", json={"limits": limits}).raise_for_status()

    limit(LIMITS)
    yield laptop
    limit(dict.fromkeys(LIMITS))


@pytest.fixture(scope="module")
def model(service: Laptop) -> Iterator[Model]:
    with polytrace.connect(service.url, "tiny", key=service.key) as model:
        yield model


def command(service: Laptop, *arguments: str) -> Result:
    """A command of the command line, in this process."""
    return CliRunner().invoke(commands.app, [*arguments, "--url", service.url, "--key", service.key])


def usage(service: Laptop) -> list[dict[str, Any]]:
    answer = service.service.http.get("/v1/usage", params={"tenant": "default"}).json()
    return list(answer["usage"])


def different(count: int) -> list[list[int]]:
    return [[number + 1, *PROMPT[1:]] for number in range(count)]


def test_a_user_is_told_what_would_fit_sends_it_and_is_charged_what_was_certified(
    service: Laptop, model: Model, tmp_path: Path
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
    (used,) = usage(service)
    assert (used["requests"], used["tokens"], used["token_layers"]) == (1, 40, 160)
    assert used["moved_bytes"] == tracer.receipt.moved_bytes == priced.moved_bytes
    assert used["result_bytes"] > 8 * 5 * 32 * 4 and used["run_seconds"] > 0
    listed = command(service, "usage", "--tenant", "default", "--csv")
    (row,) = csv.DictReader(io.StringIO(listed.stdout))
    assert row["token_layers"] == "160" and row["tenant"] == "default"
    assert command(service, "usage", "--tenant", "default").stdout.split("\n")[2].split()[:7] == [
        "default",
        "default",
        "tiny",
        "1",
        "0",
        "40",
        "160",
    ]


def test_a_day_has_so_many_tokens(service: Laptop, model: Model) -> None:
    used = sum(one["tokens"] for one in usage(service))
    while used + 40 <= LIMITS["tokens_a_day"]:
        with model.trace(different(8)):
            model.model.layers[0].output[0][:, -1].save()
        used += 40
    with pytest.raises(QuotaError, match="of 200 left today") as caught, model.trace(different(8)):
        model.model.layers[0].output[0][:, -1].save()
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s > 0
    left = LIMITS["tokens_a_day"] - used
    assert (f"{left // 5} of these 8 prompts would fit" in str(caught.value)) == (left >= 5)


def test_an_operator_gives_a_deployment_limits(service: Laptop) -> None:
    given = command(service, "limits", "tiny", "token_layers=100", "requests_in_flight=7")
    assert given.exit_code == 0, given.output
    assert "deployment tiny: requests_in_flight 7, token_layers 100" in given.stdout
    assert "tenant default: requests_in_flight 50, tokens_a_day 200, token_layers 160" in given.stdout
    assert "no limits" in command(service, "limits", "tiny", "none").stdout
    assert command(service, "limits", "tiny", "tokens_a_day=3").exit_code == 1
