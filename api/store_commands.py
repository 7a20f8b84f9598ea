"""`polytrace store copy`: a store of a folder becomes one of PostgreSQL and S3, while no service runs on it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Annotated

import typer

from api.console import errors, progress

store = typer.Typer(no_args_is_help=True, help="What a service has on disk, while it does not run.")


@store.callback()
def _group() -> None:
    """Makes `copy` a command of its own name though it is the only one."""


@store.command()
def copy(
    folder: Annotated[Path, typer.Argument(help="The --store of the service so far; it stays as it is.")],
    database: Annotated[
        str, typer.Option(envvar="POLYTRACE_DATABASE", help="postgresql://... to copy to; it must be empty.")
    ],
    objects: Annotated[
        str | None,
        typer.Option(envvar="POLYTRACE_OBJECTS", help="s3://BUCKET/PREFIX for the files; default: FOLDER keeps them."),
    ] = None,
) -> None:
    """Copy the requests, results, contents, edits and deployments of FOLDER to PostgreSQL, and to S3."""
    from api.copying import copy_store
    from api.store import Store
    from polytrace.errors import UserError

    with errors():
        if not (folder / "store.db").exists():
            raise UserError(f"{folder} has no store.db: name the folder that `polytrace serve --store` was given")
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"a service runs on {folder}: stop it first") from None
            with progress(f"copying {folder}") as report:
                source = Store(folder)
                target = Store(folder, database=database, objects=objects)
                try:
                    if not target.hold():
                        raise UserError("a service runs on that database: stop it first")
                    copied = copy_store(source, target, report)
                finally:
                    source.close()
                    target.close()
                where = f"--database ... {'--objects ...' if objects else f'--store {folder}'}"
                report(f"ready: {copied.rows} rows and {copied.files} files; serve it with {where}")
