"""The service's store as this process' environment says where it is: what the supervisor told its children.

Not in their arguments, which every user of the machine can read: a database's URL may have a password in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from api.settings import DEFAULT_QUOTA_BYTES, from_environment
from api.store import Store

DATABASE, OBJECTS = "POLYTRACE_DATABASE", "POLYTRACE_OBJECTS"


def open_store(folder: Path, *, quota_bytes: int = DEFAULT_QUOTA_BYTES, counts_as: str = "gateway") -> Store:
    """The store whose folder this is, with its database and its objects."""
    return Store(
        folder,
        database=from_environment(DATABASE, str, None),
        objects=from_environment(OBJECTS, str, None),
        quota_bytes=quota_bytes,
        counts_as=counts_as,
    )


def database_of(folder: Path) -> str:
    """The URL of the database of the store whose folder this is."""
    return from_environment(DATABASE, str, None) or f"sqlite:///{folder.resolve() / 'store.db'}"


def places_in(environment: Mapping[str, str], database: str | None, objects: str | None) -> dict[str, str]:
    """The environment of a child that is to open the same store."""
    own = {name: value for name, value in environment.items() if name not in (DATABASE, OBJECTS)}
    return own | {name: url for name, url in ((DATABASE, database), (OBJECTS, objects)) if url is not None}


def forget_database() -> None:
    """Processes that this one starts from now on do not learn where the database is."""
    os.environ.pop(DATABASE, None)
