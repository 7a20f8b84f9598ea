"""The demo as a user runs it: a service of its own on 2 x 2 shards, eight users at once, all numbers right."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from mistakes import MISTAKES
from rich.console import Console

import polytrace
from bench import tinyworld
from bench.plain import TOLERANCE, Plain
from bench.service import Service, ServiceDidNotStartError, running_service
from bench.visits import NAME, draw, largest_difference, size, totals_table, users_table, visit_all
from polytrace.errors import PolytraceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def service(world_service: Service) -> Service:
    return world_service


@pytest.mark.timeout(600)
def test_eight_users_share_passes_and_every_number_is_right(service: Service, tmp_path: Path) -> None:
    visits = visit_all(service.url, turns=2)
    plain = Plain(tinyworld.FOLDER)
    differences = [largest_difference(visit, plain) for visit in visits]
    assert max(differences) <= TOLERANCE
    entries = [entry for visit in visits for receipt in visit.receipts for entry in receipt.passes]
    assert max(entry.requests for entry in entries) > 1, "users shared passes"

    text = io.StringIO()
    console = Console(file=text, width=160)
    console.print(users_table(visits, differences), totals_table(visits, differences, 1.0))
    for visit in visits:
        assert visit.user in text.getvalue()
    assert all(path.stat().st_size > 10_000 for path in draw(visits, plain, tmp_path))


def test_the_service_example_of_the_readme_runs(service: Service) -> None:
    readme = (ROOT / "README.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "polytrace.connect(" in b)
    names: dict[str, object] = {"polytrace": polytrace}
    exec(compile(block.replace("http://127.0.0.1:8765", service.url), "README.md", "exec"), names)
    logits = names["logits"]
    assert isinstance(logits, torch.Tensor)
    plain = Plain(tinyworld.FOLDER)
    assert plain.text([int(logits.argmax())]) == " Rome"


@pytest.mark.parametrize("method", ["activation_patching", "path_patching", "steering"])
def test_a_script_of_the_guide_runs_unchanged_on_a_service(
    service: Service, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYTRACE_URL", service.url)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    path = ROOT / "docs" / "guide" / f"{method}.py"
    names = {"__name__": "__main__", "__file__": str(tmp_path / path.name)}  # its picture goes there
    exec(compile(path.read_text(), str(path), "exec"), names)  # it asserts what it finds
    assert names["url"] == service.url


def test_a_service_tells_mistakes_as_one_process_does(service: Service) -> None:
    names = {"model": polytrace.connect(service.url, NAME), "torch": torch, "np": np, "io": io, "polytrace": polytrace}
    for name, mistake in MISTAKES.items():
        with pytest.raises(PolytraceError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mistake.make(names)
        assert caught.value.where == f"notebook.py:{mistake.line}", name
        assert all(words in caught.value.message for words in mistake.words), name


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    starting = running_service(tinyworld.FOLDER, name="x", stages=1, ranks=0, log=tmp_path / "log")
    with pytest.raises(ServiceDidNotStartError, match="--ranks"), starting:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_killed_demo_leaves_no_service_behind(tmp_path: Path) -> None:
    log = tmp_path / "service.log"
    program = (
        "from pathlib import Path; from bench import tinyworld; from bench.service import running_service\n"
        f"with running_service(tinyworld.FOLDER, name='x', stages=1, ranks=1, log=Path({str(log)!r})): pass"
    )
    demo = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: log.exists() and "starting" in log.read_text())
    services = psutil.Process(demo.pid).children(recursive=True)
    assert services
    demo.kill()
    demo.wait()
    _, alive = psutil.wait_procs(services, timeout=60)
    assert not alive


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sizes_read_well() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_250_000, 3.2e9)] == ["0 B", "999 B", "1.0 KB", "1.2 MB", "3.2 GB"]
