"""Log lines as machines read them: of a gateway in a process of its own, and of the controller's half of a store."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateways import Agreeable, GatewayService, body, description_of_nothing

from api import log_lines
from api.log_lines import JsonLines
from polytrace.errors import GraphError
from scheduling.plan import RequestId

KEY = "pt_operators-own"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the service's rooms log as JSON."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonLines("gateway"))
    loggers = [logging.getLogger(room) for room in ("api", "cluster")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield text
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_lines_about_a_request_have_its_id_its_tenant_and_its_model(tmp_path: Path, written: io.StringIO) -> None:
    service = GatewayService(tmp_path / "s", Agreeable(), description_of_nothing(), key=KEY)
    request = service.http.post("/v1/models/m/requests", content=body()).json()["id"]
    service.claim()
    service.finish(RequestId(request), error=GraphError("it reads layer 96"))
    service.http.get(f"/v1/requests/{request}")
    service.http.get("/v1/requests/none")
    service.close()

    told = lines(written)
    submitted, ended, asked = [one for one in told if one.get("request") == request]
    whose = {"request": request, "tenant": "default", "user": "default"}
    assert submitted.items() >= (whose | {"model": "m", "status": 202, "method": "POST", "role": "gateway"}).items()
    assert submitted["route"] == "/v1/models/{name}/requests" and 0 < submitted["seconds"] < 60
    assert ended.items() >= (whose | {"model": "m", "code": GraphError.code}).items()
    assert asked.items() >= (whose | {"status": 200, "method": "GET"}).items()
    refused = next(one for one in told if one.get("request") == "none")
    assert (refused["status"], refused["code"]) == (404, "not-found")
    assert all(one["level"] == "info" and one["time"].endswith("+00:00") for one in told)
    assert KEY not in written.getvalue()


def test_a_lines_words_stay_in_their_line(written: io.StringIO) -> None:
    try:
        raise ValueError("it\nbroke")
    except ValueError:
        logging.getLogger("cluster.any").exception("a name with\n%s", '{"level": "info"}', extra={"model": "m\n"})
    (line,) = lines(written)
    assert line["message"] == 'a name with\n{"level": "info"}' and line["model"] == "m\n" and line["level"] == "error"
    assert line["exception"].endswith("ValueError: it\nbroke")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(log_lines.__file__).parents[1])
    environment = {"PYTHONPATH": root, "PATH": "/usr/bin:/bin"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=False
    )


def test_a_process_logs_as_its_environment_says() -> None:
    code = (
        "import logging; from api.log_lines import configure; configure('controller'); "
        "[logging.getLogger(n).info('x') or logging.getLogger(n).warning('y') for n in ('cluster.a', 'others')]"
    )
    told = [json.loads(line) for line in run(code, POLYTRACE_LOG_FORMAT="json").stderr.splitlines()]
    assert [(one["logger"], one["message"], one["role"]) for one in told] == [
        ("cluster.a", "x", "controller"),
        ("cluster.a", "y", "controller"),
        ("others", "y", "controller"),
    ]
    text = run(code).stderr.splitlines()
    assert [line.split(" ", 3)[3] for line in text] == ["cluster.a: y", "others: y"]
    wrong = run(code, POLYTRACE_LOG_FORMAT="xml")
    assert wrong.returncode != 0 and "POLYTRACE_LOG_FORMAT is 'xml'; it is text or json" in wrong.stderr
