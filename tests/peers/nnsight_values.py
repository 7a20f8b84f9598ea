"""What patterns gave in nnsight, which runs in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from bench.cones import peer

TESTS = Path(__file__).resolve().parents[1]


def values_in_nnsight(program: str, out: Path) -> dict[str, list[Tensor]]:
    """Of each pattern of a program that writes its values to `out`. Skips the test where nobody made nnsight's
    environment.
    """
    python = peer.made()
    if python is None:
        pytest.skip("nnsight has no environment here")
    command = [str(python), "-m", program, str(out)]
    variables = os.environ | {"PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(command, cwd=TESTS.parent, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    values: dict[str, list[Tensor]] = {}
    flat = load_file(out)
    for key in sorted(flat, key=lambda key: (key.split("/")[0], int(key.split("/")[1]))):
        values.setdefault(key.split("/")[0], []).append(flat[key])
    return values
