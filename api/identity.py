"""Who calls: a user of a tenant, in a role. Made once, where a call comes in, and passed on from there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from polytrace.errors import UserError

_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,62}")  # of tenants and users: part of paths, never one with a meaning
_BETWEEN = "~"  # in no name


class Role(Enum):
    USER = "user"
    MONITOR = "monitor"  # reads figures of everybody (`api.callers.check_role`), and can do nothing else
    OPERATOR = "operator"  # sees and steers everything


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One caller."""

    tenant: str
    user: str
    role: Role = Role.USER
    key: str | None = None  # the prefix of the key, where one was given
    models: frozenset[str] | None = None  # deployments that its tenant may use; None: all

    @property
    def owner(self) -> str:
        """Whose everything is that this caller leaves: requests, contents, kept values, edits."""
        return owner_name(self.tenant, self.user)

    @property
    def is_operator(self) -> bool:
        return self.role is Role.OPERATOR

    @property
    def sees_figures(self) -> bool:
        """Whether it may know how the service does and who uses what."""
        return self.role in (Role.OPERATOR, Role.MONITOR)

    def may_use(self, model: str) -> bool:
        """Whether a deployment is one of its tenant's."""
        return self.sees_figures or self.models is None or model in self.models

    def __str__(self) -> str:
        return f"{self.tenant}/{self.user}"


def owner_name(tenant: str, user: str) -> str:
    """One word for a user of a tenant."""
    return f"{tenant}{_BETWEEN}{user}"


def tenant_of(owner: str) -> str:
    """What the names of all owners of the same tenant begin with."""
    return owner.partition(_BETWEEN)[0] + _BETWEEN


def checked_name(name: str, what: str) -> str:
    """The same. Raises UserError when it can be no tenant's and no user's name."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name[:80]!r} cannot be a {what}'s name: up to 63 of a-z, 0-9, '.', '_', '@' and '-'")
    return name


LOCAL = Identity(tenant="default", user="default", role=Role.OPERATOR)  # the one caller of a service without keys
