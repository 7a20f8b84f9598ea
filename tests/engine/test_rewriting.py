"""A rewritten function does what the function does, and tells of every call in it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.rewriting import CannotRewrite, rewriting_of, substituted, written_function


def double(value: int) -> int:
    return 2 * value


class Base:
    def scale(self, value: int) -> int:
        return 3 * value


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def around(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) + 1000

    return around


class Worker(Base):
    @twice
    def run(self, value: int, *, more: int = 5) -> int:
        parts = [double(part) for part in range(value)]
        total = sum(parts) + self.scale(double(more))
        return total + (lambda own: abs(own))(-total) + super().scale(1)

    def __hidden(self) -> int:
        return 1

    def private(self) -> int:
        return self.__hidden()

    def chained(self, text: str) -> list[str]:
        return text.strip().lower().split(",")


def rewritten(value: Any, heard: list[str]) -> Any:
    def hook(name: str, called: Any) -> Any:
        heard.append(name)
        return called

    rewriting = rewriting_of(written_function(value))
    return substituted(value, rewriting.function, rewriting.bind(hook))


def test_a_rewritten_method_keeps_its_decorators_defaults_and_class() -> None:
    heard: list[str] = []
    worker = Worker()
    assert rewritten(worker.run, heard)(4) == worker.run(4)
    assert rewritten(worker.run, heard)(4, more=7) == worker.run(4, more=7)
    assert heard[: len(heard) // 2] == [
        "range_0", "double_0", "double_0", "double_0", "double_0", "sum_0", "self_scale_0", "double_1", "unknown_0",
        "abs_0", "scale_0",
    ]  # fmt: skip


def test_names_are_those_of_nnsight() -> None:
    """As `nnsight.intervention.source.FunctionCallWrapper` counts them: inner calls first, each name by itself."""
    names = [name for name, _ in rewriting_of(written_function(Worker.chained)).operations]
    assert names == ["text_strip_0", "lower_0", "split_0"]
    names = [name for name, _ in rewriting_of(written_function(Worker.run)).operations]
    assert names == [
        "double_0", "range_0", "sum_0", "double_1", "self_scale_0", "abs_0", "unknown_0", "super_0", "scale_0",
    ]  # fmt: skip


def test_a_hook_replaces_what_is_called() -> None:
    rewriting = rewriting_of(written_function(Worker.chained))
    replaced = rewriting.bind(lambda name, called: (lambda: "a,b") if name == "lower_0" else called)
    assert replaced(Worker(), " C ") == ["a", "b"]
    assert Worker().chained(" C ") == ["c"]  # the function itself is as it was


def test_an_error_inside_names_the_line_of_the_source() -> None:
    def broken(value: Any) -> Any:
        return double(value.nothing)

    with pytest.raises(AttributeError) as caught:
        rewritten(broken, [])(1)
    frame = caught.traceback[-1]
    assert (Path(frame.path).name, frame.lineno) == (Path(__file__).name, broken.__code__.co_firstlineno)


@pytest.mark.parametrize(
    ("value", "reason"), [(len, "not written in Python"), (Worker.private, "private to its class")]
)
def test_what_cannot_be_rewritten_says_why(value: Any, reason: str) -> None:
    with pytest.raises(CannotRewrite, match=reason):
        rewriting_of(written_function(value))


def test_a_function_without_its_text_cannot_be_rewritten() -> None:
    made: dict[str, Any] = {}
    exec("def run(value): return abs(value)", made)
    with pytest.raises(CannotRewrite, match="the source of run cannot be had"):
        rewriting_of(made["run"])


def scaled(value: int) -> int:
    return 3 * value


class _SameName:
    def scaled(self, value: int) -> int:
        """Calls the function of its own name."""
        return scaled(value) + 1


def test_a_function_may_call_another_one_of_its_own_name() -> None:
    rewriting = rewriting_of(_SameName.scaled)
    names: list[str] = []

    def hook(name: str, called: Any) -> Any:
        names.append(name)
        return called

    assert rewriting.bind(hook)(_SameName(), 5) == 16
    assert names == ["scaled_0"] and rewriting.bind(hook).__name__ == "scaled"
