"""Who has kept values and states: a service (`polytrace.http_keeper`) or this process (`engine.keeping`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from polytrace.errors import NotFoundError
from polytrace.tensors import RawTensor, num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptEntry:
    """What a keeper tells of a kept value or a state."""

    name: str
    is_state: bool
    dtype: str
    shape: tuple[int, ...]
    digest: str  # of its content now
    version: int  # how often it has been kept or updated under this name
    request: str | None  # the one that left it as it is
    expires: float | None  # seconds since the epoch; None: when somebody deletes it

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


class Keeper(Protocol):
    """Who has kept values and states. NotFoundError where there is none of a name."""

    def entries(self, *, is_state: bool, request: str | None = None) -> list[KeptEntry]:
        """All of them, by name; or those that a request left."""

    def entry(self, name: str, *, is_state: bool) -> KeptEntry: ...

    def tensor(self, entry: KeptEntry) -> RawTensor:
        """The kept value as a constant of a request."""

    def fetch(self, name: str, digest: str, *, is_state: bool) -> RawTensor:
        """The bytes of the content `digest`, which `name` has or had; of a state's content now."""

    def delete(self, name: str, *, is_state: bool) -> None: ...

    def begin_state(self, name: str, init: RawTensor) -> KeptEntry:
        """The state of this name, with this content when there is none yet."""


def not_found(name: str, is_state: bool) -> NotFoundError:
    """There is none of this name."""
    what = "state" if is_state else "kept value"
    return NotFoundError(f"there is no {what} {name!r} here: it has expired, was deleted, or never was")
