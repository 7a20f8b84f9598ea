"""Tenants and their users in the store: who they are, what weight and limits they have, which deployments they may use.

The tenant `default` is always there: it is whose the first key of a store is, and the one of a service without others.
Knows nothing of keys' secrets (`api.keys`) nor of what limits mean (`api.quotas`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from api.audit import write
from api.database import Database, Transaction
from api.identity import LOCAL, Identity, Role, checked_name, owner_name
from api.limits import ALL
from polytrace.errors import ConflictError, NotFoundError, UserError

MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
MAX_MODELS = 1000
_TENANT = "name, created, disabled, weight, limits, models"
_USER = "tenant, name, role, created, disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """An organisation."""

    name: str
    created: float  # seconds since the epoch
    is_disabled: bool = False  # its keys and tokens are refused
    weight: float = 1.0  # its share of a deployment beside others'
    limits: Mapping[str, int]  # by the names of `api.limits.ALL`
    models: tuple[str, ...] | None = None  # deployments that it may use; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Somebody of a tenant."""

    tenant: str
    name: str
    role: Role
    created: float
    is_disabled: bool = False


class Tenants:
    """The store's tenants and users. `by` is who asks, for the audit log. Any thread."""

    def __init__(self, db: Database, now: Callable[[], float] = time.time) -> None:
        self._db = db
        self._now = now

    # --- tenants

    def known(self) -> list[Tenant]:
        return [_tenant(row) for row in self._db.rows(f"SELECT {_TENANT} FROM tenants ORDER BY name")]

    def get(self, name: str) -> Tenant:
        """Raises NotFoundError."""
        rows = self._db.rows(f"SELECT {_TENANT} FROM tenants WHERE name = ?", (checked_name(name, "tenant"),))
        if not rows:
            raise unknown_tenant(name)
        return _tenant(rows[0])

    def add(self, name: str, by: Identity, **terms: Any) -> Tenant:
        """A new tenant; `terms` as for `change`. Raises ConflictError when there is one of this name."""
        made = _with(Tenant(name=checked_name(name, "tenant"), created=self._now(), limits={}), terms)
        with self._db.transaction() as db:
            if db.execute("SELECT 1 FROM tenants WHERE name = ?", (name,)).fetchone():
                raise ConflictError(f"there is a tenant {name} already: change it, or choose another name")
            db.execute(f"INSERT INTO tenants ({_TENANT}) VALUES (?, ?, ?, ?, ?, ?)", _row(made))
            write(db, self._now(), by, "tenants.add", name, terms)
        return made

    def change(self, name: str, by: Identity, **terms: Any) -> Tenant:
        """Changes `is_disabled`, `weight`, `models` or `limits`: of these, the ones named, and None takes one away.

        Raises NotFoundError, UserError for what they cannot be.
        """
        with self._db.transaction() as db:
            row = db.execute(
                f"SELECT {_TENANT} FROM tenants WHERE name = ?", (checked_name(name, "tenant"),)
            ).fetchone()
            if row is None:
                raise unknown_tenant(name)
            changed = _with(_tenant(row), terms)
            _, _, *rest = _row(changed)
            db.execute(
                "UPDATE tenants SET disabled = ?, weight = ?, limits = ?, models = ? WHERE name = ?", (*rest, name)
            )
            write(db, self._now(), by, "tenants.change", name, terms)
        return changed

    def remove(self, name: str, by: Identity) -> None:
        """Forgets a tenant, its users and keys. Raises NotFoundError, ConflictError while anything of its is stored: a
        later tenant of the same name would have it.
        """
        if name == LOCAL.tenant:
            raise ConflictError(f"the tenant {name} is the service's own and stays; it can be disabled")
        with self._db.transaction() as db:
            if db.execute("DELETE FROM tenants WHERE name = ?", (checked_name(name, "tenant"),)).rowcount == 0:
                raise unknown_tenant(name)
            if left := _left_of(db, name):
                told = ", ".join(f"{count} {what}" for what, count in left.items())
                raise ConflictError(f"{name} has {told}: purge the tenant first; until then it can be disabled")
            db.execute("DELETE FROM users WHERE tenant = ?", (name,))
            db.execute("DELETE FROM keys WHERE tenant = ?", (name,))
            db.execute("DELETE FROM shares WHERE tenant = ?", (name,))
            write(db, self._now(), by, "tenants.remove", name, {})

    # --- users

    def users(self, tenant: str) -> list[User]:
        """Raises NotFoundError."""
        self.get(tenant)
        rows = self._db.rows(f"SELECT {_USER} FROM users WHERE tenant = ? ORDER BY name", (tenant,))
        return [_user(row) for row in rows]

    def set_user(
        self, tenant: str, name: str, by: Identity, *, role: Role | None = None, is_disabled: bool | None = None
    ) -> User:
        """Makes a user, or changes one. Raises NotFoundError when there is no such tenant."""
        with self._db.transaction() as db:
            user = user_in(db, tenant, name) or add_user(db, tenant, name, Role.USER, self._now())
            told: dict[str, Any] = {}
            if role is not None:
                user, told["role"] = replace(user, role=role), role.value
            if is_disabled is not None:
                user, told["is_disabled"] = replace(user, is_disabled=is_disabled), is_disabled
            db.execute(
                "UPDATE users SET role = ?, disabled = ? WHERE tenant = ? AND name = ?",
                (user.role.value, int(user.is_disabled), tenant, name),
            )
            write(db, self._now(), by, "users.set", f"{tenant}/{name}", told)
        return user

    def standing(self, tenant: str, user: str) -> tuple[Tenant | None, User | None]:
        """What is known of somebody whom another one vouches for."""
        tenants = self._db.rows(f"SELECT {_TENANT} FROM tenants WHERE name = ?", (tenant,))
        users = self._db.rows(f"SELECT {_USER} FROM users WHERE tenant = ? AND name = ?", (tenant, user))
        return (_tenant(tenants[0]) if tenants else None), (_user(users[0]) if users else None)


