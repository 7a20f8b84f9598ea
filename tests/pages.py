"""The blocks of code in a page of the documentation, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def examples_of(page: str) -> list[str]:
    """The blocks of code that need no service."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [block for block in blocks if "= polytrace.connect(" not in block]


def run_all(page: str, names: dict[str, object], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs the blocks one after another; what each printed."""
    outputs = []
    for number, block in enumerate(examples_of(page)):
        # compiled under its own name, so that an error names the block and its line
        exec(compile(block, f"{page}, example {number + 1}", "exec"), names)
        outputs.append(capsys.readouterr().out)
    return outputs
