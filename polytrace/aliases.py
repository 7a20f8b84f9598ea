"""Other names for modules (`rename=`), so that one program reads well on many families. Native paths stay as they are.

A rule's key says where: one name (`"mlp"`) is every module of that name, wherever it lies; a dotted path
(`"transformer.h"`) is mounted wherever it leads somewhere; a dot in front (`".transformer"`) means from the root only.
Its value is one name or a list of names. They stand beside the module's own name, and where the path starts from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from polytrace.description import ModelDescription
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.lines import user_line

Aliases = dict[str, dict[str, str]]  # path of a module -> alias -> path that it leads to
Children = Mapping[str, Collection[str]]


def find_aliases(
    rules: Mapping[str, str | Sequence[str]],
    modules: Collection[str],
    children: Children,
    taken: Mapping[str, Collection[str]],
) -> Aliases:
    """The aliases that rules make. `taken` are names that each module has besides its children.

    Raises GraphError for a rule that leads nowhere, and for an alias that would hide or mean something else.
    """
    found: Aliases = {}
    for key, names in rules.items():
        targets = _targets(key, modules, children)
        if not targets:
            known = {path.rpartition(".")[2] for path in modules} if "." not in key.strip(".") else set(modules)
            close = nearest(key.removeprefix("."), known)
            raise GraphError(f"rename: this model has no module {key!r}{close}", where=user_line())
        for alias in [names] if isinstance(names, str) else names:
            plain = alias.removeprefix(".")
            if not plain.isidentifier():
                raise GraphError(f"rename: {alias!r} is no name for {key!r}: an alias is one name", where=user_line())
            for owner, target in targets:
                _add(found.setdefault(owner, {}), owner, plain, target, children, taken)
                parent = target.rpartition(".")[0]
                if plain not in children.get(parent, ()) and plain not in taken.get(parent, ()):
                    found.setdefault(parent, {}).setdefault(plain, target)  # beside its own name, too
    return found


def standard_aliases(description: ModelDescription, children: Children) -> Aliases:
    """Standard names of modules, wherever they could stand: in every module that these lie in, and in their layers.

    A child of that name keeps it.
    """
    found: Aliases = {}
    root, _, rest = description.layers.partition(".")
    named = [(path, name) for name, path in description.standard.items()]
    for path, name in [*named, (root, "model")] if rest else named:
        owner = path
        while owner:
            owner = owner.rpartition(".")[0]
            if name not in children.get(owner, ()):
                found.setdefault(owner, {})[name] = path
    for part in description.parts:
        if part.path is not None and part.refusal is None and part.name not in children.get(part.module, ()):
            found.setdefault(part.module, {})[part.name] = part.path
    return found


def resolved(path: str, aliases: Aliases, modules: Collection[str], start: str = "") -> str:
    """The native path of one that aliases are used in; as it is where nothing leads."""
    here = start
    for name in path.split(".") if path else ():
        native = f"{here}.{name}" if here else name
        here = native if native in modules else aliases.get(here, {}).get(name, native)
    return here


def _targets(key: str, modules: Collection[str], children: Children) -> list[tuple[str, str]]:
    """(module that gets the alias, path that it leads to)."""
    path = key.removeprefix(".")
    if not path:
        return []
    owners = [""] if key.startswith(".") else ["", *(module for module in modules if module)]
    pairs = [(owner, f"{owner}.{path}" if owner else path) for owner in owners]
    return [(owner, target) for owner, target in pairs if target in modules]


def _add(
    own: dict[str, str],
    owner: str,
    alias: str,
    target: str,
    children: Children,
    taken: Mapping[str, Collection[str]],
) -> None:
    place = owner or "the model"
    if alias in children.get(owner, ()) or alias in taken.get(owner, ()):
        raise GraphError(f"rename: {place} has {alias!r} already, so {target} cannot be that too", where=user_line())
    if own.setdefault(alias, target) != target:
        raise GraphError(
            f"rename: {alias!r} would be two modules of {place}, {own[alias]} and {target}", where=user_line()
        )
