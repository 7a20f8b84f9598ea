"""`ray job submit` to a service's own cluster, where Ray's job server is installed (`ray[default]`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from services import Service, fresh_environment, make_model, wait_until

needs_job_server = pytest.mark.skipif(
    find_spec("aiohttp_cors") is None or find_spec("opencensus") is None, reason="ray[default] is not installed"
)
SCRIPT = """
import polytrace
model = polytrace.connect("ray://auto", "tiny")
with model.trace([3, 1, 4]):
    out = model.model.layers[2].output.save()
print("shape", tuple(out.shape))
"""
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("jobs")
    path = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"  # as in an activated environment: jobs say `python`
    service = Service(make_model(folder / "model"), folder, "--jobs", PATH=path)
    try:
        wait_until(lambda: service.is_ready() and "RAY_API_SERVER_ADDRESS" in service.words(), 240, service)
        yield service
    finally:
        service.kill_all()


def submit(service: Service, *flags: str) -> subprocess.CompletedProcess[str]:
    folder = service.folder / "job"
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    line = next(line for line in service.words().splitlines() if "RAY_API_SERVER_ADDRESS=" in line)
    environment = fresh_environment(service.folder) | dict(re.findall(r"(RAY_\w+)=(\S+)", line))
    command = [str(RAY), "job", "submit", "--working-dir", str(folder), *flags, "--", "python", "script.py"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@needs_job_server
def test_a_submitted_job_traces_with_the_key_of_its_runtime_environment(service: Service) -> None:
    ran = submit(service, "--runtime-env-json", json.dumps({"env_vars": {"POLYTRACE_KEY": "sesame"}}))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "shape (3, 32)" in ran.stdout or "shape (1, 3, 32)" in ran.stdout


@needs_job_server
def test_a_submitted_job_without_a_key_is_refused_and_told_where_one_goes(service: Service) -> None:
    ran = submit(service)
    assert ran.returncode == 1
    assert "this service needs a key" in ran.stdout and "env_vars" in ran.stdout


def test_jobs_are_asked_for_where_there_can_be_any(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "api.commands", "serve", "--store", str(tmp_path), "--jobs"]
    told = subprocess.run([*command, "--address", "somewhere:1"], capture_output=True, text=True, timeout=60)
    assert told.returncode != 0 and "cluster of the service's own" in told.stderr
    if find_spec("aiohttp_cors") is None:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert told.returncode != 0 and "pip install 'ray[default]'" in told.stderr
