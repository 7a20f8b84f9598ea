"""One program, line for line, gives the same numbers in nnsight and in polytrace.

nnsight runs in an environment of its own (`bench.cones.peer`). Where nobody made it this test is skipped; make it with
`python -c "from bench.cones.peer import environment; environment()"`.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from peers.blocks import FOLDER, LOADED, run
from safetensors.torch import load_file

import polytrace
from bench.cones import peer

TESTS = Path(__file__).resolve().parents[1]
FLOAT32_TOLERANCE = 1e-5  # of max(1, max|nnsight|)
CHANGED = {
    "three layers skipped": "the model's result",
    "an mlp and a layer skipped": "the model's result",
    "steered for all, long": "first of three",
}


def test_blocks_give_what_they_give_in_nnsight(tmp_path: Path) -> None:
    python = peer.made()
    if python is None:
        pytest.skip("nnsight has no environment here")
    out = tmp_path / "values.safetensors"
    variables = os.environ | {"PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), "-m", "peers.blocks", str(out)]
    ran = subprocess.run(command, cwd=TESTS, env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    theirs = load_file(out)
    with polytrace.load(str(FOLDER), threads=1, **LOADED) as model:
        ours = run(model, polytrace.save)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == value.shape, name
        assert (ours[name] - value).abs().max() <= FLOAT32_TOLERANCE * max(1.0, float(value.abs().max())), name
    for name, base in CHANGED.items():
        assert (ours[name] - ours[base]).abs().max() > 0.1, name
    assert torch.equal(ours["all of three"], torch.cat([ours["first of three"], ours["others of three"]]))
