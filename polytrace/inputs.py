"""`module.inputs`: the arguments of a call as `(args, kwargs)`, each tensor the site that it is.

The first argument is the module's `input`, whichever name it is reached by; the others are sites of their own.
"""

from __future__ import annotations

from dataclasses import replace

from polytrace.errors import GraphError
from polytrace.graph import Port
from polytrace.lines import user_line
from polytrace.points import point_table
from polytrace.tree import NoSuchLayerError, NoSuchNameError, PortTable, Table


def inputs_table(table: Table, path: str) -> PortTable | None:
    """Both of them under one roof; None where the model calls no such module, or hands it no tensors."""
    weights = table.points.get(path, {}).get(Port.INPUT.value)
    if weights is not None:  # an attention dropout
        point = point_table(table, path, Port.INPUT.value)
        return None if point is None else replace(point, leaves={(0, 0): point.leaves[()]}, is_call=True)
    first, others = table.ports.get((path, Port.INPUT.value)), table.ports.get((path, Port.INPUTS.value))
    if first is None:
        return others
    keyword = first.info.keyword
    place: tuple[int | str, ...] = (0, 0) if keyword is None else (1, keyword)
    leaves = {(*place, *selector): leaf for selector, leaf in first.leaves.items()}
    info = replace(first.info, port=Port.INPUTS, structure="arguments") if others is None else others.info
    info = replace(info, members=tuple([replace(one, selector=(*place, *one.selector)) for one in first.info.members]))
    return PortTable(
        info=info, is_layer_output=False, leaves=leaves | (others.leaves if others is not None else {}), is_call=True
    )


def missing_argument(place: str, key: object, prefix: tuple[int | str, ...], names: str) -> GraphError:
    """What to say when an argument is asked for that the call does not have, or that is no tensor."""
    if key == "attention_mask":
        return NoSuchNameError(
            f"{place} has no attention mask: in a shared pass rows attend to their own sequence's earlier tokens by "
            "construction. `tracer.mask` tells tokens from pads; edit `scores` or `pattern` of an attention module to "
            "change who sees whom",
            where=user_line(),
        )
    kind = NoSuchNameError if isinstance(key, str) else NoSuchLayerError
    hint = "" if prefix else ": 0 for positional arguments, 1 for those by keyword"
    return kind(f"{place} has no tensor at {key!r}; it has {names}{hint}", where=user_line())
