"""What becomes of standard names that a user gives to modules with `rename=`, where the service knows less."""

from __future__ import annotations

from dataclasses import replace

from polytrace.aliases import Aliases
from polytrace.description import PartInfo, PointInfo
from polytrace.errors import GraphError
from polytrace.graph import Port
from polytrace.lines import user_line
from polytrace.tree import Table

ROOT_MODULES = ("layers", "embed_tokens", "ln_final", "lm_head")


def take_renamed(table: Table, renamed: Aliases) -> None:
    """What a user gives a standard name to stands where the service's own finding stood."""
    for name in ROOT_MODULES:
        path = _renamed_root(renamed, name)
        if path is None:
            continue
        table.standard[name] = path
        if name not in table.children.get("", ()):
            table.aliases.setdefault("", {})[name] = path
        if name == "embed_tokens":
            _put(table, "", "input_ids", path, Port.INPUT)
            _put(table, "", "token_embeddings", path, Port.OUTPUT)
        if name == "layers" and path != table.description.layers:
            for child in table.children.get(path, ()):
                _put(table, f"{path}.{child}", "resid_pre", f"{path}.{child}", Port.INPUT)
                _put(table, f"{path}.{child}", "resid_post", f"{path}.{child}", Port.OUTPUT)
    for owner, names in renamed.items():
        is_layer = owner.rpartition(".")[0] == table.standard["layers"]
        for name, point in (("self_attn", "attention"), ("mlp", "mlp")):
            if is_layer and name in names:
                found = table.parts.get((owner, name), PartInfo(module=owner, name=name, path=None))
                table.parts[owner, name] = replace(found, path=names[name], refusal=None)
                _put(table, owner, f"{point}_input", names[name], Port.INPUT)
                _put(table, owner, f"{point}_output", names[name], Port.OUTPUT)


def _renamed_root(renamed: Aliases, name: str) -> str | None:
    """The one module that a user calls by a standard name of the root, wherever it lies."""
    targets = list(dict.fromkeys(names[name] for names in renamed.values() if name in names))
    if name in renamed.get("", {}):
        return renamed[""][name]
    if len(targets) > 1:
        raise GraphError(
            f"rename: {name!r} of the model would be {len(targets)} modules, {targets[0]} and {targets[1]} among them: "
            "give the whole path of one",
            where=user_line(),
        )
    return targets[0] if targets else None


def _put(table: Table, owner: str, name: str, module: str, port: Port) -> None:
    """A point is the one tensor of a module's side, or the first of several."""
    own = table.ports.get((module, port.value))
    found = None if own is None else next((own.leaves[way][0] for way in ((), (0,)) if way in own.leaves), None)
    refusal = None if found is not None else f"{module} has no {port.value} that is a tensor, or a tuple of them"
    table.points.setdefault(owner, {})[name] = PointInfo(module=owner, name=name, site=found, refusal=refusal)
