"""A `nn.ModuleDict` of the model: its modules by their names, also where these are numbers, as torch has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polytrace.grammar import nearest
from polytrace.lines import user_line
from polytrace.tree import NoSuchNameError

if TYPE_CHECKING:
    from polytrace.modules import Module


class NoSuchKeyError(NoSuchNameError, KeyError):
    """Also a KeyError, as of any dict."""

    __str__ = NoSuchNameError.__str__


def names_of(module: Module) -> tuple[str, ...]:
    """In the model's order."""
    return module._table.children.get(module._path, ())


def member_of(module: Module, key: Any) -> Module:
    """NoSuchKeyError for what is no name of it: a number says no place."""
    names = names_of(module)
    if isinstance(key, str) and key in names:
        return module.get_submodule(key)
    path = module._path or "the model"
    close = nearest(key, names) if isinstance(key, str) else ""
    known = close or f"; it has {', '.join(map(repr, names)) or 'no modules'}"
    raise NoSuchKeyError(f"{path} ({module._info.class_name}) has no [{key!r}]{known}", where=user_line())


def _items(module: Module) -> list[tuple[str, Module]]:
    return [(name, member_of(module, name)) for name in names_of(module)]


DICT_METHODS: dict[str, Callable[[Module], Any]] = {
    "keys": lambda module: list(names_of(module)),
    "items": _items,
    "values": lambda module: [member for _, member in _items(module)],
}
