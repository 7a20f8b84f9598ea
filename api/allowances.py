"""What callers may still ask for: looked up before a request is received, and again when it was checked."""

from __future__ import annotations

from collections.abc import Callable

from api import quotas
from api.database import Database
from api.limits import Demand, Terms
from polytrace.certificate import LimitLine


class Allowances:
    """Its methods may be called from any thread."""

    def __init__(self, db: Database, now: Callable[[], float]) -> None:
        self._db = db
        self._now = now

    def limit_texts(self, tenant: str, model: str) -> tuple[str | None, str | None]:
        """The limits of a tenant and of a deployment as they stand there, None where there is no such."""
        own = self._db.rows("SELECT limits FROM tenants WHERE name = ?", (tenant,))
        of_model = self._db.rows("SELECT limits FROM deployments WHERE model = ?", (model,))
        return (own[0][0] if own else None), (of_model[0][0] if of_model else None)

    def accepted_since(self, at: float, *, tenant: str | None = None, model: str | None = None) -> int:
        """How many requests of a tenant, or to a deployment, were accepted since then."""
        which, value = ("tenant", tenant) if tenant is not None else ("model", model)
        query = f"SELECT count(*) FROM requests WHERE {which} = ? AND created >= ?"
        return int(self._db.rows(query, (value, at))[0][0])

    def lines(self, terms: Terms, demand: Demand) -> list[LimitLine]:
        """What a request, and what is under way, take of its tenant's quotas."""
        with self._db.transaction(is_durable=False) as db:
            return quotas.used_lines(db, terms, demand, self._now())

    def check(self, terms: Terms, demand: Demand, *, result_ttl_s: float) -> None:
        """Raises what `Store.add` would."""
        with self._db.transaction(is_durable=False) as db:
            quotas.check(db, terms, demand, self._now(), result_ttl_s=result_ttl_s)

    def check_stored(self, tenant: str, num_bytes: int, most: int) -> None:
        """Raises QuotaError, or TooLargeError, when a tenant may not store so much more."""
        with self._db.transaction(is_durable=False) as db:
            quotas.check_stored(db, tenant, num_bytes, most, "the upload", self._now())
