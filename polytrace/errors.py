"""Every error polytrace raises, in one short tree.

    PolytraceError
    ├── UserError            the request is wrong: mend it and send it again
    │   ├── GraphError       the program cannot be honoured (unknown op, site, shape, cycle)
    │   ├── WireError        the bytes are not a request, or of another schema version
    │   ├── TooLargeError    the request exceeds a limit; the message has the number and the limit
    │   │   └── ContextError     a prompt, with what it is to go on with, is longer than the model's context
    │   ├── NotFoundError    no such model, job or result
    │   ├── MissingError     the request names contents that are not, or no longer, on the service: upload them
    │   ├── KeyRefusedError  no key, or not one the service knows
    │   ├── ForbiddenError   the service knows the key, but this is for operators
    │   ├── CancelledError   the owner cancelled the request
    │   ├── ConflictError    a deployment of this name is something else, or on its way out
    │   └── RunError         the program failed while it ran (its own rows only)
    ├── CapacityError        the service is full or not ready: try again later
    │   └── QuotaError           the tenant has as much under way, stored or used as it may: later, or ask for more
    └── ServiceError         ours: the service failed, the request is not to blame

An error is also data: `to_fields` and `from_fields` carry it over HTTP and between processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


class PolytraceError(Exception):
    """Base of all. `where` is the user's own `file:line` when one line is to blame, else None."""

    code = "error"

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where

    def __str__(self) -> str:
        return f"{self.message} ({self.where})" if self.where else self.message

    def to_fields(self) -> dict[str, str]:
        """The error as plain strings: `code`, `message` and, when known, `where`."""
        fields = {"code": self.code, "message": self.message}
        return fields | {"where": self.where} if self.where else fields


class UserError(PolytraceError):
    code = "user"


class GraphError(UserError):
    code = "graph"


class WireError(UserError):
    code = "wire"


class TooLargeError(UserError):
    code = "too-large"


class ContextError(TooLargeError):
    code = "context"


class NotFoundError(UserError):
    code = "not-found"


class MissingError(UserError):
    code = "missing"


class KeyRefusedError(UserError):
    code = "key-refused"


class ForbiddenError(UserError):
    code = "forbidden"


class CancelledError(UserError):
    code = "cancelled"


class ConflictError(UserError):
    code = "conflict"


class RunError(UserError):
    code = "run"


class CapacityError(PolytraceError):
    """`retry_after_s`: seconds after which it may be otherwise, None where nobody knows."""

    code = "capacity"

    def __init__(self, message: str, *, where: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, where=where)
        self.retry_after_s = retry_after_s

    def to_fields(self) -> dict[str, str]:
        fields = super().to_fields()
        return fields if self.retry_after_s is None else fields | {"retry_after_s": f"{self.retry_after_s:.3f}"}


class QuotaError(CapacityError):
    code = "quota"


class ServiceError(PolytraceError):
    code = "service"


_BY_CODE: dict[str, type[PolytraceError]] = {
    kind.code: kind
    for kind in (
        UserError,
        GraphError,
        WireError,
        TooLargeError,
        ContextError,
        NotFoundError,
        MissingError,
        KeyRefusedError,
        ForbiddenError,
        CancelledError,
        ConflictError,
        RunError,
        CapacityError,
        QuotaError,
        ServiceError,
    )
}


def from_fields(fields: Mapping[str, str]) -> PolytraceError:
    """The error that `to_fields` described; an unknown code becomes a ServiceError."""
    kind = _BY_CODE.get(fields.get("code", ""), ServiceError)
    error = kind(fields.get("message", "unknown failure"), where=fields.get("where"))
    if isinstance(error, CapacityError) and (seconds := _seconds(fields.get("retry_after_s"))) is not None:
        error.retry_after_s = seconds
    return error


def _seconds(text: str | None) -> float | None:
    """Seconds as `to_fields` writes them; None for anything else."""
    if text is None or re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text) is None:
        return None
    return float(text)
