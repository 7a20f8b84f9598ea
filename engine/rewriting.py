"""A function of the model, rewritten so that every call in it passes through a hook. Nothing else of it changes.

Owns the names of operations: `self.act_fn(x)` is `self_act_fn_0`, its second occurrence in the text `self_act_fn_1`; of
`a.b().c()` the calls are `a_b_0` and `c_0`, the inner one first. These are nnsight's names. Knows nothing of sites.

The rewritten code is compiled from the installed source and runs with the globals, the closure and the defaults of the
function that it stands for: `f(x)` has become `hook("f_0", f)(x)`, and a hook returns `f` where nobody looks.
Decorators stay: whatever leads to the function through closures is copied with the rewritten one in its place.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

# Gets an operation's name and what it calls; returns what is called in its place.
Hook = Callable[[str, Any], Any]

_HOOK = "__operation__"
_REWRITTEN = "__rewritten__"  # a function's name while it is compiled: its body may call another one of its own name
# These look at the frame that calls them, so nothing may stand between.
_FRAME_READERS = frozenset({"super", "locals", "globals", "vars", "dir", "eval", "exec"})
_FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_MAX_DEPTH = 8  # of decorators around a function


class CannotRewrite(Exception):
    """Why a function's operations cannot be visited, as the end of a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """A function and its rewritten code."""

    function: FunctionType
    text: str  # of the function, not indented, with its decorators
    operations: tuple[tuple[str, int], ...]  # names and lines of the text, in the order of evaluation
    code: CodeType

    @property
    def name(self) -> str:
        """What it is called where it was written."""
        return self.function.__qualname__

    def bind(self, hook: Hook) -> FunctionType:
        """The function with this hook around its calls."""
        old = self.function
        cells = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
        closure = tuple(CellType(hook) if name == _HOOK else cells[name] for name in self.code.co_freevars)
        return _like(old, self.code, closure)


@cache
def rewriting_of(function: FunctionType) -> Rewriting:
    """Compiles a function once. Raises CannotRewrite."""
    try:
        text = textwrap.dedent(inspect.getsource(function))
        tree = ast.parse(text)
    except (OSError, TypeError, SyntaxError) as error:
        raise CannotRewrite(f"the source of {function.__qualname__} cannot be had") from error
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise CannotRewrite(f"{function.__qualname__} is no plain function")
    if any(_is_mangled(node) for node in ast.walk(definition)):
        raise CannotRewrite(f"{function.__qualname__} uses names that are private to its class")
    _strip(definition)
    wrapper = _Wrapper()
    definition.body = [wrapper.visit(statement) for statement in definition.body]
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    code = _compiled(definition, function)
    return Rewriting(function=function, text=text, operations=tuple(wrapper.operations), code=code)


def written_function(value: Any) -> FunctionType:
    """The innermost function below decorators and methods. Raises CannotRewrite where there is none."""
    function = inspect.unwrap(value.__func__ if isinstance(value, MethodType) else value)
    if not isinstance(function, FunctionType):
        raise CannotRewrite(f"{getattr(value, '__qualname__', type(value).__name__)} is not written in Python")
    if _HOOK in function.__code__.co_freevars:  # a module's forward that is called by its name
        raise CannotRewrite(f"{function.__qualname__} is visited already")
    return function


def substituted(value: Any, old: FunctionType, new: FunctionType, depth: int = _MAX_DEPTH) -> Any:
    """A callable with one function replaced, found through methods, partials and closures; None where it is not in."""
    if value is old:
        return new
    if depth == 0:
        return None
    if isinstance(value, MethodType):
        inner = substituted(value.__func__, old, new, depth - 1)
        return None if inner is None else MethodType(inner, value.__self__)
    if isinstance(value, partial):
        inner = substituted(value.func, old, new, depth - 1)
        return None if inner is None else partial(inner, *value.args, **value.keywords)
    if not isinstance(value, FunctionType):
        return None
    cells = list(value.__closure__ or ())
    for place, cell in enumerate(cells):
        content = _content(cell)
        if isinstance(content, (FunctionType, MethodType, partial)) and content is not value:
            inner = substituted(content, old, new, depth - 1)
            if inner is not None:
                cells[place] = CellType(inner)
                return _like(value, value.__code__, tuple(cells))
    return None


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _like(old: FunctionType, code: CodeType, closure: tuple[CellType, ...]) -> FunctionType:
    """A function like another, with other code or another closure."""
    made = FunctionType(code, old.__globals__, old.__name__, old.__defaults__, closure)
    made.__kwdefaults__ = old.__kwdefaults__
    made.__qualname__, made.__module__ = old.__qualname__, old.__module__
    made.__dict__.update(old.__dict__)
    return made


class _Wrapper(ast.NodeTransformer):
    """Puts the hook around the calls of a function's body."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, int]] = []
        self._counts: Counter[str] = Counter()

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = _called(node.func)  # before the calls inside of it are others
        self.generic_visit(node)
        name = f"{called}_{self._counts[called]}"
        self._counts[called] += 1
        self.operations.append((name, node.lineno - 1))
        if called in _FRAME_READERS:
            return node
        hooked = ast.Call(ast.Name(_HOOK, ast.Load()), [ast.Constant(name), node.func], [])
        wrapped = ast.Call(func=hooked, args=node.args, keywords=node.keywords)
        return ast.fix_missing_locations(ast.copy_location(wrapped, node))


def _called(func: ast.expr) -> str:
    """The name of what is called: attributes joined by underscores."""
    parts: list[str] = []
    while isinstance(func, ast.Attribute):
        parts.append(func.attr)
        func = func.value
    if isinstance(func, ast.Name):
        parts.append(func.id)
    return "_".join(reversed(parts)) or "unknown"


def _is_mangled(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name.startswith("__") and not name.endswith("__")


def _strip(definition: ast.FunctionDef) -> None:
    """Takes away what is evaluated where a function is defined: the new one has the old one's."""
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if one is None else ast.Constant(None) for one in arguments.kw_defaults]


def _compiled(definition: ast.FunctionDef, function: FunctionType) -> CodeType:
    """The code of a function that has the hook and the old one's free variables around it."""
    names = ", ".join((_HOOK, *function.__code__.co_freevars))
    tree = ast.parse(f"def around({names}): pass")
    around = tree.body[0]
    assert isinstance(around, ast.FunctionDef), "it was written just now"
    definition.name = _REWRITTEN
    around.body = [definition]
    ast.fix_missing_locations(tree)
    flags = function.__code__.co_flags & _FUTURES
    whole = compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    (outer,) = _codes(whole)
    own = next(code for code in _codes(outer) if code.co_name == _REWRITTEN)
    return own.replace(co_name=function.__code__.co_name, co_qualname=function.__qualname__)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield from (constant for constant in code.co_consts if isinstance(constant, CodeType))
