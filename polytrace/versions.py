"""Whether a client and a service understand each other: told in headers, and looked at when a client connects."""

from __future__ import annotations

from collections.abc import Mapping

from polytrace.errors import WireError
from polytrace.program import __version__
from polytrace.wire import VERSION

PROGRAM_HEADER = "X-Polytrace-Version"  # of the program
WIRE_HEADER = "X-Polytrace-Wire"  # of what requests and results look like


def version_headers() -> dict[str, str]:
    """What a service tells of itself."""
    return {PROGRAM_HEADER: __version__, WIRE_HEADER: VERSION}


def check_versions(url: str, headers: Mapping[str, str]) -> None:
    """Raises WireError, with what to install, when a service speaks another version of the wire.

    A service that says nothing is from before versions were told.
    """
    theirs, wire = headers.get(PROGRAM_HEADER), headers.get(WIRE_HEADER)
    if wire == VERSION:
        return
    if theirs is None or wire is None:
        raise WireError(f"{url} does not say its version: it is no polytrace service, or one older than {__version__}")
    told = f"{url} is polytrace {theirs} with version {wire} of the wire, this client is {__version__} with {VERSION}"
    raise WireError(f"{told}: install polytrace=={theirs} here, or ask for a service of {__version__}")
