"""Makes the virtual environment that every `make` command runs in. Standard library only; run by any Python >= 3.11.

    python3 scripts/install.py .venv

Owns one decision: which build of torch. On a machine without an NVIDIA GPU the CUDA libraries are gigabytes for
nothing, and some package indexes serve a CPU build under the same name while others do not. So pip's resolver is asked
first what torch would bring along; only if that is CUDA does uv, which knows where the CPU builds are, install torch.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> None:
    """Makes the environment in the folder named on the command line, or completes the one that is there."""
    folder = Path(sys.argv[1])
    python = folder / "bin" / "python"
    if not works(python):
        say(f"making {folder} with Python {sys.version.split()[0]}")
        make_environment(folder)
    install_torch(python, pinned("torch", CONSTRAINTS.read_text()))
    say("installing polytrace and what it needs")
    pip(python, "install", "--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[all,dev]")


def install_torch(python: Path, torch: str) -> None:
    """The pinned torch, in the build for this machine."""
    if is_installed(python, torch):
        return
    if not has_nvidia_gpu():
        say("no NVIDIA GPU here: asking the package index whether its torch is a build for CPUs")
        if brings_cuda(resolved_names(python, torch)):
            say(f"installing {torch}, the build for CPUs")
            pip(python, "install", "--constraint", str(CONSTRAINTS), "uv")
            uv = [str(python), "-m", "uv", "pip", "install", "--python", str(python)]
            if subprocess.run([*uv, "--torch-backend=cpu", torch], check=False).returncode == 0:
                return
            say("that build cannot be reached from here: the one with CUDA works too, and is larger")
    say(f"installing {torch}")
    pip(python, "install", torch)


def make_environment(folder: Path) -> None:
    """A fresh environment with pip; on systems whose Python comes without `ensurepip`, says what to install."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        venv.create(folder, with_pip=True)
    except (subprocess.CalledProcessError, ModuleNotFoundError):
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit("This Python makes no virtual environments with pip. On Debian and Ubuntu: apt install python3-venv")


def works(python: Path) -> bool:
    """Whether the environment's interpreter starts and has pip."""
    return python.exists() and succeeds([str(python), "-m", "pip", "--version"])


def is_installed(python: Path, requirement: str) -> bool:
    """Whether a `name==version` is there already, in any build of that version."""
    name, _, version = requirement.partition("==")
    program = f"from importlib.metadata import version as v; raise SystemExit(v({name!r}).split('+')[0] != {version!r})"
    return succeeds([str(python), "-c", program])


def has_nvidia_gpu() -> bool:
    """Whether the driver lists a GPU."""
    return shutil.which("nvidia-smi") is not None and succeeds(["nvidia-smi", "--list-gpus"])


def pinned(name: str, constraints: str) -> str:
    """The `name==version` line of a constraints file."""
    found = re.search(rf"^{re.escape(name)}==\S+$", constraints, re.MULTILINE)
    if found is None:
        sys.exit(f"constraints.txt does not pin {name}")
    return found.group()


def resolved_names(python: Path, requirement: str) -> list[str]:
    """Names of all packages that pip would install for a requirement; nothing is installed."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", requirement]
    report = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    return [str(entry["metadata"]["name"]) for entry in json.loads(report)["install"]]


def brings_cuda(names: Iterable[str]) -> bool:
    """Whether any of the packages is one of NVIDIA's."""
    return any(name.lower().startswith(("nvidia-", "cuda-")) for name in names)


def pip(python: Path, *arguments: str) -> None:
    """Runs the environment's pip."""
    run(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def run(*command: str | Path) -> None:
    """Runs a command; its failure ends this program with its exit status."""
    status = subprocess.run([str(part) for part in command], check=False).returncode
    if status:
        sys.exit(status)


def succeeds(command: list[str]) -> bool:
    """Whether a command exits with 0."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def say(message: str) -> None:
    """One line of progress."""
    print(f"polytrace: {message}", flush=True)


if __name__ == "__main__":
    main()
