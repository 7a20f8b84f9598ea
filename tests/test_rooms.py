"""What may be loaded where: imports as they really happen, beside the contracts that `lint-imports` holds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from polytrace import methods

HEAVY = ("torch", "numpy", "transformers", "ray", "fastapi", "uvicorn", "matplotlib", "xarray", "pandas")


@pytest.mark.parametrize(
    ("room", "absent"),
    [
        ("polytrace", ("transformers", "ray", "fastapi", "matplotlib")),
        ("polytrace.methods", ("torch", "numpy", "xarray", "pandas", "transformers", "ray", "fastapi", "matplotlib")),
        ("polytrace.graph", ("torch", "transformers", "ray", "fastapi")),
        ("scheduling.scheduler", ("torch", "numpy", "transformers", "ray", "fastapi")),
        ("engine.shard", ("ray", "fastapi", "uvicorn", "matplotlib")),
        ("api.gateway", ("ray", "transformers", "matplotlib")),
        ("api.commands", ("torch", "transformers", "ray", "fastapi", "uvicorn", "matplotlib")),
    ],
)
def test_importing_a_room_loads_nothing_that_it_must_not_know(room: str, absent: tuple[str, ...]) -> None:
    assert not loaded_by(room) & set(absent)


def loaded_by(module: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after one import."""
    program = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


def test_every_method_is_found_by_its_name_without_what_only_some_work_with() -> None:
    program = (
        "import sys; from polytrace import methods; named = [getattr(methods, name) for name in methods.__all__]; "
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not answer.stdout.split()
    assert sorted(methods.__all__) == methods.__all__
