"""The tables of the store's database and how older ones become those: Alembic's scripts, one a version.

`bring_up` runs when a process opens the store. A database that is up to date costs one query, and Alembic is not
imported.
"""

from __future__ import annotations

from pathlib import Path

FIRST = "0001"  # what a store without a version table has
HEAD = "0004"  # the newest script


def bring_up(url: str, version: str | None) -> None:
    """Makes the tables, or what they lack. Several processes may do so. Raises ServiceError for a newer store."""
    if version == HEAD:
        return
    from api.migrations.running import upgrade

    upgrade(url, version, Path(__file__).parent)
