"""API keys in the store: made once and shown once; only a hash stays.

    pt_1f0c5ab29e77_Zk3...    what a key begins with, 15 characters, finds it; the rest is 256 random bits

So many bits cannot be guessed, whoever has the hash: a fast hash (SHA-256) does, and a call's key is checked in
microseconds. What can be guessed is no key: `Keys.find` is asked only about texts of this form.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from api.audit import write
from api.database import Database, Transaction
from api.identity import Identity, Role, checked_name
from api.tenants import add_user, models_of, user_in
from polytrace.errors import ConflictError, KeyRefusedError, NotFoundError, UserError

_FORM = re.compile(r"(pt_[0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_PREFIX = re.compile(r"pt_[0-9a-f]{12}")
MAX_LABEL = 100
MAX_KEYS = 1000  # of one user that are still good
MAX_ENDED = 10_000  # of one user, of those that are remembered
REMEMBERED_S = 30 * 24 * 3600.0  # after a key's end, for lists and for what a refusal says
_KEY = (  # what `_key` reads
    "SELECT prefix, keys.tenant, user_name, label, keys.created, expires, revoked, last_used, coalesce(role, 'user') "
    "FROM keys LEFT JOIN users ON users.tenant = keys.tenant AND users.name = user_name"
)
_IS_GOOD = "revoked IS NULL AND (expires IS NULL OR expires > ?)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of a key: all but the key itself. Times are seconds since the epoch."""

    prefix: str
    tenant: str
    user: str
    role: Role  # of the user, now
    label: str
    created: float
    expires: float | None
    revoked: float | None
    last_used: float | None  # to about ten seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Whose a key is, that is good now."""

    identity: Identity
    expires: float | None


