"""`polytrace.cond`: one of two values, by a number that exists only when the program runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polytrace.edits.open_shapes import OpenShape
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.storage import State, is_recorded, state_of
from polytrace.values import record, shape_of


def cond(predicate: Any, if_true: Any, if_false: Any) -> Any:
    """`if_true` where the predicate's one number is not 0, else `if_false`: whole, so nothing of the other side leaks.

    A side is a value, a tuple, list or dict of values, or a function without arguments that returns one; both sides
    have one structure, and values at one place have one shape and dtype. What functions compute is computed on either
    side, so they change neither the model nor values made before: return the new value, and write the choice.
    Raises GraphError with the user's line for a predicate that is no recorded number, and for sides that do not match.
    """
    where = user_line()
    if not is_recorded(predicate):
        raise GraphError(
            f"polytrace.cond chooses by a recorded number; a {type(predicate).__name__} is known now: write `if`",
            where=where,
        )
    state = state_of(predicate)
    if (shape := shape_of(predicate).shape) not in ((), (1,)):
        raise GraphError(
            f"polytrace.cond looks at one number, and this predicate has shape {_shown(shape)}: reduce it with .any(), "
            ".all() or .mean(), or choose by element with torch.where",
            where=where,
        )
    sides = [_recorded_side(state, side) for side in (if_true, if_false)]
    return _choose(predicate, sides[0], sides[1], "", where)


def _recorded_side(state: State, side: Any) -> Any:
    """What a side is, its function called."""
    if not callable(side) or is_recorded(side) or hasattr(side, "untyped_storage"):
        return side
    made: Callable[[], Any] = side
    with state.recording.branch():
        return made()


def _choose(predicate: Any, a: Any, b: Any, path: str, where: str) -> Any:
    """The choice for one place of the structure, and for all places in it."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            raise GraphError(f"the sides of polytrace.cond differ in keys{_at(path)}: {_differ(a, b)}", where=where)
        return {key: _choose(predicate, a[key], b[key], f"{path}[{key!r}]", where) for key in a}
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        if len(a) != len(b):
            raise GraphError(f"the sides of polytrace.cond have {len(a)} and {len(b)} values{_at(path)}", where=where)
        pairs = enumerate(zip(a, b, strict=True))
        chosen = [_choose(predicate, one, other, f"{path}[{place}]", where) for place, (one, other) in pairs]
        return chosen if isinstance(a, list) else tuple(chosen)
    for side in (a, b):
        if not is_recorded(side) and not hasattr(side, "dtype"):
            raise GraphError(
                f"a side of polytrace.cond is a {type(side).__name__}{_at(path)}: both are values of one shape and "
                "dtype; write torch.full_like(value, number) for a number",
                where=where,
            )
    if _dtype(a) != _dtype(b) or a.shape != b.shape:
        raise GraphError(
            f"the sides of polytrace.cond are {_form(a)} and {_form(b)}{_at(path)}: they need one shape and dtype",
            where=where,
        )
    return record("cond", (predicate, a, b), {})


def _dtype(side: Any) -> str:
    return str(side.dtype).removeprefix("torch.")


def _form(side: Any) -> str:
    return f"{_dtype(side)}{_shown(side.shape)}"


def _shown(shape: Any) -> str:
    """In an edit what follows from later prompts is `?`."""
    return repr(shape) if isinstance(shape, OpenShape) else str(list(shape))


def _at(path: str) -> str:
    return f" at {path}" if path else ""


def _differ(a: dict[Any, Any], b: dict[Any, Any]) -> str:
    return ", ".join(sorted(map(str, a.keys() ^ b.keys())))
