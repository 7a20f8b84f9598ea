"""The user's own line: the nearest frame that is neither polytrace's nor a library's. A few microseconds."""

from __future__ import annotations

import os
import sys
import sysconfig
from types import FrameType

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARIES = tuple(
    folder + os.sep
    for folder in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
)

# file name -> how it is shown, None for a file that is not the user's
_shown: dict[str, str | None] = {}


def user_line() -> str:
    """`file:line` of the code that called into polytrace; without folders, which are nobody else's business."""
    frame: FrameType | None = sys._getframe(1)
    nearest: FrameType | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        try:
            shown = _shown[name]
        except KeyError:
            shown = _shown[name] = _show(name)
        if shown is not None:
            return f"{shown}:{frame.f_lineno}"
        if nearest is None and not name.startswith(_HERE):
            nearest = frame  # a library that calls polytrace by itself: better than nothing
        frame = frame.f_back
    return f"{os.path.basename(nearest.f_code.co_filename)}:{nearest.f_lineno}" if nearest else "?:0"


def _show(name: str) -> str | None:
    if name.startswith((_HERE, *_LIBRARIES, "<frozen")):
        return None
    return os.path.basename(name)
