"""Whether a client and a service understand each other: told in headers, and looked at when a client connects."""

from __future__ import annotations

from collections.abc import Mapping

from polytrace.errors import WireError
from polytrace.program import __version__
from polytrace.wire import VERSION

PROGRAM_HEADER = "X-Polytrace-Version"  # of the program
WIRE_HEADER = "X-Polytrace-Wire"  # of what requests, results and descriptions look like
# The files' version, and behind the point that of descriptions, which are stored by services only: another one whenever
# a field of `polytrace.description` comes, goes or is renamed.
SPOKEN = f"{VERSION}.1"


def version_headers() -> dict[str, str]:
    """What a service tells of itself."""
    return {PROGRAM_HEADER: __version__, WIRE_HEADER: SPOKEN}


def check_versions(url: str, headers: Mapping[str, str]) -> None:
    """Raises WireError, with what to install, when a service speaks another version of the wire.

    A service that says nothing is from before versions were told.
    """
    theirs, wire = headers.get(PROGRAM_HEADER), headers.get(WIRE_HEADER)
    if wire == SPOKEN:
        return
    if theirs is None or wire is None:
        raise WireError(f"{url} does not say its version: it is no polytrace service, or one older than {__version__}")
    told = f"{url} is polytrace {theirs} with version {wire} of the wire, this client is {__version__} with {SPOKEN}"
    raise WireError(f"{told}: install polytrace=={theirs} here, or ask for a service of {__version__}")
