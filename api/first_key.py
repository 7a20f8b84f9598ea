"""How anybody comes into a service that has just been started: its first key, or why it must not be started so.

On loopback a store without an operator's key gets one, which is shown once. On any other address there must be a way in
already: a key that a whole network could read from a terminal's log would be none.
"""

from __future__ import annotations

import os

from api.identity import LOCAL, Identity, Role
from api.keys import Keys
from api.settings import ServeSettings, is_loopback, oidc_settings
from polytrace.errors import UserError


def let_in(keys: Keys, settings: ServeSettings) -> str | None:
    """What to tell whoever starts the service; None when there is nothing to tell. Raises UserError with what to do."""
    if settings.key is not None:
        return None
    if not is_loopback(settings.host):
        if keys.are_there() or oidc_settings() is not None:
            return None
        where = "--store FOLDER" if settings.store is None else f"--store {settings.store}"
        raise UserError(
            f"{settings.host} can be reached from other machines, and there is no key yet: make one with "
            f"`polytrace keys make --operator {where}` and serve with the same {where}, or set POLYTRACE_KEY to a long "
            "random text"
        )
    if keys.are_there(of_operators=True):
        return "callers bring a key of this store; `polytrace keys make --operator --store ...` makes another one"
    _, secret = keys.make(LOCAL.tenant, LOCAL.user, AT_THE_STORE, label="first key", role=Role.OPERATOR)
    return f"callers bring this key, which is shown only now: export POLYTRACE_KEY={secret}"


def _who() -> str:
    """The account, for the audit log."""
    return str(os.geteuid()) if hasattr(os, "geteuid") else "local"


# who works on the store itself: nobody of any tenant's, as no tenant has such a name
AT_THE_STORE = Identity(tenant="(store)", user=_who(), role=Role.OPERATOR)
