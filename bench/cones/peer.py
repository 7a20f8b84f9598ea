"""nnsight as an opponent: in an environment of its own (`bench.environments`), a process that takes its turns."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cones.hooks import Values
from bench.environments import NNSIGHT, NoPeerError
from bench.record import ROOT

VERSION = NNSIGHT.version
made, environment = NNSIGHT.made, NNSIGHT.make  # the Python of its environment


class Peer:
    """A process with nnsight and one model."""

    def __init__(self, python: Path, folder: Path, program: str = "bench.cones.peer_program") -> None:
        variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  what it tells people; closed with the process
        self._process = subprocess.Popen(
            [str(python), "-m", program, str(folder)],
            cwd=ROOT,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def prepare(
        self, case: str, *, tokens: int, size: int | None, members: Sequence[int], rows: int, threads: int
    ) -> None:
        """Makes the peer ready to run these members of a workload, `rows` tokens in one trace."""
        self.ask(do="prepare", case=case, tokens=tokens, size=size, members=list(members), rows=rows, threads=threads)

    def run(self) -> float:
        """Seconds that the members took."""
        return float(self.ask(do="run")["seconds"])

    def values(self) -> Values:
        """What they gave back in the last run."""
        return {int(member): torch.tensor(value) for member, value in self.ask(do="values")["values"].items()}

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def ask(self, **command: Any) -> dict[str, Any]:
        """What its program answers to a command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            raise NoPeerError(f"nnsight's process ended: {said[-1] if said else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer
