"""What tenants have used: a row a tenant, user, deployment and day (UTC), added to when a request ends.

Measured, not certified: token-layers, bytes and seconds are the receipt's. A request that failed by its own fault, or
was cancelled while it ran, counts with what it ran until then; one that failed by the service's costs nothing.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta

from api.database import Database, Transaction
from cluster.requests import Finished
from polytrace.errors import CapacityError, ServiceError, UserError

_SUMS = ("requests", "failed", "tokens", "token_layers", "moved_bytes", "result_bytes", "run_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one user has used of one deployment in a month."""

    month: str  # YYYY-MM
    tenant: str
    user: str
    model: str
    requests: int  # that have ended, the failed ones too
    failed: int
    tokens: int
    token_layers: int
    moved_bytes: int
    result_bytes: int
    run_seconds: float


def day_of(at: float) -> str:
    """The UTC day of a time, as the table has it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def midnight_after(at: float) -> float:
    """When the UTC day of a time is over."""
    day = datetime.fromtimestamp(at, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (day + timedelta(days=1)).timestamp()


def enter(db: Transaction, ended: Finished, whose: Sequence[str], tokens: int, now: float) -> None:
    """Takes in a request that has ended; `whose`: tenant, user and deployment; `tokens` as certified."""
    is_ours = isinstance(ended.error, (ServiceError, CapacityError))
    has_run = not is_ours and (ended.error is None or ended.run_seconds > 0)
    values = (
        1,
        int(ended.error is not None),
        (tokens if ended.tokens is None else ended.tokens) if has_run else 0,
        ended.token_layers if has_run else 0,
        ended.moved_bytes if has_run else 0,
        ended.size or 0 if ended.error is None else 0,
        ended.run_seconds if has_run else 0.0,
    )
    more = ", ".join(f"{name} = usage.{name} + excluded.{name}" for name in _SUMS)
    db.execute(
        f"INSERT INTO usage (tenant, user_name, model, day, {', '.join(_SUMS)}) "
        f"VALUES ({', '.join('?' * (4 + len(_SUMS)))}) "
        f"ON CONFLICT (tenant, user_name, model, day) DO UPDATE SET {more}",
        (*whose, day_of(now), *values),
    )


def usage_of(db: Database, month: str, tenant: str | None = None, user: str | None = None) -> list[Usage]:
    """By tenant, user and deployment, of one month: everybody's, a tenant's, or one user's."""
    check_month(month)
    sums = ", ".join(f"sum({name})" for name in _SUMS)
    where, values = "substr(day, 1, 7) = ?", [month]
    for column, wanted in (("tenant", tenant), ("user_name", user)):
        if wanted is not None:
            where, values = f"{where} AND {column} = ?", [*values, wanted]
    rows = db.rows(
        f"SELECT tenant, user_name, model, {sums} FROM usage WHERE {where} "
        "GROUP BY tenant, user_name, model ORDER BY tenant, user_name, model",
        values,
    )
    return [
        Usage(
            month=month,
            tenant=row[0],
            user=row[1],
            model=row[2],
            requests=int(row[3]),  # PostgreSQL adds integers up as decimals
            failed=int(row[4]),
            tokens=int(row[5]),
            token_layers=int(row[6]),
            moved_bytes=int(row[7]),
            result_bytes=int(row[8]),
            run_seconds=float(row[9]),
        )
        for row in rows
    ]


def as_csv(entries: Iterable[Usage]) -> str:
    """With a line of names. A name that a spreadsheet would take for a formula gets a quote in front."""
    text = io.StringIO()
    names = [each.name for each in fields(Usage)]
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(names)
    for entry in entries:
        writer.writerow([_as_text(getattr(entry, name)) for name in names])
    return text.getvalue()


def check_month(month: str) -> str:
    """The same. Raises UserError when it is none."""
    if not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", month):
        raise UserError(f"{month[:20]!r} is no month: YYYY-MM")
    return month


def _as_text(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@" else value
