"""nnsight as an opponent: pinned, in an environment of its own, in a process that takes its turns in the race.

The environment is made on first use under the user's cache, with the versions of torch and transformers that this
benchmark itself runs on, so that both sides multiply matrices with the same library.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cones.hooks import Values
from bench.cones.models import CACHE
from bench.record import ROOT

VERSION = "0.8.1"
_INSTALL_TIMEOUT_S = 1800


class NoPeerError(Exception):
    """The peer cannot be had here; the message says why."""


def made(*, cache: Path = CACHE) -> Path | None:
    """The Python of nnsight's environment, None where nobody has made it yet."""
    folder = _folder(cache)
    return folder / "bin" / "python" if (folder / ".ready").is_file() else None


def environment(*, cache: Path = CACHE) -> Path:
    """The Python of nnsight's environment, made when it is not there. Raises NoPeerError."""
    if (python := made(cache=cache)) is not None:
        return python
    folder, versions = _folder(cache), _versions()
    python = folder / "bin" / "python"
    print(f"making {folder} for nnsight {VERSION}, once", file=sys.stderr, flush=True)
    try:
        venv.create(folder, with_pip=True, clear=True)
        # torch first and alone: the build for this machine that the package index serves
        for packages in (
            [f"torch=={versions['torch']}"],
            [f"nnsight=={VERSION}", f"transformers=={versions['transformers']}", "accelerate"],
        ):
            command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S)
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise NoPeerError(f"nnsight {VERSION} could not be installed: {said[-1] if said else error}") from error
    (folder / ".ready").touch()
    return python


def _folder(cache: Path) -> Path:
    return cache / "-".join([f"nnsight-{VERSION}", *(f"{name}-{version}" for name, version in _versions().items())])


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "transformers")}


class Peer:
    """A process with nnsight and one model."""

    def __init__(self, python: Path, folder: Path) -> None:
        variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  what it tells people; closed with the process
        self._process = subprocess.Popen(
            [str(python), "-m", "bench.cones.peer_program", str(folder)],
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
        self._ask(do="prepare", case=case, tokens=tokens, size=size, members=list(members), rows=rows, threads=threads)

    def run(self) -> float:
        """Seconds that the members took."""
        return float(self._ask(do="run")["seconds"])

    def values(self) -> Values:
        """What they gave back in the last run."""
        return {int(member): torch.tensor(value) for member, value in self._ask(do="values")["values"].items()}

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def _ask(self, **command: Any) -> dict[str, Any]:
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
