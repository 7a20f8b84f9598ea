"""Jobs on a whole service: asked by another process, over connections that break, and by many tasks at once."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import CuttingProxy
from services import PROMPT, Guest, fresh_environment, make_model, wait_until

import polytrace
from bench.service import Service as Running
from polytrace.errors import CancelledError, NotFoundError, WireError
from polytrace.versions import PROGRAM_HEADER, WIRE_HEADER

IDS = [list(PROMPT)]
KEY = "sesame"


@pytest.fixture(scope="module")
def service(world_service: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    service = Guest(world_service.url, make_model(tmp_path_factory.mktemp("jobs") / "model"))
    try:
        wait_until(service.is_ready, 240, service)
        yield service
    finally:
        service.kill_all()


@pytest.fixture
def model(service: Guest) -> Iterator[Any]:
    with polytrace.connect(str(service.http.base_url), "tiny", key=KEY) as model:
        yield model


def expected(model: Any, layer: int = 2) -> torch.Tensor:
    with model.trace(IDS):
        saved = {"hidden": model.model.layers[layer].output[0].save()}
    return saved["hidden"]


def test_a_job_is_collected_by_another_process(model: Any, service: Guest, tmp_path: Path) -> None:
    with model.trace(IDS, blocking=False) as tracer:
        hidden = model.model.layers[2].output[0].save()
    told = []
    assert tracer.job.wait(60, told.append).state == "done" and told[-1].is_over
    code = (
        "import sys, polytrace\n"
        "result = polytrace.job(sys.argv[1]).result()\n"
        "print(result.receipt.request, result.values['0'].double().sum().item())\n"
    )
    environment = fresh_environment(tmp_path) | {"POLYTRACE_KEY": KEY, "POLYTRACE_URL": str(service.http.base_url)}
    run = subprocess.run(
        [sys.executable, "-c", code, tracer.job.id],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    request, total = run.stdout.split()
    result = tracer.job.result()
    assert request == tracer.job.id == result.receipt.request == tracer.receipt.request
    assert torch.equal(hidden, expected(model)) and float(total) == hidden.double().sum().item()
    status = service.http.get(f"/v1/requests/{tracer.job.id}").json()
    assert status["passes_done"] == status["passes"] == len(result.receipt.passes) == 1
    with pytest.raises(NotFoundError):
        polytrace.job("0" * 32, str(service.http.base_url), key=KEY)


def test_a_result_is_gone_on_with_where_it_broke(model: Any, service: Guest) -> None:
    """A result of 1 MB through connections that break after 300 KB each."""
    with model.trace([[1] * 100] * 20, blocking=False) as tracer:
        for layer in model.model.layers:
            layer.output[0].save()
    whole = tracer.job.result()
    proxy = CuttingProxy(service.port, lambda number, asked: 300_000 if b"/result" in asked else None)
    try:
        again = polytrace.job(tracer.job.id, proxy.url, key=KEY).result()
    finally:
        proxy.close()
    size = sum(value.nbytes for value in whole.values.values())
    assert size > 1_000_000 and proxy.cuts == size // 300_000
    assert whole.values.keys() == again.values.keys()
    assert all(torch.equal(whole.values[name], again.values[name]) for name in whole.values)


def test_a_submit_that_nobody_answered_is_the_same_request_when_it_comes_again(service: Guest) -> None:
    """The service has accepted it, and the answer is lost: the client sends it again under its key."""
    lost = []

    def rule(number: int, asked: bytes) -> int | None:
        if b"POST " in asked and not lost:
            lost.append(number)
        return 0 if number in lost else None

    proxy = CuttingProxy(service.port, rule)
    try:
        with polytrace.connect(proxy.url, "tiny", key=KEY) as model:
            with model.trace(IDS, blocking=False) as tracer:
                hidden = model.model.layers[2].output[0].save()
            tracer.job.result()
            assert proxy.cuts == 1 and torch.equal(hidden, expected(model))
    finally:
        proxy.close()


def test_many_tasks_wait_at_once_and_one_that_is_cancelled_cancels_its_request(model: Any) -> None:
    async def ask(layer: int) -> torch.Tensor:
        async with model.trace(IDS):
            saved = {"hidden": model.model.layers[layer % 4].output[0].save()}
        return saved["hidden"]

    async def long() -> None:
        async with model.generate(IDS, max_new_tokens=100, eos=None):
            pass

    async def main() -> list[torch.Tensor]:
        task = asyncio.create_task(long())
        asked = asyncio.gather(*(ask(layer) for layer in range(24)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await asked

    answers = asyncio.run(main())
    assert all(torch.equal(answers[layer], answers[layer % 4]) for layer in range(24))
    assert torch.equal(answers[2], expected(model)) and not torch.equal(answers[1], answers[2])


def test_a_cancelled_job_says_so(model: Any) -> None:
    with model.generate([[1, 2]], max_new_tokens=120, eos=None, blocking=False) as tracer:
        pass
    tracer.job.cancel()
    assert tracer.job.wait(30).is_over
    if tracer.job.status().state == "cancelled":  # it may have been done before
        with pytest.raises(CancelledError):
            tracer.job.result()


@pytest.mark.parametrize("wire", ["1", "2"])  # of "2" are the files, and descriptions were others
def test_another_version_of_the_wire_is_told_at_connect(wire: str) -> None:
    class Older(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header(PROGRAM_HEADER, "0.0.9")
            self.send_header(WIRE_HEADER, wire)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Older)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(
            WireError, match=rf"polytrace 0\.0\.9 with version {wire} of the wire.*install polytrace==0\.0\.9"
        ):
            polytrace.connect(f"http://127.0.0.1:{server.server_port}", "tiny")
    finally:
        server.shutdown()
        server.server_close()
