"""Requests that need a deployment which is not loaded: who may have it loaded, and how often.

`wake` runs inside the transaction that accepts the request. A request that finds its deployment cold or warm is the
cause of a start, and its tenant's quota (`starts_a_day`) is charged; those that come while it starts are not, nor is
one that comes while it is still loaded and only about to rest. Operators are charged and never refused.
"""

from __future__ import annotations

from api.database import Transaction
from api.heating import IS_DESCRIBED
from api.identity import Identity
from api.limits import Terms
from api.usage import day_of, midnight_after
from cluster.requests import DeploymentState
from polytrace.errors import CapacityError, QuotaError

RETRY_S = 60.0  # after a start that failed, before a request is the cause of another one


def wake(db: Transaction, terms: Terms, caller: Identity, now: float) -> bool:
    """The deployment, which was to rest, is to be hot; whether that is a start.

    Raises CapacityError for one that requests do not load, or that could not be loaded a moment ago, QuotaError when
    the tenant has had its starts of this day.
    """
    model, tenant = terms.model, terms.tenant
    on_demand, state, why, since, is_described = db.execute(
        f"SELECT on_demand, state, heat_why, heat_since, {IS_DESCRIBED} FROM deployments WHERE model = ?",
        (model,),
    ).fetchone()
    if not on_demand or not is_described:
        lack = "requests do not load it" if is_described else "it was never loaded"
        raise CapacityError(f"{model} is not loaded ({why}), and {lack}: an operator does, `polytrace models load`")
    if why.startswith("failed: ") and now - since < RETRY_S:
        raise CapacityError(
            f"{model} could not be loaded {now - since:.0f} s ago ({why.removeprefix('failed: ')})",
            retry_after_s=RETRY_S - (now - since),
        )
    is_start = not DeploymentState(state).is_serving
    if is_start:
        most = terms.tenants.starts_a_day
        if most is not None and not caller.is_operator and (had := starts_today(db, tenant, now)) >= most:
            told = f"{model} is not loaded, and tenant {tenant} has had {had} of {most} models loaded"
            raise QuotaError(f"{told} today (UTC): use one that is", retry_after_s=midnight_after(now) - now)
        db.execute(
            "INSERT INTO starts (tenant, user_name, model, day, at) VALUES (?, ?, ?, ?, ?)",
            (tenant, caller.user, model, day_of(now), now),
        )
    db.execute("UPDATE deployments SET heat = 'hot', heat_why = '', heat_since = ? WHERE model = ?", (now, model))
    return is_start


def starts_today(db: Transaction, tenant: str, now: float) -> int:
    """How many starts a tenant's requests were the cause of since midnight UTC."""
    query = "SELECT count(*) FROM starts WHERE tenant = ? AND day = ?"
    return int(db.execute(query, (tenant, day_of(now))).fetchone()[0])
