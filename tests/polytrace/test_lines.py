"""The line is the user's own, whatever stands between, and whatever Python reuses."""

from __future__ import annotations

import gc
from types import CodeType

from polytrace.lines import user_line


def compiled(name: str, num_blank: int) -> CodeType:
    return compile("\n" * num_blank + "found = user_line()", name, "exec")


def line_of(code: CodeType) -> str:
    scope = {"user_line": user_line}
    exec(code, scope)
    return str(scope["found"])


def test_each_place_of_a_loop_has_its_own_line() -> None:
    lines = []
    for _ in range(2):
        lines.append(user_line())
        lines.append(user_line())
    names, numbers = zip(*(line.split(":") for line in lines), strict=True)
    assert set(names) == {"test_lines.py"}
    assert int(numbers[1]) == int(numbers[0]) + 1
    assert numbers[:2] == numbers[2:]


def test_code_that_is_gone_lends_its_lines_to_nobody() -> None:
    """Cells of a notebook come and go, and Python gives the same id to the next one."""
    for number in range(300):
        assert line_of(compiled(f"/home/me/cell{number}.py", number % 7)) == f"cell{number}.py:{number % 7 + 1}"
        gc.collect(0)


def test_two_lines_of_equal_code_are_told_apart() -> None:
    first, second = compiled("a.py", 0), compiled("a.py", 4)
    assert [line_of(first), line_of(second), line_of(first)] == ["a.py:1", "a.py:5", "a.py:1"]


def test_code_without_a_file_is_named_as_python_names_it() -> None:
    assert line_of(compiled("<ipython-input-3>", 1)) == "<ipython-input-3>:2"
