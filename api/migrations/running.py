"""Alembic, told where the scripts and the database are: no file of settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from api import migrations
from polytrace.errors import ServiceError

_MIGRATING = 0x706F6C7A  # PostgreSQL's lock: one process at a time


def upgrade(url: str, version: str | None, folder: Path) -> None:
    """From a version (None: no tables) to the newest. Another process may have done it meanwhile."""
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if version is not None and version not in known:
        raise ServiceError(f"the store has version {version}; this program knows versions up to {migrations.HEAD}")
    with _connection(url) as connection:
        config.attributes["connection"] = connection
        if version is not None and MigrationContext.configure(connection).get_current_revision() is None:
            command.stamp(config, version)  # a store from before there were scripts
        command.upgrade(config, "head")


@contextmanager
def _connection(url: str) -> Iterator[sa.Connection]:
    """One that has the database to itself until its transaction ends."""
    is_sqlite = url.startswith("sqlite:")
    engine = sa.create_engine(url if is_sqlite else f"postgresql+psycopg://{url.partition('://')[2]}")
    if is_sqlite:
        sa.event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        with engine.begin() as connection:
            if not is_sqlite:
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATING})
            yield connection
    finally:
        engine.dispose()
