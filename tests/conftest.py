"""What holds for every test: one thread a process, no hub, properties that do not fail for want of speed, how much is
tried, and which worker takes what.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import width
from hypothesis import HealthCheck, settings

from polytrace.collector import uncollected

if TYPE_CHECKING:
    from spreading import ServicesApart

    from bench.service import Service

# Before torch is imported anywhere: shards that tests start inherit these.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A shared machine is slow at times. In continuous integration the same examples run every time.
settings.register_profile(
    "house", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("house")


def pytest_configure(config: pytest.Config) -> None:
    width.is_wide = "not wide" not in config.option.markexpr


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    with uncollected():
        return (yield)


@pytest.hookimpl(optionalhook=True)  # of xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ServicesApart | None:
    if config.option.dist != "loadfile":
        return None
    from spreading import ServicesApart

    return ServicesApart(config, log)


@pytest.fixture(scope="session")
def chat_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from services import make_chat_world

    return make_chat_world(tmp_path_factory.mktemp("chat") / "world")


@pytest.fixture(scope="session")
def world_service(chat_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all modules that do not break theirs: without keys, tinyworld on 2 stages x 2 ranks.

    Other models that they want are `services.deployed` on it.
    """
    from bench.service import running_service

    log = tmp_path_factory.mktemp("service") / "serve.log"
    with running_service(chat_world, name="tinyworld", stages=2, ranks=2, log=log) as service:
        yield service
