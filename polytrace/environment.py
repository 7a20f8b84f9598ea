"""Every environment variable that the client reads."""

from __future__ import annotations

import os

URL = "POLYTRACE_URL"  # the service whose jobs `polytrace.job(id)` finds
KEY = "POLYTRACE_KEY"  # the key that a service asks for, when `connect(key=...)` is not given


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
