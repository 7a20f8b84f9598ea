"""Bars are for people: a terminal shows them when something takes long, and nothing else sees them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import suppress

SLOW = """
import time
from polytrace.progress import showing_bytes
with showing_bytes("loading a model") as tell:
    for part in range(5):
        tell(part * 5 * 10**8, 8 * 10**9)
        time.sleep({seconds} / 4)
"""

PROMPTS = """
import time
from polytrace.progress import showing_prompts
with showing_prompts("mapping") as tell:
    for part in range(5):
        tell(part * 10, None)
        time.sleep(2.1 / 4)
"""


def shown(seconds: float) -> str:
    """What a terminal gets."""
    return shown_by(SLOW.format(seconds=seconds))


def shown_by(code: str) -> str:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    program = [sys.executable, "-c", code]
    with subprocess.Popen(program, stderr=theirs, stdout=theirs, env=environment) as process:
        os.close(theirs)
        found = b""
        with suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                found += part
    os.close(ours)
    assert process.returncode == 0
    return found.decode(errors="replace")


def test_a_terminal_sees_bytes_and_their_rate_of_what_takes_long() -> None:
    told = shown(2.1)
    assert "loading a model" in told and "2.0/8.0 GB" in told and " MB/s" in told


def test_a_terminal_sees_prompts_of_a_dataset_whose_number_may_not_be_known() -> None:
    told = shown_by(PROMPTS)
    assert "40/?" in told and "prompts" in told


def test_nobody_sees_a_bar_of_what_is_soon_over_or_of_what_nobody_looks_at() -> None:
    assert shown(0.0) == ""
    program = [sys.executable, "-c", SLOW.format(seconds=2.1)]
    answer = subprocess.run(program, capture_output=True, text=True, check=True)
    assert answer.stderr == answer.stdout == ""
