"""Every environment variable that the client reads."""

from __future__ import annotations

import os

URL = "POLYTRACE_URL"  # the service whose jobs `polytrace.job(id)` finds
KEY = "POLYTRACE_KEY"  # the key that a service asks for, when `connect(key=...)` is not given
TRACEBACK = "POLYTRACE_TRACEBACK"  # "full": errors at the end of a trace show polytrace's own frames, too


def has_full_tracebacks() -> bool:
    """Whether errors keep frames that are not the user's."""
    value = os.environ.get(TRACEBACK, "").strip()
    if value not in ("", "short", "full"):
        raise ValueError(f"{TRACEBACK} is {value!r}: it is full or short")
    return value == "full"


def key() -> str | None:
    """The user's key, None when it is not set or empty."""
    value = os.environ.get(KEY, "").strip()
    if not value.isascii() or not value.isprintable():
        raise ValueError(f"{KEY} is {value!r}: a key has printable ASCII characters only")
    return value or None


def is_key(text: str) -> bool:
    """Whether a key is that of the environment."""
    return bool(text) and text == os.environ.get(KEY, "").strip()


def url() -> str | None:
    """The user's service, None when it is not set or empty."""
    return os.environ.get(URL, "").strip() or None
