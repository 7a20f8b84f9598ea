"""A part of the store that does not answer now: its database, or the place of its objects."""

from __future__ import annotations

from polytrace.errors import CapacityError


class AwayError(CapacityError):
    """It does not answer, or has no room. `may_be_done`: what was asked may have been done all the same, so whoever
    asks again asks for what may be done twice.
    """

    def __init__(self, message: str, *, may_be_done: bool = False) -> None:
        super().__init__(message)
        self.may_be_done = may_be_done
