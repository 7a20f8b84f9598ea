"""Attention and MLP of a decoder layer, and what each of them adds to the residual, in any family.

Found from the model's description: which module attends, which one projects neurons back, and whether a norm stands
between these and the residual (sandwich norms). A sum that does not add up is noticed in the run, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polytrace.errors import GraphError
from polytrace.graph import Port
from polytrace.lines import user_line
from polytrace.modules import Module
from polytrace.points import owners
from polytrace.storage import is_recorded
from polytrace.tree import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Sublayers:
    """The two halves of a layer. A norm is the last module before the residual, None where there is none."""

    attention: Module
    attention_norm: Module | None
    mlp: Module
    mlp_norm: Module | None

    def adding(self) -> dict[str, Module]:
        """The modules whose outputs are what is added to the residual."""
        return {"attention": self.attention_norm or self.attention, "mlp": self.mlp_norm or self.mlp}


def find_sublayers(layer: Module) -> Sublayers:
    """Raises GraphError where the layer has no module that attends, or none that is its MLP."""
    table, path = layer._table, layer._path
    owner = owners(table, path)
    attention = owner.get("z")
    block = next((owner[name] for name in ("mlp_post", "router") if owner.get(name, path) != path), None)
    down = table.points.get(owner.get("mlp_post", ""), {}).get("mlp_post")
    if block is None and down is not None and down.site is not None:
        block = down.site.module  # its neurons are in the layer itself: the projection stands for the MLP
    if attention is None or block is None:
        missing = "attention" if attention is None else "MLP"
        raise GraphError(f"{path} has no module that is its {missing} in every forward", where=user_line())
    middle = table.points.get(path, {}).get("resid_mid")
    before = None if middle is None or middle.site is None else _order(table, middle.site.module, Port.INPUT)
    behind = None if before is None else _norm(table, path, attention, before)
    last = _norm(table, path, block, _order(table, path, Port.OUTPUT))
    return Sublayers(
        attention=Module(layer._model, attention),
        attention_norm=None if behind is None else Module(layer._model, behind),
        mlp=Module(layer._model, block),
        mlp_norm=None if last is None else Module(layer._model, last),
    )


def tensor_of(output: Any) -> Any:
    """What a module returns first: the tensor itself, or the first member of a tuple."""
    return output if is_recorded(output) else output[0]


def _order(table: Table, path: str, port: Port) -> int:
    return table.ports[path, port.value].info.order


def _norm(table: Table, layer: str, module: str, before: int) -> str | None:
    """The last module that gives a residual's features behind `module` and before a place of the forward."""
    behind = _order(table, module, Port.OUTPUT)
    width = (table.description.hidden_size,)
    found: list[tuple[int, str]] = []
    for (path, port), known in table.ports.items():
        is_inside = path.startswith(f"{layer}.") and not path.startswith(f"{module}.")
        is_around = module.startswith(f"{path}.")
        if port != Port.OUTPUT.value or not is_inside or is_around or not behind < known.info.order < before:
            continue
        leaf = known.leaves.get(())
        is_dropout = table.modules[path].class_name.endswith("Dropout")  # torch's own: nothing where models are served
        if leaf is not None and leaf[1].tail == width and not is_dropout:
            found.append((known.info.order, path))
    return max(found)[1] if found else None
