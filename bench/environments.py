"""Environments of peers: each a package, pinned, in a folder of its own under the user's cache.

They have the versions of torch and transformers that polytrace itself runs on, so that both sides multiply matrices
with the same library.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.cones.models import CACHE

_INSTALL_TIMEOUT_S = 1800


class NoPeerError(Exception):
    """The peer cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One peer's."""

    package: str
    version: str
    extras: str = ""
    others: tuple[str, ...] = ("accelerate",)  # that it needs beside
    transformers: str | None = None  # another one than polytrace's, where it cannot run with that
    interpreters: tuple[str, ...] = ()  # names of Pythons, where it needs a newer one than this

    def made(self, *, cache: Path = CACHE) -> Path | None:
        """Its Python, None where nobody has made it yet."""
        folder = self._folder(cache)
        return folder / "bin" / "python" if (folder / ".ready").is_file() else None

    def make(self, *, cache: Path = CACHE) -> Path:
        """Its Python, made when it is not there. Raises NoPeerError."""
        if (python := self.made(cache=cache)) is not None:
            return python
        folder, versions = self._folder(cache), self._versions()
        extras = f"[{self.extras}]" if self.extras else ""
        python = folder / "bin" / "python"
        print(f"making {folder} for {self.package} {self.version}, once", file=sys.stderr, flush=True)
        try:
            subprocess.run([self._interpreter(), "-m", "venv", "--clear", str(folder)], check=True, capture_output=True)
            # torch first and alone: the build for this machine that the package index serves
            for packages in (
                [f"torch=={versions['torch']}"],
                [f"{self.package}{extras}=={self.version}", f"transformers=={versions['transformers']}", *self.others],
            ):
                command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S)
        except (subprocess.SubprocessError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            said = str(getattr(error, "stderr", None) or error).strip().splitlines()
            told = said[-1] if said else error
            raise NoPeerError(f"{self.package} {self.version} could not be installed: {told}") from error
        (folder / ".ready").touch()
        return python

    def _folder(self, cache: Path) -> Path:
        versions = (f"{name}-{version}" for name, version in self._versions().items())
        return cache / "-".join([f"{self.package}-{self.version}", *versions])

    def _versions(self) -> dict[str, str]:
        found = {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "transformers")}
        return found | ({"transformers": self.transformers} if self.transformers else {})

    def _interpreter(self) -> str:
        """The Python to make it with. Raises NoPeerError when none of those that it needs is here."""
        if not self.interpreters:
            return sys.executable
        for name in self.interpreters:  # one on the PATH may be a shim of a version that is not there
            found = shutil.which(name)
            if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
                return found
        raise NoPeerError(f"{self.package} needs {' or '.join(self.interpreters)}, and none on the PATH works")


NNSIGHT = Environment(package="nnsight", version="0.8.1")
TRANSFORMER_LENS = Environment(package="transformer-lens", version="3.9.0")  # the last one with HookedTransformer
SAE_LENS = Environment(package="sae-lens", version="6.54.12")
# nnsight 0.8 has no `nnsight.intervention.tracing`, which nnterp imports; pytest runs nnterp's own tests
NNTERP = Environment(package="nnterp", version="1.3.0", others=("accelerate", "nnsight==0.7.0", "pytest"))
