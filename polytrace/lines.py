"""The user's own line: the nearest frame that is neither polytrace's nor a library's. About a microsecond."""

from __future__ import annotations

import os
import sys
import sysconfig
from types import CodeType, FrameType

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_HERE = tuple([os.path.join(_ROOT, room, "") for room in ("polytrace", "engine", "scheduling")])  # in users' processes
_LIBRARIES = tuple(
    folder + os.sep
    for folder in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
)
_TORCH = tuple([os.path.join(folder, "torch", "") for folder in _LIBRARIES])

_MAX_CODES = 4096

# file name -> how it is shown, "" for a file of polytrace's own, None for a library's
_shown: dict[str, str | None] = {}
# id of a code object -> the object, which keeps its id from another's, and the lines of its instructions
_lines: dict[int, tuple[CodeType, dict[int, str]]] = {}


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
        if shown:
            return _line(frame, shown)
        if shown is None and nearest is None:
            nearest = frame  # a library that calls polytrace by itself: better than nothing
        frame = frame.f_back
    return _line(nearest, os.path.basename(nearest.f_code.co_filename)) if nearest else "?:0"


def user_frame() -> FrameType | None:
    """The frame of that code, with its variables."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if is_users(name):
            return frame
        frame = frame.f_back
    return None


def is_users(name: str) -> bool:
    """Whether code of a file is the user's own: neither polytrace's nor a library's."""
    return bool(_shown[name] if name in _shown else _shown.setdefault(name, _show(name)))


def is_ours(name: str) -> bool:
    """Whether it is polytrace's own."""
    return name.startswith(_HERE)


def is_torchs(name: str) -> bool:
    """Whether it is torch's, through which values of a trace come to us."""
    return name.startswith(_TORCH)


def user_file(where: str) -> str | None:
    """The file of a line that `user_line` has told; None where it has not, or of several files."""
    files = {code.co_filename for code, lines in list(_lines.values()) if where in list(lines.values())}
    return files.pop() if len(files) == 1 else None


def _line(frame: FrameType, shown: str) -> str:
    """The line of a frame: one string a place, and Python reads its table of lines once a place."""
    code, place = frame.f_code, frame.f_lasti
    entry = _lines.get(id(code))
    if entry is None:
        if len(_lines) >= _MAX_CODES:
            _lines.clear()
        entry = _lines[id(code)] = (code, {})
    line = entry[1].get(place)
    if line is None:
        line = entry[1][place] = f"{shown}:{frame.f_lineno}"
    return line


def _show(name: str) -> str | None:
    if name.startswith(_HERE):
        return ""
    return None if name.startswith((*_LIBRARIES, "<frozen")) else os.path.basename(name) or "?"