class Keys:
    """The store's keys. `by` is who asks, for the audit log; `now` is the clock that they expire by. Any thread."""

    def __init__(self, db: Database, now: Callable[[], float] = time.time) -> None:
        self._db = db
        self.now = now

    def make(
        self,
        tenant: str,
        user: str,
        by: Identity,
        *,
        label: str = "",
        expires: float | None = None,
        role: Role | None = None,
    ) -> tuple[Key, str]:
        """A new key, and the secret that nobody can be told again. Makes the user when there is none yet.

        `role` of the user: of a new one it is USER if not said; ConflictError when a known one has another.
        NotFoundError when there is no such tenant. One that a key which expires asks for ends with it at the latest.
        """
        if len(label) > MAX_LABEL or not label.isprintable():
            raise UserError(f"a key's label has at most {MAX_LABEL} printable characters")
        if expires is not None and not expires > self.now():
            raise UserError("the key would have expired already")
        with self._db.transaction() as db:
            known = user_in(db, tenant, user) or add_user(db, tenant, user, role or Role.USER, self.now())
            if role is not None and known.role is not role:
                raise ConflictError(f"{tenant}/{user} is {known.role.value}, not {role.value}: change the user first")
            ends = self._no_longer_than(db, by, expires)
            made, secret = self._insert(db, tenant, user, known.role, label, ends)
            write(db, self.now(), by, "keys.make", made.prefix, {"owner": f"{tenant}/{user}", "expires": made.expires})
        return made, secret

    def known(self, *, tenant: str | None = None, user: str | None = None) -> list[Key]:
        """All, or those of a tenant or user; the newest first."""
        asked: dict[str, str] = {}
        if tenant is not None:
            asked["keys.tenant"] = checked_name(tenant, "tenant")
        if user is not None:
            asked["user_name"] = checked_name(user, "user")
        where = " AND ".join(f"{column} = ?" for column in asked) or "1 = 1"
        rows = self._db.rows(f"{_KEY} WHERE {where} ORDER BY keys.created DESC, prefix", [*asked.values()])
        return [_key(row) for row in rows]

    def get(self, prefix: str) -> Key:
        """Raises NotFoundError."""
        if not _PREFIX.fullmatch(prefix):
            raise unknown_key(prefix)
        rows = self._db.rows(f"{_KEY} WHERE prefix = ?", (prefix,))
        if not rows:
            raise unknown_key(prefix)
        return _key(rows[0])

    def revoke(self, prefix: str, by: Identity) -> Key:
        """From now on it is refused; one that was revoked stays so. Raises NotFoundError."""
        with self._db.transaction() as db:
            self._revoke(db, prefix, self.now())
            write(db, self.now(), by, "keys.revoke", prefix, {})
        return self.get(prefix)

    def rotate(self, prefix: str, by: Identity, *, grace_s: float = 0.0) -> tuple[Key, str]:
        """A new key in the place of one, with its label and as long a life; the old one goes on for `grace_s`.

        Raises NotFoundError, ConflictError when the old one is not good any more.
        """
        old = self.get(prefix)
        now = self.now()
        with self._db.transaction() as db:
            is_good = db.execute(f"SELECT 1 FROM keys WHERE prefix = ? AND {_IS_GOOD}", (prefix, now)).fetchone()
            if not is_good:
                raise ConflictError(f"{prefix} is not good any more: make a new key instead")
            expires = None if old.expires is None else now + (old.expires - old.created)
            if by.key != prefix:  # a key may be put in its own place again and again, but not another one live longer
                expires = self._no_longer_than(db, by, expires)
            made, secret = self._insert(db, old.tenant, old.user, old.role, old.label, expires)
            if grace_s > 0:
                ends = now + grace_s if old.expires is None else min(old.expires, now + grace_s)
                db.execute("UPDATE keys SET expires = ? WHERE prefix = ?", (ends, prefix))
            else:
                self._revoke(db, prefix, now)
            write(db, self.now(), by, "keys.rotate", prefix, {"to": made.prefix, "grace_s": grace_s})
        return made, secret

    def find(self, secret: str) -> Holder:
        """Who holds a key. Raises KeyRefusedError with the reason, which only one who has the key learns."""
        form = _FORM.fullmatch(secret)
        rows = form and self._db.rows(
            "SELECT hash, keys.tenant, user_name, expires, revoked, role, users.disabled, tenants.disabled, models "
            "FROM keys JOIN users ON users.tenant = keys.tenant AND users.name = keys.user_name "
            "JOIN tenants ON tenants.name = keys.tenant WHERE prefix = ?",
            (form[1],),
        )
        if not form or not rows or not hmac.compare_digest(bytes(rows[0][0]), hash_of(secret)):
            raise KeyRefusedError(
                "this service does not know the key: it is of another store, or not whole; ask your operators for one, "
                "or make one where the service runs (`polytrace keys make --store STORE`)"
            )
        _, tenant, user, expires, revoked, role, is_user_out, is_tenant_out, models = rows[0]
        prefix = form[1]
        if revoked is not None:
            raise KeyRefusedError(f"the key {prefix} was revoked: use another, or ask your operators for one")
        if expires is not None and expires <= self.now():
            raise KeyRefusedError(f"the key {prefix} expired at {_utc(expires)}: make another")
        if is_user_out or is_tenant_out:
            who = f"{tenant}/{user}" if is_user_out else tenant
            raise KeyRefusedError(f"{who} is disabled on this service: ask your operators")
        allowed = models_of(models)
        identity = Identity(
            tenant=tenant,
            user=user,
            role=Role(role),
            key=prefix,
            models=None if allowed is None else frozenset(allowed),
        )
        return Holder(identity=identity, expires=expires)

    def has(self, secret: str) -> bool:
        """Whether a text is called as a key of this store is, one that is good or not."""
        form = _FORM.fullmatch(secret)
        return bool(form and self._db.rows("SELECT 1 FROM keys WHERE prefix = ?", (form[1],)))

    def are_there(self, *, of_operators: bool = False) -> bool:
        """Whether anybody, or an operator, can come in by key."""
        role = "AND role = 'operator'" if of_operators else ""
        return bool(
            self._db.rows(
                "SELECT 1 FROM keys JOIN users ON users.tenant = keys.tenant AND users.name = keys.user_name "
                f"WHERE {_IS_GOOD} {role} LIMIT 1",
                (self.now(),),
            )
        )

    def note_used(self, used: Mapping[str, float]) -> None:
        """When keys were used last."""
        with self._db.transaction(is_durable=False) as db:
            db.executemany(
                "UPDATE keys SET last_used = ? WHERE prefix = ?", [(when, prefix) for prefix, when in used.items()]
            )

    # --- inside

    def _insert(
        self, db: Transaction, tenant: str, user: str, role: Role, label: str, expires: float | None
    ) -> tuple[Key, str]:
        now = self.now()
        db.execute(
            "DELETE FROM keys WHERE tenant = ? AND user_name = ? AND coalesce(revoked, expires) < ?",
            (tenant, user, now - REMEMBERED_S),
        )
        good, known = db.execute(
            f"SELECT coalesce(sum(CASE WHEN {_IS_GOOD} THEN 1 ELSE 0 END), 0), count(*) FROM keys "
            "WHERE tenant = ? AND user_name = ?",
            (now, tenant, user),
        ).fetchone()
        if good >= MAX_KEYS:
            raise ConflictError(f"{tenant}/{user} has {good} keys, the most there can be: revoke some")
        if known - good >= MAX_ENDED:
            raise ConflictError(f"{tenant}/{user} had {known - good} keys that ended lately: use those that there are")
        prefix = f"pt_{secrets.token_hex(6)}"
        secret = f"{prefix}_{secrets.token_urlsafe(32)}"
        db.execute(
            "INSERT INTO keys (prefix, hash, tenant, user_name, label, created, expires) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (prefix, hash_of(secret), tenant, user, label, now, expires),
        )
        made = Key(
            prefix=prefix,
            tenant=tenant,
            user=user,
            role=role,
            label=label,
            created=now,
            expires=expires,
            revoked=None,
            last_used=None,
        )
        return made, secret

    def _no_longer_than(self, db: Transaction, by: Identity, expires: float | None) -> float | None:
        """The end of what a key makes: its own at the latest."""
        if by.key is None or by.is_operator:
            return expires
        row = db.execute("SELECT expires FROM keys WHERE prefix = ?", (by.key,)).fetchone()
        return _earliest(expires, row[0] if row else None)

    def _revoke(self, db: Transaction, prefix: str, now: float) -> None:
        if db.execute("UPDATE keys SET revoked = coalesce(revoked, ?) WHERE prefix = ?", (now, prefix)).rowcount == 0:
            raise unknown_key(prefix)


def hash_of(secret: str) -> bytes:
    """What stays of a key."""
    return hashlib.sha256(secret.encode()).digest()


def unknown_key(prefix: str) -> NotFoundError:
    return NotFoundError(f"there is no key {prefix[:80]!r} here; a key is named by its first 15 characters, pt_...")


def _earliest(*times: float | None) -> float | None:
    return min((one for one in times if one is not None), default=None)


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def _key(row: Sequence[Any]) -> Key:
    return Key(
        prefix=row[0],
        tenant=row[1],
        user=row[2],
        label=row[3],
        created=row[4],
        expires=row[5],
        revoked=row[6],
        last_used=row[7],
        role=Role(row[8]),
    )
