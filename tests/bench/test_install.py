"""The set-up script decides which build of torch a machine gets."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
assert spec is not None
assert spec.loader is not None
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)


def test_a_resolution_with_nvidia_packages_is_told_from_one_without() -> None:
    cpu = ["torch", "fsspec", "networkx", "setuptools", "sympy", "mpmath", "typing_extensions", "filelock", "Jinja2"]
    assert not install.brings_cuda(cpu)
    assert install.brings_cuda([*cpu, "nvidia-cublas", "nvidia-cudnn-cu13", "triton"])
    assert install.brings_cuda([*cpu, "cuda-bindings"])


def test_constraints_pin_every_runtime_dependency_inside_its_bounds() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    bounds = re.findall(r'^    "([a-z-]+)>=([\d.]+)(?:,<([\d.]+))?', project, re.MULTILINE)
    assert {"torch", "transformers", "ray", "numpy"} <= {name for name, _, _ in bounds}
    for name, low, high in bounds:
        pinned = install.pinned(name, pins).partition("==")[2]
        assert version(low) <= version(pinned), name
        assert not high or version(pinned) < version(high), name


def test_a_package_that_is_not_pinned_is_an_error_that_names_it() -> None:
    with pytest.raises(SystemExit, match="does not pin torch"):
        install.pinned("torch", "numpy==2.4.6\ntorchvision==0.29.0\n")


def test_what_is_installed_is_known_whatever_its_build() -> None:
    numpy = install.pinned("numpy", (ROOT / "constraints.txt").read_text())
    assert install.is_installed(Path(sys.executable), numpy)
    assert not install.is_installed(Path(sys.executable), "numpy==1.0")
    assert not install.is_installed(Path(sys.executable), "no-such-package==1.0")


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
