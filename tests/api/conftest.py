"""What the store is tested on: both databases, SQLite in a file and a PostgreSQL server of this session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from databases import Postgres, why_no_postgres
from laptops import Laptop
from object_stores import S3
from services import make_model


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for all tests of this process; each takes a database of its own."""
    if (reason := why_no_postgres()) is not None:
        pytest.skip(reason)
    server = Postgres()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def _durable_postgres() -> Iterator[Postgres]:
    if (reason := why_no_postgres()) is not None:
        pytest.skip(reason)
    server = Postgres(is_durable=True)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def mortal_postgres(_durable_postgres: Postgres) -> Postgres:
    """One that a test may stop, kill and start: what it has committed survives. Each test finds it running."""
    if not _durable_postgres.is_running():
        _durable_postgres.start()
    return _durable_postgres


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new database with the store's tables, once of each kind."""
    if request.param == "sqlite":
        (tmp_path / "store").mkdir(mode=0o700, exist_ok=True)
        return f"sqlite:///{tmp_path / 'store' / 'store.db'}"
    return str(request.getfixturevalue("postgres").database())


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """One server for all tests of this process; each takes a place of its own."""
    server = S3()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    """One for all modules that have tenants of their own: "tiny" on 2 stages x 2 ranks, with small passes."""
    folder = tmp_path_factory.mktemp("laptop")
    flags = ("--stages", "2", "--ranks", "2")
    laptop = Laptop(make_model(folder / "model"), folder, *flags, POLYTRACE_BUDGET_TOKENS="128")
    try:
        laptop.start()
        yield laptop
    finally:
        laptop.service.kill_all()