def user_in(db: Transaction, tenant: str, name: str) -> User | None:
    """A user, inside a transaction. Raises NotFoundError when there is no such tenant."""
    checked_name(name, "user")
    if not db.execute("SELECT 1 FROM tenants WHERE name = ?", (checked_name(tenant, "tenant"),)).fetchone():
        raise unknown_tenant(tenant)
    row = db.execute(f"SELECT {_USER} FROM users WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    return _user(row) if row else None


def add_user(db: Transaction, tenant: str, name: str, role: Role, now: float) -> User:
    """A new user, after `user_in` has found none."""
    user = User(tenant=tenant, name=name, role=role, created=now)
    db.execute(f"INSERT INTO users ({_USER}) VALUES (?, ?, ?, ?, 0)", (tenant, name, role.value, user.created))
    return user


def unknown_tenant(name: str) -> NotFoundError:
    return NotFoundError(f"there is no tenant {name[:80]!r} here")


def models_of(text: str | None) -> tuple[str, ...] | None:
    """The deployments that a row names; None: all."""
    return None if text is None else tuple(json.loads(text))


def _with(tenant: Tenant, terms: Mapping[str, Any]) -> Tenant:
    changed = replace(tenant, **{name: value for name, value in terms.items() if name != "limits"})
    limits = dict(tenant.limits)
    for name, value in (terms.get("limits") or {}).items():
        if name not in ALL:
            raise UserError(f"{name[:80]!r} is no limit; there are {', '.join(ALL)}")
        if value is None:
            limits.pop(name, None)
        elif value < 0:
            raise UserError(f"the limit {name} is {value}; it is at least 0, or null for the service's own")
        else:
            limits[name] = value
    if not (math.isfinite(changed.weight) and MIN_WEIGHT <= changed.weight <= MAX_WEIGHT):
        raise UserError(f"the weight is {changed.weight}; it is from {MIN_WEIGHT:f} to {MAX_WEIGHT:.0f}")
    if changed.models is not None:
        if len(changed.models) > MAX_MODELS:
            raise UserError(f"{len(changed.models)} deployments are named; at most {MAX_MODELS} can be")
        changed = replace(changed, models=tuple(sorted(set(changed.models))))
    return replace(changed, limits=limits)


def _left_of(db: Transaction, tenant: str) -> dict[str, int]:
    """What is stored of a tenant, by what it is."""
    begin = owner_name(tenant, "")
    counts = {}
    for table, what in (
        ("requests", "requests"),
        ("contents", "contents"),
        ("kept", "kept values and states"),
        ("edits", "versions of edits"),
    ):
        (count,) = db.execute(
            f"SELECT count(*) FROM {table} WHERE substr(owner, 1, ?) = ?", (len(begin), begin)
        ).fetchone()
        counts[what] = int(count)
    return {what: count for what, count in counts.items() if count}


def _tenant(row: Sequence[Any]) -> Tenant:
    return Tenant(
        name=row[0],
        created=row[1],
        is_disabled=bool(row[2]),
        weight=row[3],
        limits=json.loads(row[4]),
        models=models_of(row[5]),
    )


def _row(tenant: Tenant) -> tuple[Any, ...]:
    models = None if tenant.models is None else json.dumps(tenant.models)
    limits = json.dumps(dict(tenant.limits))
    return (tenant.name, tenant.created, int(tenant.is_disabled), tenant.weight, limits, models)


def _user(row: Sequence[Any]) -> User:
    return User(tenant=row[0], name=row[1], role=Role(row[2]), created=row[3], is_disabled=bool(row[4]))
