"""Whether kernels of our own run here. Triton makes them: it comes with torch for CUDA, and is not there without."""

from __future__ import annotations

from functools import cache
from subprocess import CalledProcessError

import torch


def has_kernels(device: torch.device) -> bool:
    """Whether what a device does may be one of our own kernels."""
    return device.type == "cuda" and why_no_kernels() is None


@cache
def why_no_kernels() -> str | None:
    """What keeps this machine from compiling a kernel for its GPU, None when nothing does."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()  # calls the C compiler
    except (ImportError, OSError, RuntimeError, CalledProcessError) as error:
        return f"{type(error).__name__}: {error}"
    return None
