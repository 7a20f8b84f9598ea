"""`module.skip(value)`: what stands for a module's output, so that the module need not run.

On the wire it is the assignment `module.output = value`. Rows whose decoder layer's output is assigned, and of which
nothing inside that layer is used, do not run it (`scheduling.cones`) and are not charged for it. Any other module runs
with the rows of the pass, and what it makes of these rows is thrown away.
"""

from __future__ import annotations

from typing import Any

from polytrace.errors import GraphError
from polytrace.historic import hidden_of
from polytrace.lines import user_line
from polytrace.ports import Key, Members, OpenPort


def skip_module(port: OpenPort, value: Any) -> None:
    """Gives every tensor of a module's output. Raises GraphError when one is missing or the module was used before."""
    where, module = user_line(), port.table.info.module
    if not module:
        raise GraphError("the whole model cannot be skipped: it would make nothing", where=where)
    given = _given(port, value, where)
    _close(port, where)
    for selector, tensor in given.items():
        port.write_leaf(selector, tensor)


def skip_layer(port: OpenPort, hidden: Any) -> None:
    """Gives a decoder layer's hidden states alone, whatever it returns beside them (attention weights, in BLOOM).

    A layer that returns more than hidden states runs, and what it makes of them is thrown away.
    """
    hidden = hidden_of(hidden)
    if len(port.table.leaves) == 1 or isinstance(hidden, (tuple, list, dict, Members)):
        skip_module(port, hidden)
        return
    _close(port, user_line())
    port.write_leaf((0,), hidden)


def _close(port: OpenPort, where: str) -> None:
    """What lies inside of the module cannot be read or written then."""
    module = port.table.info.module
    for invoke in port.tracer.members_of(port.tracer.invoke_index(f"{module}.skip")):
        recording = port.tracer.recording
        when = recording.when(port.site(port.below(())[0]), invoke, where)
        recording.closings.skip(module, invoke, where, when)


def _given(port: OpenPort, value: Any, where: str) -> dict[tuple[Key, ...], Any]:
    """The tensor for each place in the output's structure, but for those that no trace can read or write.

    (Attention weights, which layers of some families hand on beside the hidden states.)
    """
    closed = {way for way, (_, leaf) in port.table.leaves.items() if leaf.read_refusal and leaf.write_refusal}
    leaves = [way for way in port.table.leaves if way not in closed] or list(port.table.leaves)
    if len(leaves) == 1 and not isinstance(value, (tuple, list, dict, Members)):
        return {leaves[0]: value}
    if leaves == [()] and hidden_of(value) is not value:
        return {(): hidden_of(value)}
    found = {selector: _at(value, selector) for selector in leaves}
    missing = [port.site(selector) for selector, one in found.items() if one is None]
    if missing or leaves == [()]:
        names = ", ".join(str(port.site(selector)) for selector in leaves)
        raise GraphError(
            f"{port.table.info.module} returns a {port.table.info.structure}: skip(...) takes {names} in that "
            f"structure, and gets {_named(value)}",
            where=where,
        )
    return found


def _at(value: Any, selector: tuple[Key, ...]) -> Any:
    """What stands at the end of a way through tuples and dicts; None where there is none."""
    for key in selector:
        if isinstance(value, (dict, Members)):
            value = value[key] if key in value else None  # noqa: SIM401  Members have no get
        elif isinstance(value, (tuple, list)) and isinstance(key, int) and key < len(value):
            value = value[key]
        else:
            return None
    return None if isinstance(value, (tuple, list, dict, Members)) else value


def _named(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
    return f"a {type(value).__name__}{size}"
